"""Settings side by side at equal budgets, and each against a baseline seed by seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray_jobs.errors import ConfigError, RunError
from ray_jobs.explain import nearest
from ray_jobs.formatting import short
from ray_jobs.results import (
    FEW_SEEDS,
    Interval,
    Paired,
    RunRecord,
    Setting,
    better_is_more,
    common_budget,
    holm,
    interval,
    paired,
    selection_metric,
    settings,
)

# What must be equal for two numbers to answer the same question.
PROBLEM = ("data.name", "data.fraction", "data.label_noise", "data.augment", "model.name", "model.width", "model.depth")


@dataclass(frozen=True)
class Row:
    """A setting at the budget.

    Attributes:
        interval: of the metric over the seeds that count; None: none does.
        seeds: that count at the budget. seeds_run: that were run.
        epochs, gradient_evaluations, seconds: where it was read, mean over its seeds; NaN where not reported.
        chosen_from: settings that it is the best of, by validation; 1: it was not chosen.
        versus: against the baseline; None: there is none, it is the baseline, or they share no seed.
    """

    setting: Setting
    interval: Interval | None
    seeds: int
    seeds_run: int
    epochs: float
    gradient_evaluations: float
    seconds: float
    chosen_from: int = 1
    versus: Paired | None = None

    @property
    def name(self) -> str:
        """Its setting in short words."""
        return self.setting.label


@dataclass(frozen=True)
class Comparison:
    """The settings of one problem, best first.

    Attributes:
        problem: data and model in words; "" where all runs have the same.
        budget: that each run is read within; None: each is read at its end.
        baseline: label of the setting that the others are tested against.
        notes: what one must know to read the numbers.
    """

    problem: str
    metric: str
    axis: str
    budget: float | None
    rows: tuple[Row, ...]
    baseline: str | None
    notes: tuple[str, ...]


def problems(records: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by what they learn, in order of appearance; named by what tells the problems apart."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(tuple(record.params.get(key, "") for key in PROBLEM), []).append(record)
    telling = [i for i in range(len(PROBLEM)) if len({key[i] for key in groups}) > 1]
    return {
        " ".join(filter(None, (_words(PROBLEM[i], key[i]) for i in telling))): group for key, group in groups.items()
    }


def _words(key: str, value: str) -> str:
    if key == "data.fraction":
        return "" if float(value or 1) == 1 else f"{100 * float(value):g} % of the data"
    if key == "data.label_noise":
        return "" if float(value or 0) == 0 else f"{100 * float(value):g} % of labels wrong"
    plain = key in ("data.name", "model.name") or value in ("", "none")
    return value.replace("none", "") if plain else f"{short(key)} {value}"


def compare(
    records: Sequence[RunRecord],
    metric: str = "accuracy/test",
    axis: str = "epochs",
    budget: float | None = None,
    by: Sequence[str] = (),
    baseline: str | None = None,
) -> list[Comparison]:
    """One comparison for each problem, Holm's correction over all of them.

    Args:
        metric: what is compared. Where several settings stand for one value of `by`, the one with the best mean of the
            same metric on validation data, at the same budget, does.
        axis: epochs, gradient_evaluations or seconds.
        budget: on the axis; None: what the finished run with the least of it has.
        by: parameters; one row for each of their values. (): a row for each setting.
        baseline: label, measure or run name of the setting that the others are tested against.

    Raises:
        ConfigError: a metric, a parameter or a baseline that these runs do not have.
        RunError: no run is finished, or none has come as far as the budget.
    """
    if not records:
        raise RunError("there are no runs to compare")
    _check_metric(records, metric)
    keys = [resolved(records, key) for key in by]
    if budget is None and not any(run.status == "FINISHED" for run in records):
        raise RunError(
            f"none of these {len(records)} runs is finished; to compare what they have so far, say --budget with --at"
        )
    done = [_compare(name, group, metric, axis, budget, keys, baseline) for name, group in problems(records).items()]
    if baseline is not None and all(comparison.baseline is None for comparison in done):
        labels = sorted({row.setting.label for comparison in done for row in comparison.rows})
        raise ConfigError(
            f"no setting is called {baseline!r}.{nearest(baseline, labels)} Settings: {'; '.join(labels)}"
        )
    if all(row.interval is None for comparison in done for row in comparison.rows):
        raise RunError(f"no run has {metric} within {budget:g} {axis.replace('_', ' ')}" if budget else f"no {metric}")
    return _corrected(done)


def _compare(
    problem: str,
    records: Sequence[RunRecord],
    metric: str,
    axis: str,
    budget: float | None,
    keys: Sequence[str],
    baseline: str | None,
) -> Comparison:
    limit = budget if budget is not None else common_budget(records, axis)
    found = settings(records)
    chosen = _chosen(found, keys, metric, axis, limit) if keys else [(setting, 1) for setting in found]
    base = _baseline([setting for setting, _ in chosen], baseline)
    rows = [_row(setting, metric, axis, limit, count, base) for setting, count in chosen]
    sign = -1 if better_is_more(metric) else 1
    rows.sort(key=lambda row: math.inf if row.interval is None else sign * row.interval.mean)
    notes = _notes(rows, metric, bool(keys), base)
    return Comparison(problem, metric, axis, limit, tuple(rows), None if base is None else base.label, tuple(notes))


def _chosen(
    found: Sequence[Setting], keys: Sequence[str], metric: str, axis: str, budget: float | None
) -> list[tuple[Setting, int]]:
    """The best setting for each value of the keys, and how many it was chosen from."""
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for setting in found:
        groups.setdefault(tuple(setting.params.get(key, "-") for key in keys), []).append(setting)
    choose = selection_metric(metric)
    return [(best(group, choose, better_is_more(choose), axis, budget), len(group)) for group in groups.values()]


def best(
    group: Sequence[Setting], metric: str, more: bool, axis: str = "epochs", budget: float | None = None
) -> Setting:
    """The setting with the best mean, of those with the most seeds that count: one lucky seed of five must not win.

    Args:
        more: whether more of the metric is better.
    """

    def rank(setting: Setting) -> tuple[int, float]:
        values = setting.values(metric, axis, budget)
        mean = math.fsum(values.values()) / len(values) if values else 0.0
        return -len(values), -mean if more else mean

    return min(group, key=rank)


def _baseline(found: Sequence[Setting], name: str | None) -> Setting | None:
    if name is None:
        return None
    for fits in (
        [s for s in found if s.label == name],
        [s for s in found if s.measure == name],
        [s for s in found if any(run.name == name for run in s.runs)],
    ):
        if len(fits) > 1:
            labels = "; ".join(setting.label for setting in fits)
            raise ConfigError(f"--baseline {name}: {len(fits)} settings are called so: {labels}. Say one of these")
        if fits:
            return fits[0]
    return None


def _row(setting: Setting, metric: str, axis: str, budget: float | None, chosen_from: int, base: Setting | None) -> Row:
    values = setting.values(metric, axis, budget)
    runs = [setting.by_seed[seed] for seed in values]
    epochs = [run.epoch_within(axis, budget) for run in runs]

    def reached(cost: str) -> float:
        read = [run.at(cost, "epochs", epoch) for run, epoch in zip(runs, epochs, strict=True)]
        return _mean([value for value in read if value is not None])

    return Row(
        setting=setting,
        interval=interval(list(values.values())) if values else None,
        seeds=len(values),
        seeds_run=len(setting.by_seed),
        epochs=_mean([float(epoch) for epoch in epochs if epoch is not None]),
        gradient_evaluations=reached("gradient_evaluations"),
        seconds=reached("seconds"),
        chosen_from=chosen_from,
        versus=paired(setting, base, metric, axis, budget) if base is not None and base is not setting else None,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction over every test that was made."""
    tests = [row.versus for comparison in comparisons for row in comparison.rows if row.versus is not None]
    adjusted = iter(holm([test.p for test in tests]))
    return [
        dataclasses.replace(
            comparison,
            rows=tuple(
                row
                if row.versus is None
                else dataclasses.replace(row, versus=dataclasses.replace(row.versus, p_holm=next(adjusted)))
                for row in comparison.rows
            ),
        )
        for comparison in comparisons
    ]


