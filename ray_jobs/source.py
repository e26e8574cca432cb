"""The git commit that a run is made from, and the changes since: taken where a person works, carried with a job."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

DIFF_BYTES = 1 << 20
DIFF = "code.diff"
NOTE = "source.json"
CARRIED = "PHISAM_SOURCE"  # names the folder that holds what a job carries


def taken() -> tuple[dict[str, str], str]:
    """Tags of the current directory's repository, and the changes since its commit; nothing outside one.

    Files that git does not know are not among the changes, but make the state dirty.
    """
    try:
        dirty = bool(_git("status", "--porcelain").strip())
        tags = {"git.commit": _git("rev-parse", "HEAD").strip(), "git.dirty": str(dirty).lower()}
        changes = _git("diff", "HEAD", "--no-color", "--no-ext-diff") if dirty else ""
    except (OSError, subprocess.SubprocessError):
        return {}, ""
    if len(changes) > DIFF_BYTES:
        changes = f"{changes[:DIFF_BYTES]}\n[cut: {len(changes)} characters in all]\n"
    return tags, changes


def carried() -> tuple[dict[str, str], dict[str, str]]:
    """Tags, and texts by file name, of the code that this run is made from: as it was where the job was submitted."""
    folder = os.environ.get(CARRIED)
    if folder is None:
        return taken()[0], {}
    tags = json.loads(Path(folder, NOTE).read_text(encoding="utf-8"))
    diff = Path(folder, DIFF)
    return tags, {DIFF: diff.read_text(encoding="utf-8")} if diff.exists() else {}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
    )
    return done.stdout
