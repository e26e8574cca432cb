"""A metric against epochs: a line for each setting, a band of one standard error over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, nan, sqrt
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ray_jobs.figures.style import look


@dataclass(frozen=True)
class Band:
    """A mean over seeds, epoch by epoch, with one standard error below and above it.

    seeds: how many values each mean is over; of one alone there is no error, and low = high = mean.
    """

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: tuple[int, ...]


def band(curves: Sequence[Mapping[int, float]], geometric: bool = False) -> Band:
    """The band over curves (epoch -> value), one for each seed, at every epoch that any of them has.

    geometric: the mean and its standard error are those of the logarithms, so the band is mean x exp(±error). That is
    what a quantity needs that differs between seeds by factors; values must be positive then (others: NaN).
    """
    epochs = sorted({epoch for curve in curves for epoch in curve})
    rows = [_row([curve[epoch] for curve in curves if epoch in curve], geometric) for epoch in epochs]
    mean, low, high, seeds = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Band(tuple(epochs), mean, low, high, seeds)


def _row(values: Sequence[float], geometric: bool) -> tuple[float, float, float, int]:
    if geometric:
        values = [log(value) if value > 0 else nan for value in values]
    center = fmean(values)
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    row = (center, center - error, center + error)
    mean, low, high = map(exp, row) if geometric else row
    return mean, low, high, len(values)


def draw_bands(panel: Axes, bands: Mapping[str, Band], looks: Mapping[str, int] | None = None) -> None:
    """Every band under its label; looks: label -> number of its colour and dashes, where they follow another order."""
    for index, (label, drawn) in enumerate(bands.items()):
        style = look(index if looks is None else looks[label])
        panel.plot(drawn.epochs, drawn.mean, label=label, **style)
        panel.fill_between(drawn.epochs, drawn.low, drawn.high, color=style["color"], alpha=0.18, linewidth=0)
    panel.set_xlabel("epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