# what one must know to read the numbers


def _notes(rows: Sequence[Row], metric: str, by: bool, base: Setting | None) -> list[str]:
    notes = []
    counted = [row.seeds for row in rows if row.seeds]
    few = min(counted, default=0)
    if few == 1:
        single = sum(seeds == 1 for seeds in counted)
        notes.append(
            f"One seed says nothing about how far another would land: {single} of {len(counted)} settings have no "
            f"interval. Run {FEW_SEEDS} seeds or more."
        )
    several = [seeds for seeds in counted if seeds > 1]
    if several and min(several) < FEW_SEEDS:
        notes.append(
            f"{min(several)} seeds are few: an interval over them is {_width(min(several)):.1f} standard deviations "
            f"to each side, and only differences beyond that can be told from chance. Run {FEW_SEEDS} seeds or more."
        )
    lost = [row for row in rows if row.seeds and row.seeds < row.seeds_run]
    if lost:
        names = _listed([f"{row.name}: {row.seeds} of {row.seeds_run}" for row in lost])
        notes.append(
            "Seeds that failed, were stopped or are not done do not count, so these means are of those that got "
            f"through, and may flatter: {names}."
        )
    absent = sum(not row.seeds for row in rows)
    if absent:
        notes.append(f"{absent} of {len(rows)} settings have no run that came as far as the budget.")
    if by and any(row.chosen_from > 1 for row in rows):
        notes.append(f"Each row is the best of its settings by {selection_metric(metric)} at the same budget.")
    if base is not None:
        notes += _pairing_notes(rows, base)
    return notes


