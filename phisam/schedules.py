"""Values that change with the step, for rho and lam: `PhiSAM(rho=schedules.warmup(0.05, 500))`.

A schedule is a function of the step (0, 1, ...) alone, so that a resumed run has no state to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, overload

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """value."""
    return lambda _: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """start + (end - start) step / steps; end from `steps` on.

    Raises:
        ValueError: steps < 1, as for every schedule.
    """
    _check_steps(steps)
    return lambda step: start + (end - start) * min(1.0, step / steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """end + (start - end) (1 + cos(pi step / steps)) / 2; end from `steps` on."""
    _check_steps(steps)
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def warmup(after: float | Schedule, steps: int) -> Schedule:
    """(step + 1) / steps of the value during the first `steps` steps: never 0, since rho must be > 0."""
    _check_steps(steps)
    schedule = after if callable(after) else constant(after)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a schedule's steps must be >= 1, got {steps!r}")


class Scheduled:
    """An attribute that reads as a number: of its owner's coming step, where a schedule was assigned.

    Args:
        check: raises ValueError for a number that is not allowed.
    """

    def __init__(self, check: Callable[[float], None]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, owner: None, kind: type) -> Scheduled: ...

    @overload
    def __get__(self, owner: HasStep, kind: type) -> float: ...

    def __get__(self, owner: HasStep | None, kind: type) -> float | Scheduled:
        if owner is None:
            return self
        assigned = owner.__dict__[self._name]
        value = assigned(owner.coming_step) if callable(assigned) else assigned
        self._check(value)
        return float(value)

    def __set__(self, owner: HasStep, value: float | Schedule) -> None:
        self._check(value(owner.coming_step) if callable(value) else value)
        owner.__dict__[self._name] = value

    def is_scheduled(self, owner: HasStep) -> bool:
        """Whether a schedule was assigned."""
        return callable(owner.__dict__[self._name])


class HasStep(Protocol):
    """What a schedule is read by."""

    @property
    def coming_step(self) -> int:
        """Steps taken so far."""
