"""What people read: tables that are Markdown and fit a terminal, a CSV file, a plot."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch

import phisam
from ray_jobs.bench.breakdown import OTHER, PARTS
from ray_jobs.bench.cell import Row
from ray_jobs.errors import ConfigError

Environment = dict[str, str]

SHOWN_PARTS = [part for part in PARTS if part != "guards"]  # the table has no room for all: guards count as other


def text(rows: Sequence[Row], environment: Mapping[str, str]) -> str:
    """All tables."""
    lines = [f"{name}: {value}" for name, value in environment.items()]
    lines.append("Ratios: medians of a step's time over that of the SGD steps just before and after it.")
    for _, group in groupby(rows, key=lambda row: (row.model, row.workers)):
        cell = list(group)
        lines += ["", heading(cell), "", *ratio_table(cell), "", "Where the time goes, in % of one SGD step:", ""]
        lines += parts_table(cell)
    return "\n".join(lines)


def heading(cell: Sequence[Row]) -> str:
    """What a cell is, and the step that all others are divided by."""
    sgd = cell[0]
    workers = f"{sgd.workers} workers" if sgd.workers > 1 else "1 worker"
    return (
        f"## {sgd.model}, batch {sgd.batch}, {workers}\n\n"
        f"d = {sgd.d:,} ({4 * sgd.d / 1e6:.1f} MB). One SGD step: {_seconds(sgd.seconds.median)} of {sgd.clock} "
        f"({_seconds(sgd.seconds.low)} to {_seconds(sgd.seconds.high)}), {sgd.rounds} rounds."
    )


def ratio_table(cell: Sequence[Row]) -> list[str]:
    """A line a method."""
    several = cell[0].workers > 1
    header = ["step", "ratio", "quartiles", "limit", "over", *(["all-reduced"] if several else []), "memory"]
    lines = []
    for row in cell:
        ratio = row.ratio
        line = [row.method, f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}", f"{row.limit:.2f}"]
        line.append("" if row.kind == "sgd" else f"{100 * (ratio.median / row.limit - 1):+.1f} %")
        if several:
            line.append(f"{row.all_reduced_bytes / (4 * row.d):.2f} d in {row.all_reduces}" if row.all_reduces else "0")
        line.append("" if row.memory is None else f"{row.memory:.1f} d".replace("-0.0", "0.0"))
        lines.append(line)
    return markdown(header, lines)


def parts_table(cell: Sequence[Row]) -> list[str]:
    """A line for each method that was broken down."""
    lines = []
    for row in cell:
        if row.parts:
            shown = {part: row.parts[part] for part in SHOWN_PARTS}
            shown[OTHER] = sum(row.parts.values()) - sum(shown.values())
            lines.append([row.method, *(f"{100 * share:.1f}" for share in shown.values())])
    return markdown(["step", *SHOWN_PARTS, OTHER], lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table, its first column to the left and the others to the right, padded so that a terminal shows it too."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]

    def drawn(line: Sequence[str]) -> str:
        padded = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])])
    return [drawn(cells[0]), f"|{rule}|", *map(drawn, cells[1:])]


def write_csv(rows: Sequence[Row], environment: Mapping[str, str], path: Path) -> None:
    """A line a method: every number of `Row`, its parts in SGD steps, and the environment."""
    with path.open("w", newline="") as file:
        lines = [{**flat(row), **environment} for row in rows]
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def flat(row: Row) -> dict[str, object]:
    """A row of the CSV file. An empty cell: not measured."""
    plain = {name: value for name, value in vars(row).items() if name not in ("seconds", "ratio", "parts")}
    for name, spread in (("seconds", row.seconds), ("ratio", row.ratio)):
        plain |= {f"{name}_{quantile}": value for quantile, value in vars(spread).items()}
    return plain | {f"part_{part}": row.parts.get(part, "") for part in [*PARTS, OTHER]}


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Ratio against n, a panel for each network, with its quartiles and the limit (n + 1) / workers.

    Raises:
        ConfigError: matplotlib is missing, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("bench --plot needs matplotlib: pip install matplotlib") from error
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(6 * len(models), 4.5), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_model = [row for row in rows if row.model == model]
        for color, workers in enumerate(dict.fromkeys(row.workers for row in of_model)):
            for kind, style in (("phisam", "-o"), ("naive", ":x"), ("pytorch_optimizer", "^")):
                points = [r for r in of_model if r.workers == workers and r.kind == kind and r.method != "sam"]
                if not points:
                    continue
                n, median = [r.n_samples for r in points], [r.ratio.median for r in points]
                low = [r.ratio.median - r.ratio.low for r in points]
                high = [r.ratio.high - r.ratio.median for r in points]
                label = f"{points[0].method if kind == 'pytorch_optimizer' else kind}, {workers} worker(s)"
                panel.errorbar(n, median, yerr=[low, high], fmt=style, color=f"C{color}", capsize=3, label=label)
                if kind == "phisam":
                    limits = [r.limit for r in points]
                    panel.plot(n, limits, "--", color=f"C{color}", label=f"limit, {workers} worker(s)")
        panel.set(title=f"{model}, d = {of_model[0].d:,}", xlabel="n", ylabel="time of a step / time of an SGD step")
        panel.set_xticks(sorted({row.n_samples for row in of_model} - {0}))
        panel.set_ylim(bottom=0)
        panel.legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"bench --plot {path}: {error}") from error


def environment(device: str) -> Environment:
    """What the numbers depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    others = "; other programs were at work: wall times are too long" if load > 0.5 else ""
    return {
        "phisam": phisam.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "CPU": f"{_cpu_name()}, {cores} cores, one thread a worker",
        "load before": f"{load:.1f}{others}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
