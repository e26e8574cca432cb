"""Clocks, turns, and what is said of many of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds of work. name: what tables call it."""

    name: str
    now: Callable[[], float]


def clock_for(device: torch.device, workers: int) -> Clock:
    """Process CPU time for one process on a CPU, since other programs slow it least; else wall time, in which waiting
    for another rank or the device counts. On CUDA the device has done all its work whenever the clock is read.
    """
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return Clock("wall time", now)
    return Clock("CPU time", time.process_time) if workers == 1 else Clock("wall time", time.perf_counter)


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def steps_per_turn(seconds_per_step: float, turn_seconds: float) -> int:
    """Steps of a turn, so that each method has the clock for about as long: 1 to 200."""
    return min(200, max(1, round(turn_seconds / max(seconds_per_step, 1e-6))))


def ratios(before: Sequence[float], turns: Sequence[float], after: Sequence[float]) -> list[float]:
    """Each turn over the mean of the SGD turns just before and just after it: what drifts hits all three alike."""
    return [2 * turn / (a + b) for a, turn, b in zip(before, turns, after, strict=True)]
