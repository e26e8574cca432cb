"""What runs have measured: read at equal budgets, grouped over seeds, compared with intervals and paired tests.

A run is a point of a design: a *setting* (all parameters but the seed) and a seed. Seeds are shared between settings on
purpose: a seed fixes initial weights, the order of examples and the validation split, so that two settings with the
same seed differ by the method alone. Differences are therefore taken seed by seed (`paired`).

Knows numbers alone: `tracking/read.py` gets them from MLflow.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ray_jobs.formatting import brief, short

AXES = ("epochs", "gradient_evaluations", "seconds")
SEED = "training.seed"
LEVEL = 0.95
FEW_SEEDS = 5  # below it an interval is worth a warning: with four it reaches 1.6 standard deviations to each side

# Where files lie and how often they are written: no part of what was trained.
BOOKKEEPING = ("checkpoint.", "tracking.", "data.download")
# What has no effect without a perturbed point.
PERTURBATION = (
    "rho",
    "lam",
    "n_samples",
    "strength",
    "optimizer.rho_schedule",
    "optimizer.lam_schedule",
    "optimizer.every",
    "optimizer.perturb_fraction",
    "optimizer.scope",
    "optimizer.sample_parallel",
)


@dataclass(frozen=True)
class Curve:
    """A metric over epochs, which grow; inf and NaN are kept."""

    epochs: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunRecord:
    """One run of MLflow.

    Attributes:
        curves: metric -> its curve, cut at `phisam.stopped_epoch`.
        spent: gradient_evaluations and seconds in all, with what a stopped trial trained on after its last epoch that
            counts.
        started_ms: when it began, since 1970.
        reported: names of all metrics that it has, also of those whose curves were not read.
    """

    run_id: str
    name: str
    status: str
    parent_id: str | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    curves: Mapping[str, Curve]
    spent: Mapping[str, float] = field(default_factory=dict)
    started_ms: int = 0
    reported: frozenset[str] = frozenset()

    def at(self, metric: str, axis: str = "epochs", budget: float | None = None) -> float | None:
        """The metric at the last epoch that lies within the budget on the axis; budget None: at the last one.

        None where the run has no such epoch, or does not report the metric. A metric that was not reported in that
        very epoch (sharpness is measured now and then) is read at its last epoch before it.
        """
        curve = self.curves.get(metric)
        limit = self.epoch_within(axis, budget)
        if curve is None or limit is None:
            return None
        count = bisect.bisect_right(curve.epochs, limit)
        return curve.values[count - 1] if count else None

    def epoch_within(self, axis: str, budget: float | None) -> int | None:
        """The last epoch within a budget; None: there is none."""
        points = self.axis(axis)
        if budget is not None:  # a budget is another run's total: sums of the same floats may differ in the last bit
            points = {epoch: value for epoch, value in points.items() if value <= budget * (1 + 1e-9)}
        return max(points, default=None)

    def axis(self, axis: str) -> Mapping[int, float]:
        """epoch -> its value on the axis."""
        if axis == "epochs":
            return {epoch: epoch for curve in self.curves.values() for epoch in curve.epochs}
        curve = self.curves.get(axis)
        return {} if curve is None else dict(zip(curve.epochs, curve.values, strict=True))

    def total(self, axis: str) -> float | None:
        """What the run has of an axis at its last epoch."""
        return max(self.axis(axis).values(), default=None)

    def counts(self, axis: str, budget: float | None) -> bool:
        """Whether its value at a budget is a fair one: it is finished, or had come as far as that when it ended."""
        if self.status == "FINISHED":
            return True
        total = self.total(axis)
        return budget is not None and total is not None and total >= budget * (1 - 1e-9)

    @property
    def seed(self) -> int:
        """training.seed; 0 where a run does not say."""
        return int(self.params.get(SEED, 0))

    @property
    def trial(self) -> int | None:
        """Its place in a sweep."""
        text = self.tags.get("phisam.trial")
        return None if text is None else int(text)


@dataclass(frozen=True)
class Setting:
    """Runs that differ by nothing but the seed, newest first where a seed was run twice.

    Attributes:
        label: short words that tell it from the others of its list.
    """

    params: Mapping[str, str]
    label: str
    runs: tuple[RunRecord, ...]

    @cached_property
    def by_seed(self) -> Mapping[int, RunRecord]:
        """seed -> run. A seed that was run twice counts once, with its newest run: repeating it is no new evidence."""
        return {run.seed: run for run in sorted(self.runs, key=lambda run: (run.seed, run.started_ms))}

    def values(self, metric: str, axis: str = "epochs", budget: float | None = None) -> dict[int, float]:
        """seed -> the metric at a budget, for the runs that count there."""
        read = {s: r.at(metric, axis, budget) for s, r in self.by_seed.items() if r.counts(axis, budget)}
        return {seed: value for seed, value in read.items() if value is not None and math.isfinite(value)}

    @property
    def measure(self) -> str:
        """phi and psi by name."""
        return self.params.get("measure", "?")


def settings(records: Iterable[RunRecord]) -> list[Setting]:
    """Groups runs that are equal in all parameters but the seed, in order of appearance."""
    groups: dict[tuple[tuple[str, str], ...], list[RunRecord]] = defaultdict(list)
    for record in records:
        groups[tuple(sorted(_described(record.params).items()))].append(record)
    described = [dict(key) for key in groups]
    labels = _labels(described)
    return [
        Setting(params, label, tuple(runs))
        for params, label, runs in zip(described, labels, groups.values(), strict=True)
    ]


def _described(params: Mapping[str, str]) -> dict[str, str]:
    """What says which setting a run has."""
    left_out = (SEED, *BOOKKEEPING, *(PERTURBATION if params.get("measure") == "sgd" else ()))
    return {key: value for key, value in params.items() if not key.startswith(left_out)}


def varied(described: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that tell settings apart, by the alphabet; what follows from others is left out."""
    keys = sorted({key for params in described for key in params})
    differing = [key for key in keys if len({params.get(key) for params in described}) > 1]
    if {"rho", "lam"} & set(differing):
        differing = [key for key in differing if key != "strength"]  # lam rho^2
    return differing


