"""What a run resumes from: one folder, written whole or not at all, in which damage is noticed.

state.pt        tensors and numbers, read with weights_only=True: no pickled code
history.json    the metrics of every epoch so far, with their timestamps
SHA256SUMS      checksums of both: torch does not notice a flipped bit inside a tensor. `sha256sum -c` reads it too
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import nn

from ray_jobs.disk import sync_folder
from ray_jobs.errors import RunError, first_line

STATE, HISTORY, SUMS = "state.pt", "history.json", "SHA256SUMS"
PART = ".part"
"""What a folder's name ends with while it is being written."""

Metrics = dict[str, float]


class DamagedError(RunError):
    """It is not what was written, and never will be again: missing, torn, or with another checksum."""


def save(folder: Path, state: dict[str, Any], history: list[Metrics]) -> None:
    """Writes the folder under a temporary name first: a reader, or a crash, never meets half of it.

    Raises:
        OSError: the disk is full, or fails. Nothing is left of what was written; an older folder of the name is whole.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{PART}")
    older = temporary.with_suffix(f".old{PART}")
    try:
        temporary.mkdir(parents=True)
        sums = {
            HISTORY: _write(temporary / HISTORY, lambda file: file.write(json.dumps(history).encode())),
            STATE: _write(temporary / STATE, lambda file: torch.save(state, file)),
        }
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        _write(temporary / SUMS, lambda file: file.write(lines.encode()))
        sync_folder(temporary)
        if folder.exists():
            folder.rename(older)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if older.exists() and not folder.exists():
            older.rename(folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """The state, on the CPU.

    Raises:
        DamagedError: the file is missing or damaged.
        RunError: the disk or the memory fails, which says nothing about the file.
    """
    path = folder / STATE
    try:
        with _checked(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except FileNotFoundError:
        raise DamagedError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a file that somebody made has torch's reader raise whatever it likes
        raise _unreadable(f"{path}: the checkpoint", error) from None
    return state


def load_history(folder: Path) -> list[Metrics]:
    """The metrics of every epoch that the checkpoint has behind it.

    Raises:
        DamagedError, RunError: as `load`.
    """
    path = folder / HISTORY
    try:
        with _checked(path) as file:
            history = json.load(file)
        if not isinstance(history, list) or not all(isinstance(metrics, dict) for metrics in history):
            raise ValueError("it is no list of metrics")
    except (OSError, MemoryError, ValueError, RecursionError) as error:
        raise _unreadable(f"{path}: the history", error) from None
    return history


def load_model(model: nn.Module, state: dict[str, Any], where: str) -> None:
    """The weights into a model.

    Raises:
        RunError: they are of another architecture.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise RunError(f"{where}: the weights are of another architecture than the run's model: {detail}") from None


class _Hashing:
    """A file that is written from its beginning to its end, as torch.save does, with the checksum of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        self._hash.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _write(path: Path, content: Callable[[BinaryIO], Any]) -> str:
    """The checksum of what was written."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            content(cast(BinaryIO, hashing))
        except RuntimeError as error:  # what torch.save makes of a disk's error
            raise hashing.error or error from None
        file.flush()
        os.fsync(file.fileno())
    return hashing.hexdigest()


def _unreadable(what: str, error: Exception) -> RunError:
    """Damage, but for an error of the disk or the memory: what is whole must not be set aside for one of those."""
    told = f"{what} cannot be read ({first_line(error)})"
    is_file = not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    of_memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # torch's is a RuntimeError
    if of_memory or (isinstance(error, OSError) and is_file):
        return RunError(f"{told}; it is not known to be damaged")
    return DamagedError(told)


def _checked(path: Path) -> BinaryIO:
    """The file, open at its beginning.

    Raises:
        OSError: it is missing, or the disk fails.
        ValueError: it is not what was written.
    """
    file = path.open("rb")
    try:
        sums = path.parent / SUMS
        try:
            lines = sums.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            raise ValueError(f"{SUMS} is missing beside it") from None
        if f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}" not in lines:
            raise ValueError("it is not what was written, by its checksum")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
