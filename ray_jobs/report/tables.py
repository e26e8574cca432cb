"""The page's tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ray_jobs.compare import Comparison, Row
from ray_jobs.formatting import axis_value, brief, difference, p_value, short, short_names, shown, shown_interval
from ray_jobs.report import content
from ray_jobs.report.content import TEST, Method
from ray_jobs.report.plots import title
from ray_jobs.results import Interval, RunRecord, Setting, interval


def winner(setting: Setting | None, metric: str, settings: int) -> dict[str, Any] | None:
    """The cards at the top; None where no run is finished."""
    if setting is None:
        return None
    keys = [key for key in ("rho", "lam", "n_samples", "strength") if key in setting.params]
    seeds = len(setting.values(metric))
    where = ", ".join(f"{short(key)} = {brief(setting.params[key])}" for key in keys)
    runs = f"{seeds} seed{'s' * (seeds != 1)}"
    cards = []
    for name in dict.fromkeys([TEST, metric]):
        values = list(setting.values(name).values())
        if values:
            over = interval(values)
            cards.append({"label": title(name), "value": shown(name, over.mean), "aside": _spread(name, over)})
    return {
        "by": title(metric),
        "of": f"{settings} settings" if settings > 1 else "one setting",
        "label": setting.measure,
        "where": f"{where}; {runs}" if where else runs,  # the base optimizer has no rho
        "cards": cards,
    }


def _spread(metric: str, over: Interval) -> str:
    if over.n == 1:
        return "one seed: no interval"
    return f"{shown(metric, over.low)} to {shown(metric, over.high)} over {over.n} seeds"


def methods(name: str, done: Comparison, found: Sequence[Method]) -> dict[str, Any]:
    """One comparison as the template wants it."""
    series = {id_: method for method in found for id_ in (run.run_id for run in method.setting.runs)}
    intervals = [row.interval for row in done.rows if row.interval is not None]
    ends = [x for over in intervals for x in (over.mean, over.low, over.high) if math.isfinite(x)]
    head = ["method", title(done.metric), "mean", "95 % interval", "seeds"]
    if done.baseline is not None:
        head += [f"against {done.baseline.split()[0]}", "p (Holm)"]
    head += ["epochs", "evaluations", "time"]
    rows = []
    for row in done.rows:
        method = series[row.setting.runs[0].run_id]
        rows.append(
            {
                "label": method.label,
                "series": method.series,
                "range": _range(row.interval, ends, method.series),
                "cells": _cells(row, done),
            }
        )
    budget = (
        "each run at its end"
        if done.budget is None
        else f"each run at its last epoch within {axis_value(done.axis, done.budget)}"
    )
    return {
        "id": name,
        "title": done.axis.replace("_", " ").replace("seconds", "training time"),
        "caption": f"{title(done.metric).capitalize()}, {budget}.",
        "head": head,
        "rows": rows,
        "notes": done.notes,
    }


def _cells(row: Row, done: Comparison) -> list[str]:
    over = row.interval
    cells = ["-", "-"] if over is None else [shown(done.metric, over.mean), shown_interval(done.metric, over)]
    cells.append(str(row.seeds) if row.seeds == row.seeds_run else f"{row.seeds} of {row.seeds_run}")
    if done.baseline is not None:
        test = row.versus
        cells += ["-", "-"] if test is None else [difference(done.metric, test.difference), p_value(test.p_holm)]
    cells += [f"{row.epochs:.4g}" if math.isfinite(row.epochs) else "-"]
    cells += [axis_value(axis, getattr(row, axis)) for axis in ("gradient_evaluations", "seconds")]
    return cells


def _range(over: Interval | None, ends: Sequence[float], series: int) -> Markup:
    """Mean and interval on the table's common scale; drawn, for the eye alone: the numbers stand beside it."""
    if over is None or not ends:
        return Markup("")
    low, high = min(ends), max(ends)
    scale = 138 / (high - low) if high > low else 0.0

    def at(value: float) -> str:
        return f"{6 + (value - low) * scale:.1f}" if scale else "75"

    line = ""
    if over.n > 1:
        line = f'<line x1="{at(over.low)}" x2="{at(over.high)}" y1="9" y2="9" stroke="var(--series-{series})"/>'
    dot = f'<circle cx="{at(over.mean)}" cy="9" r="5" fill="var(--series-{series})"/>'
    return Markup(f'<svg class="range" viewBox="0 0 150 18" aria-hidden="true">{line}{dot}</svg>')


