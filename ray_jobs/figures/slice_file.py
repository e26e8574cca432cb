"""A slice on the way: a folder with what is sliced, its directions, and the points that are done.

slice.json       the slice and the weights and examples it is of; another slice is refused here
directions.pt    the directions, (d,) each: found once
points.csv       index,loss: a line for each point, as they come
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor, nn

from phisam.sharpness import landscape
from ray_jobs.errors import ConfigError, RunError

SLICE, DIRECTIONS, POINTS = "slice.json", "directions.pt", "points.csv"


@dataclass(frozen=True)
class Slice:
    """Which points: points (a line) or points x points (a plane), from -radius to radius along each direction."""

    directions: Literal["random", "eigenvectors"]
    dimensions: Literal[1, 2]
    points: int
    radius: float
    seed: int

    @property
    def axis(self) -> Tensor:
        """Coordinates along each direction, (points,)."""
        return landscape.grid(self.radius, self.points)

    @property
    def coordinates(self) -> list[landscape.Point]:
        """All points, in the order of their indices."""
        return landscape.line(self.axis) if self.dimensions == 1 else landscape.plane(self.axis, self.axis)


class SliceFile:
    """A slice's folder, opened: made if it is new, read if it was begun."""

    def __init__(self, folder: Path, wanted: Slice, of: str) -> None:
        """of: what tells the weights and the examples from others.

        Raises:
            ConfigError: the folder holds another slice, or one of another model.
            RunError: it cannot be written.
        """
        self.folder = folder
        description = json.dumps({**asdict(wanted), "of": of}, indent=1)
        path = folder / SLICE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text(encoding="utf-8") != description:
                raise ConfigError(f"{folder} holds another slice, or one of another model: name another folder")
            path.write_text(description, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{error.filename} cannot be written ({error.strerror})") from None

    def directions(self, find: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The directions of an earlier call, else those that `find` gives, which are kept."""
        path = self.folder / DIRECTIONS
        if path.exists():
            try:
                return list(torch.load(path, weights_only=True))
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise RunError(f"{path} cannot be read ({error}): remove it with {self.folder / POINTS}") from None
        found = [direction.cpu() for direction in find()]
        part = path.with_suffix(".part")
        torch.save(found, part)
        part.replace(path)
        return found

    def known(self) -> dict[int, float]:
        """Index -> loss of the points that are done; a last line that was cut short does not count."""
        path = self.folder / POINTS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, cut = text.rpartition("\n")
        if cut:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        pairs = (line.split(",") for line in whole.splitlines())
        return {int(index): float(loss) for index, loss in pairs}

    @property
    def files(self) -> list[Path]:
        """What there is to keep beside the pictures."""
        return [self.folder / SLICE, self.folder / POINTS]

    def open(self) -> IO[str]:
        """For `write`; line by line on the disk."""
        return (self.folder / POINTS).open("a", buffering=1, encoding="utf-8")


def write(file: IO[str], losses: Mapping[int, float]) -> None:
    """Points that are done; every digit that a float has."""
    for index, loss in losses.items():
        file.write(f"{index},{loss!r}\n")


def fingerprint(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    """What tells weights and examples from others: a hash over all of them."""
    digest = hashlib.sha256()
    for value in [*model.state_dict().values(), *(tensor for batch in batches for tensor in batch)]:
        digest.update(repr(tuple(value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
