"""Comparisons as people want them: in the terminal, in Markdown, as CSV, as a LaTeX table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_jobs.compare import Comparison, Row
from ray_jobs.formatting import axis_value, difference, p_value, shown, shown_interval
from ray_jobs.whole_table import print_whole

Cells = list[str]


def print_table(comparisons: Sequence[Comparison], console: Console) -> None:
    """A table for each problem, its notes below."""
    for i, done in enumerate(comparisons):
        if i:
            console.print()
        console.print(Text(heading(done)), soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for place, name in enumerate(head(done)):
            table.add_column(name, justify="right" if place else "left", no_wrap=True)
        for row in done.rows:
            table.add_row(*map(Text, cells(row, done)))
        print_whole(table, console)
        for note in done.notes:
            console.print(Text(f"Note: {note}"))


def heading(done: Comparison) -> str:
    """What is compared, and where it was read."""
    what = f"{done.problem}: {done.metric}" if done.problem else done.metric
    if done.budget is None:
        return what
    unit = {"seconds": " of training", "gradient_evaluations": " gradient evaluations"}.get(done.axis, " epochs")
    return f"{what} within {axis_value(done.axis, done.budget)}{unit}"


def head(done: Comparison) -> Cells:
    """Columns of the tables for people."""
    names = ["setting", "mean", "95 % interval", "seeds"]
    if done.baseline is not None:
        names += [f"- {done.baseline}", "95 % interval", "p", "p (Holm)"]
    return [*names, "epochs", "evaluations", "time"]


def cells(row: Row, done: Comparison) -> Cells:
    """A row under `head`."""
    over = row.interval
    told = [
        row.name,
        *(["-", "-"] if over is None else [shown(done.metric, over.mean), shown_interval(done.metric, over)]),
    ]
    told.append(str(row.seeds) if row.seeds == row.seeds_run else f"{row.seeds} of {row.seeds_run}")
    if done.baseline is not None:
        told += _versus(row, done.metric)
    epochs = f"{row.epochs:.4g}" if math.isfinite(row.epochs) else "-"
    return [
        *told,
        epochs,
        axis_value("gradient_evaluations", row.gradient_evaluations),
        axis_value("seconds", row.seconds),
    ]


def _versus(row: Row, metric: str) -> Cells:
    test = row.versus
    if test is None:
        return ["-"] * 4
    over = test.interval
    ends = "-" if over.n == 1 else f"{difference(metric, over.low)} to {difference(metric, over.high)}"
    return [difference(metric, test.difference), ends, p_value(test.p), p_value(test.p_holm)]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """GitHub's tables, with headings and notes."""
    return "\n\n".join(map(_markdown, comparisons))


def _markdown(done: Comparison) -> str:
    names = head(done)
    lines = [f"{heading(done)}:", "", f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    lines += [f"| {' | '.join(cells(row, done))} |" for row in done.rows]
    notes = [f"- {note}" for note in done.notes]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def latex(comparisons: Sequence[Comparison]) -> str:
    """Mean and half-width of the interval in one column, as papers have it. Needs the package booktabs."""
    return "\n\n".join(map(_latex, comparisons))


def _latex(done: Comparison) -> str:
    names = ["setting", _escaped(done.metric), "seeds"] + (["$p$ (Holm)"] if done.baseline is not None else [])
    lines = [f"% {heading(done)}; mean and half-width of the 95 % t-interval over seeds"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule", " & ".join(names) + r" \\", r"\midrule"]
    for row in done.rows:
        told = [_escaped(row.name), _pm(row, done.metric), str(row.seeds)]
        if done.baseline is not None:
            told.append("--" if row.versus is None else _escaped(p_value(row.versus.p_holm)).replace("<", "$<$"))
        lines.append(" & ".join(told) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in done.notes)])


def _pm(row: Row, metric: str) -> str:
    over = row.interval
    if over is None:
        return "--"
    scale, digits = (100, ".2f") if metric.startswith("accuracy") else (1, ".3g")
    mean = f"{scale * over.mean:{digits}}"
    return f"${mean}$" if over.n == 1 else rf"${mean} \pm {scale * over.half_width:{digits}}$"


def _escaped(text: str) -> str:
    signs = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    signs |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(signs.get(letter, letter) for letter in text)


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """One table with every digit, accuracies from 0 to 1; notes are left out."""
    rows = [_record(row, done) for done in comparisons for row in done.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _record(row: Row, done: Comparison) -> dict[str, str | int | float]:
    over, test = row.interval, row.versus
    record: dict[str, str | int | float | None] = {
        "problem": done.problem,
        "setting": row.name,
        "metric": done.metric,
        "axis": done.axis,
        "budget": done.budget,
        "mean": None if over is None else over.mean,
        "low": None if over is None else over.low,
        "high": None if over is None else over.high,
        "seeds": row.seeds,
        "seeds_run": row.seeds_run,
        "baseline": done.baseline,
        "difference": None if test is None else test.difference,
        "difference_low": None if test is None else test.interval.low,
        "difference_high": None if test is None else test.interval.high,
        "pairs": None if test is None else test.n,
        "p": None if test is None else test.p,
        "p_holm": None if test is None else test.p_holm,
        "epochs": row.epochs,
        "gradient_evaluations": row.gradient_evaluations,
        "seconds": row.seconds,
    }
    return {key: "" if value is None or value != value else value for key, value in record.items()}


TEXTS: Mapping[str, Callable[[Sequence[Comparison]], str]] = {"markdown": markdown, "csv": as_csv, "latex": latex}
