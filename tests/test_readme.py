"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
LAUNCHERS = {
    "one process": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_example_runs(launcher: str, tmp_path: Path) -> None:
    assert len(BLOCKS) == len(LAUNCHERS)
    script = tmp_path / "train.py"
    script.write_text(BLOCKS[list(LAUNCHERS).index(launcher)])
    done = subprocess.run([*LAUNCHERS[launcher], str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
