"""A run's or a trial's folder of checkpoints: which there are, which to go on from, which to keep.

checkpoint_480            after 480 steps
damaged_checkpoint_480    set aside: it was not what had been written; the next of the name is damaged_checkpoint_480.2

Ray Train keeps no list of them: its own would end a run when the disk is full, and cannot go on from the one before.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

from ray_jobs import checkpoint
from ray_jobs.errors import RunError

PREFIX, DAMAGED = "checkpoint_", "damaged_"


def place(folder: Path, steps: int) -> Path:
    """Where the checkpoint after so many steps of a run lies."""
    return folder / f"{PREFIX}{steps}"


def present(folder: Path) -> list[Path]:
    """Those that were written, by their steps; whether they can be read is for `look` to say.

    Raises:
        RunError: the folder is there, and cannot be listed. `glob` may answer that it is empty: a run would begin anew.
    """
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry.path) for entry in entries if _is_name(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder} cannot be listed ({error.strerror})") from None
    return sorted(found, key=steps_of)


def _is_name(name: str) -> bool:
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).isdigit()


def newest(folder: Path) -> Path | None:
    """The newest, whether it can be read or not; None for a fresh run."""
    return next(reversed(present(folder)), None)


def look(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest that is whole, and what is wrong with each that is newer; None: there is none. Reads all of them.

    Raises:
        RunError: a disk or the memory fails, so that nobody knows.
    """
    damaged = {}
    for path in reversed(present(folder)):
        try:
            _check(path)
        except checkpoint.DamagedError as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    return None, damaged


def usable(folder: Path) -> Path | None:
    """The checkpoint to go on from; None: there is none."""
    return look(folder)[0]


def at_epoch(folder: Path, epoch: int) -> Path | None:
    """The checkpoint that was made at the end of an epoch; None: there is none any more."""
    for path in reversed(present(folder)):
        try:
            if _check(path) == (epoch, 0):
                return path
        except checkpoint.DamagedError:
            continue
    return None


def set_aside(path: Path) -> Path:
    """Nobody goes on from this one any more; its new place. One that was set aside before stays."""
    first = path.with_name(f"{DAMAGED}{path.name}")
    others = (first.with_name(f"{first.name}.{number}") for number in itertools.count(2))
    return path.rename(next(aside for aside in itertools.chain([first], others) if not os.path.lexists(aside)))


def damaged(folder: Path) -> list[Path]:
    """Those that were set aside."""
    return sorted(folder.glob(f"{DAMAGED}{PREFIX}*"))


def prune(folder: Path, keep: int, steps_per_epoch: int) -> None:
    """Deletes all but the newest `keep`, and the newest `keep` at ends of epochs."""
    found = present(folder)
    ends = [path for path in found if steps_of(path) % steps_per_epoch == 0]
    for path in set(found) - set(found[-keep:]) - set(ends[-keep:]):
        shutil.rmtree(path, ignore_errors=True)


def sweep_up(folder: Path) -> None:
    """Deletes what a process that was killed had half written."""
    for path in folder.glob(f".{PREFIX}*{checkpoint.PART}"):
        shutil.rmtree(path, ignore_errors=True)


def saved_history(folder: Path) -> list[checkpoint.Metrics]:
    """Metrics of the epochs behind the newest checkpoint that is whole; none for a fresh run."""
    found = usable(folder)
    return [] if found is None else checkpoint.load_history(found)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is what was written. Reads all of it."""
    try:
        _check(path)
    except checkpoint.DamagedError:
        return False
    return True


def steps_of(path: Path) -> int:
    """Of the run, that a checkpoint was made after."""
    return int(path.name.removeprefix(PREFIX))


def _check(path: Path) -> tuple[int, int]:
    """Reads all of a checkpoint; its epochs, and its steps of the epoch after."""
    state, history = checkpoint.load(path), checkpoint.load_history(path)
    if state.get("epoch") != len(history):
        raise checkpoint.DamagedError(f"{path}: {state.get('epoch')} epochs of weights, {len(history)} of history")
    return len(history), int(state.get("step", 0))
