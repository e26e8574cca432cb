"""What `phisam sweep --dry-run` prints: the trials, how many they are, and the gradient evaluations that they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_jobs.config import RunConfig
from ray_jobs.formatting import brief, short_names
from ray_jobs.sweep.check import MAX_RUNGS
from ray_jobs.sweep.config import SweepConfig
from ray_jobs.sweep.cost import evaluations, steps_per_epoch
from ray_jobs.sweep.rungs import RungRule
from ray_jobs.sweep.search import Search, make_search
from ray_jobs.sweep.sections import SEED, NoStopping, TpeSearch
from ray_jobs.sweep.space import values_of
from ray_jobs.sweep.stopping import Population, make_stopping
from ray_jobs.sweep.variety import data_titles, variety


@dataclass(frozen=True)
class _Row:
    """The trials of a setting."""

    trials: str
    values: dict[str, Any]
    config: RunConfig

    @property
    def cost(self) -> float:
        """Gradient evaluations of one of them."""
        return evaluations(self.config)


def preview(sweep: SweepConfig, max_concurrent: int | None) -> str:
    """The text, without a line break at its end.

    max_concurrent: trials at once; None: what the cluster will have place for.

    Raises:
        ConfigError: an imagefolder that cannot be counted.
    """
    search = make_search(sweep, max_concurrent or 1)
    rows = list(_known(sweep, search))
    unknown = search.n_settings - len(rows)
    lines = [*_head(sweep, search), "", *_table(rows)]
    if unknown:
        first = len(rows) * max(1, len(sweep.seeds))
        lines.append(f"{first}-{search.n_trials - 1}: chosen by TPE from the results of those before")
    return "\n".join([*lines, "", *_foot(sweep, rows, unknown, max_concurrent)])


def _known(sweep: SweepConfig, search: Search) -> Iterator[_Row]:
    """The settings that do not depend on results."""
    n_seeds = max(1, len(sweep.seeds))
    for setting in range(search.n_settings):
        first = setting * n_seeds
        if isinstance(sweep.search, TpeSearch):
            if setting >= sweep.search.startup * search.n_cells:
                return
            values = search.suggest(first, dict.fromkeys(search.needs(first)))
        else:
            values = search.suggest(first, {})
        trials = str(first) if n_seeds == 1 else f"{first}-{first + n_seeds - 1}"
        yield _Row(trials, values, sweep.trial(values, first))


def _head(sweep: SweepConfig, search: Search) -> Iterator[str]:
    seeds = f" x {len(sweep.seeds)} seeds ({', '.join(map(str, sweep.seeds))})" if sweep.seeds else ""
    yield f"{sweep.name}: {search.n_trials} trials = {search.n_settings} settings{seeds}, {sweep.search.name} search"
    yield f"Judged by {sweep.metric} ({sweep.mode}) at the last epoch. Each trial gets {_budget(sweep)}."
    if len(titles := data_titles(sweep)) > 1:
        yield f"On {len(titles)} data sets ({', '.join(titles)}), with a winner on each."
    stopping = make_stopping(sweep)
    if isinstance(stopping, Population):
        yield f"pbt: generations end at {_levels(stopping.boundaries)} {_axis(sweep)}."
    elif isinstance(stopping, RungRule):
        levels = list(itertools.islice(stopping.rungs(), MAX_RUNGS))
        yield f"{stopping.name}: rungs at {_levels(levels)} {_axis(sweep)}."
    if sweep.metric.endswith("test"):
        yield f"Note: the winner is chosen by the test set, so that its {sweep.metric} is no estimate of anything."


def _budget(sweep: SweepConfig) -> str:
    if sweep.budget is not None:
        return f"{sweep.budget:,g} {_axis(sweep)}"
    if sweep.resource == "gradient_evaluations":
        return "the gradient evaluations that training.epochs cost the base optimizer"
    return "the epochs of its run"


def _axis(sweep: SweepConfig) -> str:
    return sweep.resource.replace("_", " ")


def _levels(levels: Sequence[float]) -> str:
    shown_levels = [f"{level:,g}" for level in levels]
    return ", ".join(shown_levels if len(levels) <= 8 else [*shown_levels[:6], "...", shown_levels[-1]])


def _table(rows: Sequence[_Row]) -> Iterator[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row.values if key != SEED))
    cells = [["trials", *short_names(keys), "epochs", "evaluations a step", "gradient evaluations"]]
    for row in rows:
        values = ["" if key not in row.values else brief(row.values[key], digits=6) for key in keys]
        epochs, steps = row.config.training.epochs, steps_per_epoch(row.config)
        per_step = row.cost / (epochs * steps) if epochs * steps else 0.0
        cells.append([row.trials, *values, f"{epochs}", f"{per_step:.4g}", f"{row.cost:,.0f}"])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        words = [
            word.rjust(w) if i > len(keys) else word.ljust(w)
            for i, (word, w) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(words).rstrip()


def _foot(sweep: SweepConfig, rows: Sequence[_Row], unknown: int, max_concurrent: int | None) -> Iterator[str]:
    n_seeds = max(1, len(sweep.seeds))
    total = sum(row.cost for row in rows)
    if unknown:
        configs = [sweep.trial(values_of(picks), 0) for picks in sweep.corners()]
        total += unknown * max(evaluations(config) for config in configs)
    least = unknown or not isinstance(sweep.stopping, NoStopping) or sweep.resource == "seconds"
    yield f"In all {'at most ' if least else ''}{total * n_seeds:,.0f} gradient evaluations."
    workers = sorted({config.scaling.most_workers for config in variety(sweep, "scaling")})
    told = " or ".join(map(str, workers))
    at_once = "as many trials at once as the cluster has place for"
    if max_concurrent is not None:
        at_once = f"{max_concurrent} trials at once" if max_concurrent > 1 else "one trial at a time"
    yield f"{told} {'worker' if workers == [1] else 'workers'} a trial, {at_once}."