def _labels(described: Sequence[Mapping[str, str]]) -> list[str]:
    """Names that are as short as they can be: of a setting's measure, and of what tells it from the same measure's.

    Where a sweep has several base runs, their names stand for the measures.
    """
    order = {"data.name": 0, "data.fraction": 1, "measure": 2, "rho": 3, "lam": 4, "n_samples": 5}
    across = [key for key in varied(described) if key in ("data.name", "data.fraction", "data.label_noise")]
    kind = "run" if "run" in varied(described) and all("run" in params for params in described) else "measure"
    kinds = {params.get(kind) for params in described}
    own = {name: varied([other for other in described if other.get(kind) == name]) for name in kinds}
    labels = []
    for params in described:
        keys = sorted({*own[params.get(kind)], *across}, key=lambda key: (order.get(key, 9), key))
        parts = [f"{short(key)}={brief(params[key])}" for key in keys if key in params and key not in across]
        labels.append(" ".join([*(params[key] for key in across if key in params), params.get(kind, "?"), *parts]))
    return labels


# statistics


@dataclass(frozen=True)
class Interval:
    """Mean and 95 % t-interval over n seeds; low and high are NaN for n = 1."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """NaN for n = 1."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Paired:
    """A setting against a baseline, by seeds that both have.

    Attributes:
        difference: mean of a - b.
        interval: of the difference.
        p: two-sided, of the paired t-test; NaN for one pair, or where all pairs differ by the very same.
        p_holm: p after Holm's correction; NaN until `holm` has set it.
        n: pairs.
    """

    difference: float
    interval: Interval
    p: float
    n: int
    p_holm: float = math.nan


def interval(values: Sequence[float]) -> Interval:
    """mean -+ t_{0.975, n - 1} s / sqrt(n), with s the standard deviation over n - 1.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs a value")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = _student_quantile(n - 1) * _deviation(values, mean) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Setting, b: Setting, metric: str, axis: str = "epochs", budget: float | None = None) -> Paired | None:
    """The paired t-test of a against b over the seeds that both have at the budget; None: they share none."""
    first, second = a.values(metric, axis, budget), b.values(metric, axis, budget)
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return paired_test(differences) if differences else None


def paired_test(differences: Sequence[float]) -> Paired:
    """t = mean / (s / sqrt(n)) against Student's t with n - 1 degrees of freedom, both sides.

    Differences that are all zero have p = 1: nothing differs. Differences that are all the same and not zero have no p:
    a standard deviation of 0 over a few seeds is rounding (accuracies come in steps), not certainty.
    """
    n, over = len(differences), interval(differences)
    if n == 1:
        return Paired(over.mean, over, math.nan, 1)
    deviation = _deviation(differences, over.mean)
    if deviation <= 1e-12 * max(map(abs, differences)):
        return Paired(over.mean, over, 1.0 if over.mean == 0 else math.nan, n)
    from scipy.stats import t as student

    statistic = over.mean / (deviation / math.sqrt(n))
    return Paired(over.mean, over, float(2 * student.sf(abs(statistic), n - 1)), n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p_(i) becomes max_{j <= i} min(1, (m - j + 1) p_(j)). NaN is no comparison."""
    order = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=lambda i: p[i])
    adjusted = [math.nan] * len(p)
    largest = 0.0
    for done, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - done) * p[i]))
        adjusted[i] = largest
    return adjusted


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _student_quantile(degrees: int) -> float:
    from scipy.stats import t as student

    return float(student.ppf((1 + LEVEL) / 2, degrees))


# metrics


def better_is_more(metric: str) -> bool:
    """Accuracies are to be high; losses, sharpness, times and costs low."""
    return metric.startswith("accuracy") or metric in ("examples_per_second",)


def selection_metric(metric: str) -> str:
    """The metric on validation data that a setting may be chosen by; choosing on test data would flatter it."""
    kind, _, part = metric.partition("/")
    early = "early_" if part.startswith("early_") else ""
    return f"{kind}/{early}validation" if kind in ("accuracy", "loss") and part else "accuracy/validation"


def common_budget(records: Iterable[RunRecord], axis: str) -> float | None:
    """What the finished run with the least of an axis has of it; None: none is finished."""
    totals = [run.total(axis) for run in records if run.status == "FINISHED"]
    return min((total for total in totals if total is not None), default=None)
