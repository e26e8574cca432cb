"""The main figures by matplotlib, for MLflow's artifact pane and for documents."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs import compare
from ray_jobs.formatting import shown
from ray_jobs.report import content, plots
from ray_jobs.report.content import TEST, Method
from ray_jobs.results import RunRecord, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b62c4", "#c2570c", "#0f7f63", "#a33e91", "#8a6d00", "#4b4fb8", "#b3261e", "#4f6272")  # of page.css
STYLES: tuple[Any, ...] = ("-", "-", "--", "-", ":", "--", "-.", (0, (8, 3)))


def summary_plots(parent: RunRecord, trials: Sequence[RunRecord], metric: str, mode: str, folder: Path) -> list[Path]:
    """curves and methods for each problem, each as .png and .svg, in a folder that exists."""
    written: list[Path] = []
    parts = compare.problems(trials)
    for name, records in parts.items():
        found = content.methods(records, metric, mode)
        shown_metric = TEST if any(TEST in run.curves for run in records) else metric
        heading = f"{parent.name}, {name}" if name else parent.name
        suffix = f"-{_file_name(name)}" if name else ""
        for kind, figure in (
            ("curves", _curves(found, shown_metric, heading)),
            ("methods", _methods(found, shown_metric, heading)),
        ):
            for ending in ("png", "svg"):
                path = folder / f"{kind}{suffix}.{ending}"
                figure.savefig(path, dpi=130)
                written.append(path)
    return written


def _file_name(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name).strip("-")


def _blank(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure  # no pyplot: it keeps figures, and wants a screen

    figure = NewFigure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(found: Sequence[Method], metric: str, heading: str) -> Figure:
    figure, axes = _blank(11, 4.2, 2)
    for axis, each in zip(("gradient_evaluations", "seconds"), axes, strict=True):
        late: list[float] = []
        for method in found:
            drawn = content.band(method.setting, metric, axis)
            means = [over.mean for over in drawn.intervals]
            late += means[len(means) // 3 :]
            (line,) = each.plot(drawn.x, means, label=method.label, color=COLOURS[method.series])
            line.set_linestyle(STYLES[method.series])
            if drawn.intervals and all(over.n >= plots.BAND_SEEDS for over in drawn.intervals):
                low, high = ([getattr(over, end) for over in drawn.intervals] for end in ("low", "high"))
                each.fill_between(drawn.x, low, high, color=COLOURS[method.series], alpha=0.14, linewidth=0)
        _finish(each, plots.AXIS_TITLES[axis], metric, late)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{heading}: mean and 95 % band over seeds", fontsize=11)
    return figure


def _finish(axes: Axes, x_title: str, metric: str, late: Sequence[float]) -> None:
    axes.set_xlabel(x_title)
    axes.set_ylabel(plots.title(metric))
    finite = [value for value in late if math.isfinite(value)]
    if finite and max(finite) > min(finite):
        pad = 0.1 * (max(finite) - min(finite))
        axes.set_ylim(min(finite) - pad, max(finite) + pad)
    if metric.startswith("accuracy"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def _methods(found: Sequence[Method], metric: str, heading: str) -> Figure:
    """Mean and interval at the end, best on top."""
    ends = [(method, list(method.setting.values(metric).values())) for method in found]
    done = [(method, interval(values)) for method, values in ends if values]
    figure, (axes,) = _blank(7.5, 1.3 + 0.42 * max(1, len(done)), 1)
    for place, (method, over) in enumerate(reversed(done)):
        reach = over.half_width if over.n > 1 else 0.0
        axes.errorbar(over.mean, place, xerr=reach, fmt="o", color=COLOURS[method.series], capsize=3)
        axes.annotate(
            shown(metric, over.mean), (over.mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(done)), [method.label for method, _ in reversed(done)])
    axes.set_ylim(-0.6, len(done) - 0.2)
    axes.set_xlabel(f"{plots.title(metric)}: mean and 95 % interval over seeds")
    if metric.startswith("accuracy"):
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.set_title(heading, fontsize=11)
    return figure
