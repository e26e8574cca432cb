"""Whole runs, as a user starts them: trained, killed, resumed, tracked. Real Ray, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from ray_jobs import checkpoint, config, train, trainer
from ray_jobs.errors import ConfigError, RunError

EPOCHS = 12
# Small batches: an epoch must last long enough to be killed in.
DESCRIPTION = ["digits-frob", "--set", f"training.epochs={EPOCHS}", "--set", "training.batch_size=16"]
DESCRIPTION += ["--set", "optimizer.base.lr=0.02"]


def command(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """`phisam train` in a session of its own."""
    environment = {**os.environ, "PHISAM_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", "train", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def the_run(home: Path) -> Run:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def series(home: Path, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    return sorted((m.step, m.value) for m in client.get_metric_history(the_run(home).info.run_id, name))


def final_state(home: Path) -> dict[str, Any]:
    newest = sorted((home / the_run(home).info.run_id).glob("checkpoint_2*"))[-1]
    return checkpoint.load(newest)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("undisturbed")
    return home, finished(command(home, *DESCRIPTION))


def test_a_run_prints_an_epoch_a_line_and_a_table_and_nothing_else(undisturbed: tuple[Path, str]) -> None:
    lines = undisturbed[1].splitlines()
    assert lines[0] == "digits-frob: starting workers"
    assert [line.split("  ")[0] for line in lines[1 : EPOCHS + 1]] == [
        f"digits-frob: epoch {epoch}/{EPOCHS}" for epoch in range(1, EPOCHS + 1)
    ]
    assert lines[EPOCHS + 1].split() == ["run", "digits-frob"]
    assert lines[-1] == "Curves, models and comparison: phisam ui"
    assert len(lines) == EPOCHS + 19


def test_the_run_in_mlflow_is_complete(undisturbed: tuple[Path, str]) -> None:
    home, _ = undisturbed
    run = the_run(home)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "digits-frob"
    assert [step for step, _ in series(home, "loss/train")] == list(range(1, EPOCHS + 1))
    assert run.data.metrics["accuracy/validation"] > 0.9
    assert run.data.metrics["accuracy/test"] > 0.9
    assert run.data.metrics["strength"] == pytest.approx(9e-7)
    assert run.data.metrics["sharpness"] > 0
    steps = 80  # 1797 digits, less a fifth for the test and a tenth of the rest for validation: 1294, by 16
    assert run.data.metrics["gradient_evaluations"] == EPOCHS * steps * 4
    assert {"data.fingerprint", "version.ray", "device", "phisam.folder"} <= set(run.data.tags)
    assert run.outputs is not None
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    names = {client.get_logged_model(output.model_id).name for output in run.outputs.model_outputs}
    assert names == {"best", "last"}


def test_the_best_model_is_the_first_of_highest_validation_accuracy(undisturbed: tuple[Path, str]) -> None:
    home, _ = undisturbed
    best = final_state(home)["best"]
    accuracy, loss = dict(series(home, "accuracy/validation")), dict(series(home, "loss/validation"))
    expected = max(accuracy, key=lambda step: (accuracy[step], -loss[step], -step))
    assert (best["epoch"], best["accuracy"]) == (expected, accuracy[expected])


def test_a_driver_that_is_killed_and_resumed_ends_bit_equal(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in mid-run; then --resume. Same weights, same optimizer state, each epoch once, in one MLflow run."""
    process = command(tmp_path, *DESCRIPTION)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 4/" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert the_run(tmp_path).info.status == "RUNNING"
    assert 0 < len(trainer.saved_history(tmp_path / the_run(tmp_path).info.run_id)) < EPOCHS
    _wait_until_ended(process.pid)

    finished(command(tmp_path, "--resume", the_run(tmp_path).info.run_id))
    assert the_run(tmp_path).info.status == "FINISHED"
    home, _ = undisturbed
    assert_equal(final_state(home), final_state(tmp_path))
    for name in ("loss/train", "loss/validation", "accuracy/validation", "accuracy/test", "lr", "sharpness"):
        assert series(tmp_path, name) == series(home, name), name

    again = command(tmp_path, "--resume", "digits-frob")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "is finished: there is nothing to resume" in output


def test_a_worker_that_is_killed_starts_again_and_nothing_listens_beyond_loopback(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    process = command(tmp_path, *DESCRIPTION)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "epoch 3/" in line:
            assert _listening(_session(process.pid)) <= LOOPBACK
            os.kill(_workers(process.pid)[0], signal.SIGKILL)
            break
    lines += process.communicate(timeout=300)[0].splitlines(keepends=True)
    assert process.returncode == 0, lines
    assert sum("workers failed and start again from the newest checkpoint" in line for line in lines) == 1
    assert not any("raylet" in line for line in lines)
    home, _ = undisturbed
    assert_equal(final_state(home), final_state(tmp_path))
    assert series(tmp_path, "loss/train") == series(home, "loss/train")


def assert_equal(left: Any, right: Any, where: str = "state") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def _wait_until_ended(session: int) -> None:
    """Ray's processes see that their driver is gone and end by themselves; the rest of the session is ended here."""
    deadline = time.monotonic() + 20
    while _session(session) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in _session(session):
        os.kill(pid, signal.SIGKILL)


def _session(session: int) -> list[int]:
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(folder.name))
    return pids


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def _listening(pids: list[int]) -> set[str]:
    """Addresses, as the kernel writes them, that processes listen on over TCP."""
    sockets = {
        link
        for pid in pids
        for descriptor in Path(f"/proc/{pid}/fd").glob("*")
        if (link := _target(descriptor)).startswith("socket:")
    }
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].partition(":")[0])
    assert addresses
    return addresses


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def _workers(session: int) -> list[int]:
    """Ray Train's workers of a session, by the names that Ray gives their processes."""
    return [pid for pid in _session(session) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def cluster_of_2_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    return


@pytest.mark.usefixtures("cluster_of_2_cpus")
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["scaling.use_gpu=true"], r"num_workers = 2 on GPUs needs 2 of them, but the cluster has 0"),
        (["scaling.num_workers=4"], r"num_workers = 4 with cpus_per_worker = 1 needs 4 CPUs, but the cluster has 2"),
        (["scaling.cpus_per_worker=2"], r"needs 4 CPUs, but the cluster has 2"),
        (
            ["training.batch_size=63", "optimizer.sample_parallel=1"],
            r"batch_size = 63 .* shared equally by 2 data ranks",
        ),
        (["training.batch_size=5000"], r"batch_size = 5000, but the training split has 1294 examples"),
        (["model={name: torchvision/resnet18}"], r"takes images of 3 channels"),
        (["data.name=cifar10", "data.root=/absent"], r"/absent"),
    ],
)
def test_what_cannot_run_is_said_before_a_worker_starts(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=told):
        train.train(config.load("digits-frob", overrides), Console())
    assert not list(tmp_path.iterdir())


def test_resume_of_what_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RunError, match="no run 'nothing' in MLflow"):
        train.unfinished("nothing")
    assert not list(tmp_path.iterdir())
