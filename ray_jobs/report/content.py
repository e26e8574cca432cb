"""What a sweep's records say, before anything is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_jobs.compare import best
from ray_jobs.results import PERTURBATION, SEED, Interval, RunRecord, Setting, interval, settings, varied

SERIES = 8  # colours, dashes and symbols there are to tell methods apart by
TEST = "accuracy/test"
FIRST = {"data.name": 0, "data.fraction": 1, "measure": 2, "rho": 3, "lam": 4, "n_samples": 5}


@dataclass(frozen=True)
class Method:
    """A line of the plots: the best setting of a measure, or of a measure at one n.

    Attributes:
        label: what the line is called.
        setting: the one of `chosen_from` that validation chose.
        series: place in the palette.
    """

    label: str
    setting: Setting
    chosen_from: int
    series: int


def methods(records: Sequence[RunRecord], metric: str, mode: str) -> list[Method]:
    """At most SERIES methods, best first.

    They are the sweep's base runs where it has several, else measures at each n, else measures, else settings.
    """
    found = settings(records)
    by_run = len({setting.params.get("run") for setting in found}) > 1
    ways: list[Callable[[Setting], str]] = [lambda s: _with_n(s, found), lambda s: s.measure]
    for key in [lambda s: s.params.get("run", "-"), *ways] if by_run else ways:
        groups: dict[str, list[Setting]] = {}
        for setting in found:
            groups.setdefault(key(setting), []).append(setting)
        if len(groups) > 1 and (by_run or len(groups) <= SERIES):
            chosen = [(label, best(group, metric, mode == "max"), len(group)) for label, group in groups.items()]
            break
    else:
        chosen = [(setting.label, setting, 1) for setting in found]

    def rank(item: tuple[str, Setting, int]) -> tuple[bool, float]:
        mean = mean_of(item[1], metric)
        return math.isnan(mean), -mean if mode == "max" else mean

    ranked = sorted(chosen, key=rank)[:SERIES]
    names = sorted(label for label, *_ in ranked)  # a colour belongs to a name, not to a rank
    return [Method(label, setting, count, names.index(label)) for label, setting, count in ranked]


def _with_n(setting: Setting, found: Sequence[Setting]) -> str:
    """frobenius n=3 where a measure was run with several n, else its name."""
    counts = {other.params.get("n_samples") for other in found if other.measure == setting.measure}
    return f"{setting.measure} n={setting.params.get('n_samples')}" if len(counts) > 1 else setting.measure


def winner(parent: RunRecord, records: Sequence[RunRecord], metric: str, mode: str) -> Setting | None:
    """The setting that the sweep chose, or would choose among these; None where no run is finished."""
    done = [setting for setting in settings(records) if setting.values(metric)]
    chosen = parent.tags.get("phisam.winner", "").split(",")  # one on each data set
    told = [setting for setting in done if any(run.run_id in chosen for run in setting.runs)]
    return told[0] if told else best(done, metric, mode == "max") if done else None


def mean_of(setting: Setting, metric: str) -> float:
    """Mean over the seeds that are finished; NaN where none is."""
    values = setting.values(metric)
    return math.fsum(values.values()) / len(values) if values else math.nan


@dataclass(frozen=True)
class Band:
    """A setting's metric over epochs: mean and interval over seeds, against the mean of an axis."""

    x: tuple[float, ...]
    intervals: tuple[Interval, ...]


def band(setting: Setting, metric: str, axis: str) -> Band:
    """Over the finished runs, or all if none is, in the epochs that all of them have."""
    runs = [run for run in setting.by_seed.values() if run.status == "FINISHED"] or list(setting.by_seed.values())
    curves = [_points(run, metric) for run in runs]
    axes = [run.axis(axis) for run in runs]
    epochs = sorted(set.intersection(*(curve.keys() & along.keys() for curve, along in zip(curves, axes, strict=True))))
    return Band(
        tuple(math.fsum(along[epoch] for along in axes) / len(axes) for epoch in epochs),
        tuple(interval([curve[epoch] for curve in curves]) for epoch in epochs),
    )


def _points(run: RunRecord, metric: str) -> dict[int, float]:
    curve = run.curves.get(metric)
    if curve is None:
        return {}
    return {e: v for e, v in zip(curve.epochs, curve.values, strict=True) if math.isfinite(v)}


# states, cost, savings


def state(run: RunRecord) -> str:
    """finished, stopped (by the sweep), failed, running."""
    if run.status == "KILLED" and "phisam.stopped" in run.tags:
        return "stopped"
    return {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}.get(run.status, "running")


def states(records: Iterable[RunRecord]) -> Mapping[str, int]:
    """How many trials ended how, most first."""
    return dict(Counter(map(state, records)).most_common())