def _pairing_notes(rows: Sequence[Row], base: Setting) -> list[str]:
    tested = [row for row in rows if row.setting is not base and row.seeds]
    unpaired = [row.name for row in tested if row.versus is None]
    single = [row.name for row in tested if row.versus is not None and row.versus.n == 1]
    alike = [row.name for row in tested if row.versus is not None and row.versus.n > 1 and math.isnan(row.versus.p)]
    told = {
        f"No difference to {base.label} without a seed that both have": unpaired,
        f"No test against {base.label} with a single seed that both have": single,
        f"No test against {base.label} where all seeds differ by the very same": alike,
    }
    return [f"{what}: {_listed(names)}." for what, names in told.items() if names]


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:4]) + (f"; and {len(names) - 4} more" if len(names) > 4 else "")


def _width(n: int) -> float:
    """Half-width of a 95 % interval over n seeds, in standard deviations."""
    base = [float(i) for i in range(n)]
    over = interval(base)
    deviation = math.sqrt(math.fsum((x - over.mean) ** 2 for x in base) / (n - 1))
    return over.half_width / deviation


# names that people type


def resolved(records: Sequence[RunRecord], key: str) -> str:
    """A parameter's whole key, by itself or by its last word: lr -> optimizer.base.lr.

    Raises:
        ConfigError: there is none, or several.
    """
    known = sorted({name for record in records for name in record.params})
    if key in known:
        return key
    alias = {"n": "n_samples", "data": "data.name", "model": "model.name", "s": "strength"}.get(key)
    if alias in known:
        return str(alias)
    fits = [name for name in known if name.endswith(f".{key}")]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(f"--by {key}: {' and '.join(fits)} end so; say which")
    raise ConfigError(f"--by {key}: these runs have no such parameter.{nearest(key, known)}")


def _check_metric(records: Sequence[RunRecord], metric: str) -> None:
    known = sorted({name for record in records for name in record.reported.union(record.curves)})
    if not any(metric in record.curves for record in records):
        raise ConfigError(
            f"none of these runs reports {metric!r}.{nearest(metric, known)} Reported: {', '.join(known) or 'nothing'}"
        )
