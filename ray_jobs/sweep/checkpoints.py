"""A trial's checkpoints when not all of them can be read, as after a full disk or a torn copy."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ray_jobs import checkpoint
from ray_jobs.errors import RunError
from ray_jobs.trainer import newest_checkpoint

LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's, of the checkpoints in a folder; it resumes from the newest there, and begins anew without the list."""


def look(folder: Path) -> tuple[Path | None, str | None]:
    """The checkpoint to go on from, and what is wrong with the one that Ray Train would go on from.

    They are the newest and None, or where that cannot be read the one of the most epochs that can be; None: there is
    none.
    """
    try:
        newest = newest_checkpoint(folder)
        if newest is not None:
            _check(newest)
        return newest, None
    except RunError as error:
        readable = _readable(folder)
        return (readable[max(readable)] if readable else None), str(error)


def usable(folder: Path) -> Path | None:
    """The checkpoint to go on from; None: there is none."""
    return look(folder)[0]


def at_epoch(folder: Path, epoch: int) -> Path | None:
    """The checkpoint that was made after an epoch; None: there is none any more."""
    return _readable(folder).get(epoch)


def set_aside(folder: Path) -> None:
    """Ray Train will find no checkpoint here, so that a leg begins with the one that it is given."""
    path = folder / LIST
    if path.exists():
        path.replace(path.with_suffix(".unreadable"))


def _readable(folder: Path) -> dict[int, Path]:
    """Epochs behind a checkpoint -> the checkpoint."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("checkpoint_*")):  # named by their times
        if path.is_dir():
            with contextlib.suppress(RunError):
                found[_check(path)] = path
    return found


def _check(path: Path) -> int:
    """Reads all of a checkpoint; its epochs."""
    state, history = checkpoint.load(path), checkpoint.load_history(path)
    if state.get("epoch") != len(history):
        raise RunError(f"{path}: {state.get('epoch')} epochs of weights, {len(history)} of history")
    return len(history)