def stopping_text(records: Sequence[RunRecord]) -> str:
    """What early stopping saved."""
    saved = content.savings(records)
    if not saved.stopped:
        return "No trial was stopped early."
    overrun = (
        f" They had taken {saved.overrun:,.0f} evaluations beyond that epoch while the verdict was pending; these are "
        "counted as spent, and their metrics left out."
        if saved.overrun
        else ""
    )
    return (
        f"{saved.stopped} of {len(records)} trials were stopped. At their own pace to their last epochs they would "
        f"have taken {saved.gradient_evaluations:,.0f} gradient evaluations and {saved.device_hours:.3g} device-hours "
        f"more: {saved.part:.0%} of what the whole sweep would have cost.{overrun}"
    )


def costs(records: Sequence[RunRecord]) -> list[list[str]]:
    """By measure, and in all."""
    groups: dict[str, list[RunRecord]] = {}
    for run in records:
        groups.setdefault(run.params.get("measure", "?"), []).append(run)
    rows = [(measure, content.cost(group)) for measure, group in sorted(groups.items())]
    if len(rows) > 1:
        rows.append(("in all", content.cost(records)))
    return [
        [name, str(spent.trials), f"{spent.gradient_evaluations:,.0f}", f"{spent.device_hours:.3g}"]
        for name, spent in rows
    ]


@dataclass(frozen=True)
class Cell:
    """A cell of the table of trials; sort: what it is sorted by where that is not its text."""

    text: str
    sort: str | None = None
    word: bool = False


def trials(records: Sequence[RunRecord], metric: str) -> tuple[list[str], set[str], list[list[Cell]]]:
    """Headings, those of words, and a row for each trial."""
    keys = content.trial_parameters(records)
    names = short_names(keys)
    sharp = content.sharpness_metric(records)
    metrics = list(dict.fromkeys([metric, TEST, "loss/train", sharp]))
    metrics = [name for name in metrics if any(name in run.curves for run in records)]
    head = ["trial", "state", *names, *map(title, metrics), "epochs", "evaluations", "time", "run"]
    rows = []
    for position, run in enumerate(records):
        number = position if run.trial is None else run.trial
        row = [Cell(str(number)), _state(run)]
        row += [_parameter(content.parameter(run, key)) for key in keys]
        row += [_value(name, run.at(name)) for name in metrics]
        row.append(_plain(run.total("epochs")))
        row.append(_axis("gradient_evaluations", run.spent.get("gradient_evaluations")))
        row.append(_axis("seconds", run.spent.get("seconds")))
        row.append(Cell(run.run_id[:8], word=True))
        rows.append(row)
    words = {"state", "run"} | {head[i] for i in range(len(head)) if rows and all(row[i].word for row in rows)}
    return head, words, rows


def _state(run: RunRecord) -> Cell:
    name = content.state(run)
    if name == "stopped":
        return Cell(f"stopped at {run.tags.get('phisam.stopped_epoch', '?')}", word=True)
    reason = run.tags.get("phisam.failure", "")
    return Cell(f"failed: {reason[:60]}" if name == "failed" and reason else name, word=True)


def _parameter(text: str | None) -> Cell:
    if text is None:
        return Cell("-", sort="", word=False)
    try:
        float(text)
    except ValueError:
        return Cell(text, word=True)
    return Cell(brief(text), sort=text)


def _value(metric: str, value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("-" if value is None else str(value), sort="")
    return Cell(shown(metric, value), sort=f"{value:.6g}")


def _plain(value: float | None) -> Cell:
    return Cell("-", sort="") if value is None else Cell(f"{value:g}")


def _axis(axis: str, value: float | None) -> Cell:
    return Cell("-", sort="") if value is None else Cell(axis_value(axis, value), sort=f"{value:.6g}")


def commands(parent: RunRecord) -> str:
    """What to type for the same sweep, its numbers, and this page."""
    short_id = parent.run_id[:8]
    return "\n".join(
        [
            "# the same sweep again",
            f"mlflow artifacts download --run-id {parent.run_id} --artifact-path sweep.yaml --dst-path .",
            "phisam sweep sweep.yaml",
            "",
            "# its numbers, and this page",
            f"phisam compare {short_id} --at gradient_evaluations --by measure",
            f"phisam report {short_id} --output report.html",
        ]
    )
