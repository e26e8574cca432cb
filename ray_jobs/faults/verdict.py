"""Whether a disturbed run ended as the undisturbed one: on plain values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Points = Sequence[tuple[str, int, float]]
"""(metric, step, value) of all that MLflow has of a run, as often as it has it."""

OF_THIS_TIME = (
    "seconds",
    "seconds_per_step",
    "examples_per_second",
    "checkpoint_seconds",
    "restarts",
    "wasted_steps",
    "system/",
)
"""Metrics that say how long something took, or what faults cost: they differ between equal runs."""


@dataclass(frozen=True)
class Left:
    """What a run left. status: MLflow's; state: of its last checkpoint."""

    status: str
    points: Points
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """lost, twice: measurements; different: with another value than in the undisturbed run.

    unequal: names of runs whose weights or optimizer differ; unfinished: of those missing, or of another status.
    """

    lost: int
    twice: int
    different: int
    unequal: tuple[str, ...]
    unfinished: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Nothing was lost."""
        return not (self.lost or self.twice or self.different or self.unequal or self.unfinished)


def verdict(undisturbed: Mapping[str, Left], disturbed: Mapping[str, Left]) -> Verdict:
    """Of a training (one run) or a sweep, by the names of the runs."""
    lost = twice = different = 0
    unequal, unfinished = [], []
    for name, expected in undisturbed.items():
        left = disturbed.get(name)
        if left is None or left.status != expected.status:
            unfinished.append(name)
        if left is None:
            lost += len(expected.points)
            continue
        seen = Counter((metric, step) for metric, step, _ in left.points)
        lost += sum(1 for metric, step, _ in expected.points if not seen[metric, step])
        twice += sum(count - 1 for count in seen.values())
        values = {(metric, step): value for metric, step, value in left.points}
        different += sum(
            1
            for metric, step, value in expected.points
            if not metric.startswith(OF_THIS_TIME) and not _same(values.get((metric, step), value), value)
        )
        if not all(equal(expected.state[part], left.state.get(part)) for part in ("model", "optimizer")):
            unequal.append(name)
    return Verdict(lost, twice, different, tuple(unequal), tuple(unfinished))


def equal(left: Any, right: Any) -> bool:
    """Bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping):
        return (
            isinstance(right, Mapping)
            and left.keys() == right.keys()
            and all(equal(part, right[key]) for key, part in left.items())
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))
