"""Every example runs as its first line says, learns, and is short; the code of docs/loops.md runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment, cwd=cwd
    )


def output(script: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """What the example prints."""
    done = run(*launcher, str(EXAMPLES / script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy(printed: str) -> float:
    """The last one printed. Chance is 0.1."""
    return float(re.findall(r"test accuracy ([\d.]+)", printed)[-1])


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_plain_loop_stops_and_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight.pt", tmp_path / "halves.pt"
    printed = output("plain_loop.py", "--epochs", "4", "--checkpoint", str(straight))
    assert accuracy(printed) > 0.8
    assert "gradient evaluations a step 2, skipped steps 0" in printed
    output("plain_loop.py", "--epochs", "2", "--checkpoint", str(halves))
    resumed = output("plain_loop.py", "--epochs", "4", "--checkpoint", str(halves))
    assert resumed.splitlines() == printed.splitlines()[2:]
    for name, value in load(straight)["model"].items():
        assert torch.equal(value, load(halves)["model"][name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accumulation_amp(precision: str) -> None:
    printed = output("accumulation_amp.py", "--epochs", "5", "--precision", precision)
    assert accuracy(printed) > 0.7
    assert "skipped steps 0" in printed
    assert ("loss scale 65536" in printed) == (precision == "fp16")


def test_torchrun_ddp_deals_the_points(tmp_path: Path) -> None:
    printed = output("torchrun_ddp.py", "--epochs", "4", "--checkpoint", str(tmp_path / "c.pt"), launcher=TORCHRUN)
    assert accuracy(printed) > 0.8
    assert "data 1 x sample 2" in printed
    assert load(tmp_path / "c.pt")["opt"]["phisam"]["step"] == 4 * (1437 // 128)


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["python", "torchrun"])
def test_accelerate_loop(launcher: tuple[str, ...], tmp_path: Path) -> None:
    printed = output("accelerate_loop.py", "--epochs", "4", "--checkpoint", str(tmp_path), launcher=launcher)
    assert accuracy(printed) > 0.8
    assert "of 360" in printed
    assert load(tmp_path / "custom_checkpoint_0.pkl")["phisam"]["step"] == 4 * (1437 // (128 if launcher else 64))


def test_accelerate_loop_hands_its_scaler_over() -> None:
    assert accuracy(output("accelerate_loop.py", "--epochs", "3", "--precision", "fp16")) > 0.8


def test_fsdp2_saves_the_whole_model(tmp_path: Path) -> None:
    printed = output("fsdp2.py", "--epochs", "5", "--checkpoint", str(tmp_path / "model.pt"), launcher=TORCHRUN)
    assert accuracy(printed) > 0.7
    assert load(tmp_path / "model.pt")["0.weight"].shape == (128, 64)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_an_example_is_short_and_listed(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{script.name}" in text.splitlines()[0]
    for page in ("README.md", "examples/README.md"):
        assert f"{script.name})" in (EXAMPLES.parent / page).read_text(encoding="utf-8"), page


def test_the_guides_code_runs(tmp_path: Path) -> None:
    guide = (EXAMPLES.parent / "docs" / "loops.md").read_text(encoding="utf-8")
    group = 'import torch.distributed as d; d.init_process_group("gloo", store=d.HashStore(), rank=0, world_size=1)\n'
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) > 5
    script = tmp_path / "guide.py"
    script.write_text(group + "\n".join(blocks), encoding="utf-8")
    done = run(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