@dataclass(frozen=True)
class Cost:
    """Gradient evaluations and device-hours, of training alone."""

    trials: int
    gradient_evaluations: float
    device_hours: float


def cost(records: Iterable[RunRecord]) -> Cost:
    """Of all trials, with what stopped ones trained on while the verdict was pending."""
    runs = list(records)
    hours = [run.spent.get("seconds", 0.0) * workers(run) / 3600 for run in runs]
    return Cost(len(runs), math.fsum(run.spent.get("gradient_evaluations", 0.0) for run in runs), math.fsum(hours))


def workers(run: RunRecord) -> int:
    """scaling.num_workers; each has one device."""
    return int(run.params.get("scaling.num_workers", 1))


@dataclass(frozen=True)
class Savings:
    """What early stopping left out, against every stopped trial going on to its last epoch at the same pace.

    Attributes:
        overrun: gradient evaluations that stopped trials took after the epoch that they were stopped at.
    """

    stopped: int
    gradient_evaluations: float
    device_hours: float
    part: float
    overrun: float


def savings(records: Sequence[RunRecord]) -> Savings:
    """Zero where nothing was stopped."""
    stopped = [run for run in records if state(run) == "stopped" and run.total("epochs")]
    evaluations = hours = overrun = 0.0
    for run in stopped:
        counted = run.total("epochs") or 1.0
        planned = float(run.params.get("training.epochs", counted))
        ends = {axis: run.total(axis) or 0.0 for axis in ("gradient_evaluations", "seconds")}
        left = {axis: max(0.0, end * planned / counted - run.spent.get(axis, end)) for axis, end in ends.items()}
        evaluations += left["gradient_evaluations"]
        hours += left["seconds"] * workers(run) / 3600
        overrun += max(0.0, run.spent.get("gradient_evaluations", 0.0) - ends["gradient_evaluations"])
    spent = cost(records).gradient_evaluations
    whole = spent + evaluations
    return Savings(len(stopped), evaluations, hours, evaluations / whole if whole else 0.0, overrun)


# the rest


def sharpness_metric(records: Iterable[RunRecord]) -> str:
    """The measured quantity of the Hessian that most runs have, else R_rho of training."""
    reported = Counter(
        metric
        for run in records
        for metric in run.curves
        if metric.startswith("hessian/") and not metric.endswith(".standard_error")
    )
    order = ("hessian/frobenius_squared", "hessian/trace", "hessian/top_eigenvalue")
    return next((metric for metric in order if metric in reported), next(iter(reported), "sharpness"))


def trial_parameters(records: Sequence[RunRecord]) -> list[str]:
    """What differs between trials, seed included; measure first, then rho, lam and n.

    What each measure has its own value of (ASAM's eta, the half-width of Det-SAM's cube) is told by the measure.
    """
    keys = [
        key
        for key in varied([run.params for run in records])
        if not key.startswith(("tracking.", "checkpoint.")) and (key in FIRST or not _told_by_measure(records, key))
    ]
    return sorted(keys, key=lambda key: (key == SEED, FIRST.get(key, len(FIRST)), key))


def parameter(run: RunRecord, key: str) -> str | None:
    """A setting of a trial; None where it has none, or one that has no effect: the base optimizer's rho."""
    idle = run.params.get("measure") == "sgd" and key.startswith(PERTURBATION)
    return None if idle else run.params.get(key)


def most_varied(records: Sequence[RunRecord], keys: Sequence[str], most: int) -> list[str]:
    """So many of the keys, in their order: first those of `FIRST`, then those with the most values."""
    values = {key: len({parameter(run, key) for run in records}) for key in keys}
    kept = sorted(keys, key=lambda key: (FIRST.get(key, len(FIRST)), -values[key]))[:most]
    return [key for key in keys if key in kept]


def _told_by_measure(records: Sequence[RunRecord], key: str) -> bool:
    values: dict[str | None, set[str | None]] = {}
    for run in records:
        values.setdefault(run.params.get("measure"), set()).add(run.params.get(key))
    return len(values) > 1 and all(len(own) == 1 for own in values.values())


def environment(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(what, value) of the machines and versions; several values are joined."""
    keys = ["git.commit", "git.dirty", "device", *sorted({k for run in records for k in run.tags if "version." in k})]
    told = []
    for key in [*keys, "data.fingerprint"]:
        values = list(dict.fromkeys(run.tags[key] for run in records if key in run.tags))
        if values:
            shown = ", ".join(
                value[:12] if key in ("git.commit", "data.fingerprint") else value for value in values[:4]
            )
            told.append((key.removeprefix("version."), shown + (", ..." if len(values) > 4 else "")))
    counts = sorted({workers(run) for run in records})
    return [*told, ("workers a trial", ", ".join(map(str, counts)))]
