"""The Hessian at equal training loss: it goes to 0 with the loss, and says nothing where losses differ. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_jobs.results import Interval, RunRecord, Setting, interval

LOSS, FROBENIUS, TRACE = "loss/train", "hessian/frobenius_squared", "hessian/trace"
ERROR = ".standard_error"


@dataclass(frozen=True)
class AtLoss:
    """A setting where its training loss was `loss`, each seed interpolated between two measured epochs.

    Attributes:
        frobenius: the geometric mean over seeds of the squared norm, and its 95 % interval.
        trace: mean and 95 % interval over seeds.
        probes: standard error of one measurement of the squared norm, by its random vectors, relative; the median.
    """

    loss: float
    frobenius: Interval
    trace: Interval
    probes: float


def at_equal_loss(methods: Mapping[str, Setting]) -> dict[str, AtLoss]:
    """Every method at the lowest training loss that all seeds of all of them came down to while they were measured."""
    points = {name: [_points(run) for run in setting.by_seed.values()] for name, setting in methods.items()}
    lowest = [min(loss for loss, *_ in run) for runs in points.values() for run in runs if run]
    if not lowest:
        return {}
    level = max(lowest)
    found = {}
    for name, runs in points.items():
        crossed = [at for run in runs if (at := _crossing(run, level)) is not None]
        if len(crossed) < 2:
            continue
        logs = interval([math.log(frobenius) for frobenius, _ in crossed])
        frobenius = Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.n)
        found[name] = AtLoss(level, frobenius, interval([trace for _, trace in crossed]), _probes(methods[name]))
    return found


Point = tuple[float, float, float]
"""Training loss, squared Frobenius norm, trace."""


def _points(run: RunRecord) -> list[Point]:
    """By epoch, where the Hessian was measured and is not 0."""
    if any(name not in run.curves for name in (LOSS, FROBENIUS, TRACE)):
        return []
    losses, traces = (dict(zip(c.epochs, c.values, strict=True)) for c in (run.curves[LOSS], run.curves[TRACE]))
    norms = run.curves[FROBENIUS]
    return [(losses[e], norm, traces[e]) for e, norm in zip(norms.epochs, norms.values, strict=True) if norm > 0]


def _crossing(points: Iterable[Point], level: float) -> tuple[float, float] | None:
    """Norm and trace where the loss first comes down to the level: linear in logarithms, but for the trace."""
    before: Point | None = None
    for point in points:
        if point[0] <= level:
            if before is None:
                return point[1:] if math.isclose(point[0], level) else None
            (a, norm_a, trace_a), (b, norm_b, trace_b) = before, point
            t = (math.log(a) - math.log(level)) / (math.log(a) - math.log(b))
            return norm_a ** (1 - t) * norm_b**t, (1 - t) * trace_a + t * trace_b
        before = point
    return None


def _probes(setting: Setting) -> float:
    relative = []
    for run in setting.by_seed.values():
        norms, errors = run.curves.get(FROBENIUS), run.curves.get(FROBENIUS + ERROR)
        if norms is not None and errors is not None:
            relative += [e / n for n, e in zip(norms.values, errors.values, strict=True) if n > 0]
    relative.sort()
    return relative[len(relative) // 2] if relative else math.nan
