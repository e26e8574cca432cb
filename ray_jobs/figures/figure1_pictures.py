"""Figure 1 drawn: squared Frobenius norm against epoch, and against training loss, methods left, strengths right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ray_jobs.figures import style
from ray_jobs.figures.curves import draw_bands
from ray_jobs.figures.figure1 import METHODS, strengths_panel
from ray_jobs.figures.figure1_table import LOSS, NORM, Curves

NORM_LABEL = "squared Frobenius norm, mean ‖Hz‖²"


def pictures(curves: Mapping[str, Curves], strengths: Sequence[float], data: str, folder: Path) -> list[Path]:
    """Writes figure1-DATA and figure1-DATA-loss as PNG and SVG. curves: setting's key -> its runs."""
    panels = {}
    for title, settings in (("Methods", METHODS), ("Strengths of Frob-SAM, s = λρ²", strengths_panel(strengths))):
        panels[title] = {setting.label: curves[setting.key] for setting in settings if setting.key in curves}
    drawn = {"": against_epoch(panels, data), "-loss": against_loss(panels, data)}
    return [path for end, figure in drawn.items() for path in style.save(figure, folder, f"figure1-{data}{end}")]


def against_epoch(panels: Mapping[str, Mapping[str, Curves]], data: str) -> Figure:
    """Above, the norm after each epoch with bands over seeds; below, the training loss, which the norm follows."""
    with style.styled():
        figure = style.figure(11.5, 6.6)
        axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[2.2, 1])
        for column, (title, panel) in enumerate(panels.items()):
            for row, metric in enumerate((NORM, LOSS)):
                bands = {label: curves.band(metric) for label, curves in panel.items()}
                draw_bands(axes[row][column], bands)
                axes[row][column].set_yscale("log")
            axes[0][column].set_xlabel("")
            style.title(axes[0][column], title)
            _legend(axes[0][column])
        axes[0][0].set_ylabel(NORM_LABEL)
        axes[1][0].set_ylabel("training loss")
        figure.suptitle(_about(panels, data), fontsize=10, color="#444444")
    return figure


def against_loss(panels: Mapping[str, Mapping[str, Curves]], data: str) -> Figure:
    """The norm against the training loss of the same epoch: methods compared where they fit the data equally well."""
    with style.styled():
        figure = style.figure(11.5, 4.6)
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        for panel, (title, of_panel) in zip(axes, panels.items(), strict=True):
            for index, (label, curves) in enumerate(of_panel.items()):
                loss, norm = (curves.band(metric).mean for metric in (LOSS, NORM))
                panel.plot(loss, norm, label=label, marker="o", markersize=2.5, **style.look(index))
                panel.plot(loss[-1:], norm[-1:], marker="o", markersize=6, color=style.COLORS[index % 8])
            panel.set(xscale="log", yscale="log", xlabel="training loss")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            style.title(panel, title)
            _legend(panel, "lower left")  # training begins at the left, with the largest norms
        axes[0].invert_xaxis()  # training goes to the right; shared with the other panel
        axes[0].set_ylabel(NORM_LABEL)
        figure.suptitle(f"{_about(panels, data)}; large dots: the last epoch", fontsize=10, color="#444444")
    return figure


def _legend(panel: Axes, where: Literal["best", "lower left"] = "best") -> None:
    panel.legend(ncols=2, loc=where, handlelength=2.6)


def _about(panels: Mapping[str, Mapping[str, Curves]], data: str) -> str:
    seeds = sorted({len(curves.records) for panel in panels.values() for curves in panel.values()})
    counted = " to ".join(map(str, [seeds[0], seeds[-1]] if len(seeds) > 1 else seeds))
    over = "one seed ± one standard error of its probes"
    if seeds != [1]:
        over = f"geometric mean ± one standard error over {counted} seeds"
    return f"{data}, ReLU network of 6 layers of 128, Adam; {over}"
