"""What trials have reported, and what is decided about them; `rungs.py` and `population.py` have the rules."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Key = float
"""What values are ranked by: the smaller, the better."""


@dataclass(frozen=True)
class Point:
    """The end of an epoch: resource spent since the trial began, value of the sweep's metric."""

    epoch: int
    resource: float
    value: float


@dataclass(frozen=True)
class Trajectory:
    """What is known of a trial. points: by epoch. failed: for good; a trial that will be tried again is running."""

    points: Sequence[Point]
    state: Literal["running", "finished", "failed", "cut"] = "running"

    def at(self, level: float) -> Point | None:
        """The first epoch that ends at or beyond a level of the resource."""
        first = bisect_left(self.points, level, key=lambda point: point.resource)
        return self.points[first] if first < len(self.points) else None


@dataclass(frozen=True)
class Continue:
    """No rung that the trial has reached stops it."""


@dataclass(frozen=True)
class Pending:
    """Whether the trial goes on beyond a rung depends on earlier trials that are not there yet."""

    rung: float


@dataclass(frozen=True)
class Cut:
    """The trial ends with this epoch."""

    epoch: int
    reason: str


Verdict = Continue | Pending | Cut


def sort_key(value: float, mode: Literal["max", "min"]) -> Key:
    """Smaller is better; NaN is worse than every number."""
    if math.isnan(value):
        return math.inf
    return -value if mode == "max" else value


@dataclass(frozen=True)
class Axis:
    """What trials are judged by, and along what.

    mode: whether large or small values are good. resource: what the axis is called in reasons. top: no rung lies
    beyond it, since a trial that comes there has nothing left to save. budget: what a trial gets of a resource that its
    epochs do not tell beforehand, seconds; else None.
    """

    mode: Literal["max", "min"]
    resource: str = "epochs"
    top: float = math.inf
    budget: float | None = None

    @property
    def name(self) -> str:
        """Of the resource, for people."""
        return self.resource.replace("_", " ")


class Stopping:
    """Cuts nothing: the base of the rules that do."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def verdicts(self, trials: Mapping[int, Trajectory]) -> dict[int, Verdict]:
        """Of every trial given. A trial with a lower index that is not given counts as one that has not begun."""
        return dict.fromkeys(trials, Continue())

    def verdict(self, index: int, trials: Mapping[int, Trajectory]) -> Verdict:
        """Of one trial."""
        return self.verdicts(trials)[index]

    def spent(self, trajectory: Trajectory) -> int | None:
        """The last epoch within the budget, at least the first, once an epoch ended at or beyond it; else None."""
        budget = self.axis.budget
        if budget is None or trajectory.at(budget) is None:
            return None
        return max([1, *(point.epoch for point in trajectory.points if point.resource <= budget)])
