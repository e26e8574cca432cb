"""What a run resumes from: one folder with two files, written whole or not at all.

state.pt        tensors and numbers, read with weights_only=True: no pickled code
history.json    the metrics of every epoch so far, with their timestamps
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from ray_jobs.errors import RunError, first_line

STATE, HISTORY = "state.pt", "history.json"

Metrics = dict[str, float]


def save(folder: Path, state: dict[str, Any], history: list[Metrics]) -> None:
    """Writes both files, each under a temporary name first: a reader never sees half of one."""
    _write(folder / HISTORY, lambda file: file.write(json.dumps(history).encode()))
    _write(folder / STATE, lambda file: torch.save(state, file))


def load(folder: Path) -> dict[str, Any]:
    """The state, on the CPU.

    Raises:
        RunError: the file is missing or damaged.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise RunError(f"{path}: the checkpoint cannot be read ({first_line(error)})") from None
    return state


def load_history(folder: Path) -> list[Metrics]:
    """The metrics of every epoch that the checkpoint has behind it.

    Raises:
        RunError: the file is missing or damaged.
    """
    path = folder / HISTORY
    try:
        history: list[Metrics] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the history cannot be read ({error})") from None
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


def _write(path: Path, content: Callable[[BinaryIO], Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
