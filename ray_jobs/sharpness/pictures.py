"""What a measurement leaves in a run beside its metrics: pictures (PNG, SVG) and the numbers behind them (CSV)."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phisam.sharpness import Density
from ray_jobs.figures import style
from ray_jobs.figures.curves import Band, draw_bands
from ray_jobs.figures.density import density_figure
from ray_jobs.tracking.tracker import Tracker

FOLDER = "sharpness"  # of the run's artifacts
PREFIX, ERROR = "hessian/", ".standard_error"


def log_curves(tracker: Tracker, title: str, history: Sequence[Mapping[str, Any]]) -> None:
    """A picture of each measured metric against epochs, with a band of one standard error, into the run.

    Raises:
        RunError: MLflow does not take them.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in sorted({key for metrics in history for key in metrics if f"{key}{ERROR}" in metrics}):
            paths += _curve(title, name, history, Path(folder))
        tracker.log_files(paths, FOLDER)


def _curve(title: str, name: str, history: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    rows = [(m["epoch"], m[name], m[f"{name}{ERROR}"]) for m in history if name in m]
    epochs, values, errors = zip(*rows, strict=True)
    low, high = (tuple(v + sign * e for v, e in zip(values, errors, strict=True)) for sign in (-1, 1))
    short = name.removeprefix(PREFIX)
    with style.styled():
        figure = style.figure(6.4, 3.8)
        panel = figure.subplots()
        draw_bands(panel, {"value, one standard error around it": Band(epochs, values, low, high, (1,) * len(epochs))})
        if min(low) > 0 and max(high) > 20 * min(low):
            panel.set_yscale("log")
        panel.set_ylabel(short.replace("_", " "))
        panel.legend()
        style.title(panel, title)
    return style.save(figure, folder, short)


def write_density(density: Density, title: str, folder: Path, name: str) -> list[Path]:
    """folder/name.csv, .png and .svg. CSV: probe, node, weight; a probe's weights sum to 1, all of them to the probes.

    Raises:
        RunError: the folder cannot be written.
    """
    paths = style.save(density_figure(density, title), folder, name)
    table = folder / f"{name}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["probe", "node", "weight"])
        for probe, (nodes, weights) in enumerate(zip(density.nodes.tolist(), density.weights.tolist(), strict=True)):
            used = range(int(density.steps[probe]))
            writer.writerows((probe, repr(nodes[k]), repr(weights[k])) for k in used)
    return [*paths, table]
