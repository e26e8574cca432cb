"""Slices of the loss drawn: along one direction as a line, over a plane as contours and as a surface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs.figures import style

Array = NDArray[np.float64]

LEVELS = 16
LOG_FROM = 20.0  # largest over smallest loss from which colours follow the logarithm
CEILING = 0.97  # quantile of the losses above which the surface is cut: far out a loss may be thousands of times larger


def line_figure(lines: Mapping[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """L along directions: what each is -> (coordinates (p,), losses (p,)). Losses that are inf or NaN leave gaps."""
    with style.styled():
        figure = style.figure(6.0, 3.6)
        panel = figure.subplots()
        everything = np.concatenate([losses.double().numpy() for _, losses in lines.values()])
        finite = everything[np.isfinite(everything)]
        for index, (label, (a, losses)) in enumerate(lines.items()):
            panel.plot(a.numpy(), losses.double().numpy(), label=label, **style.look(index + 1))
        panel.axvline(0, color="#666666", linewidth=0.8, linestyle=":")
        if len(finite) and finite.min() > 0 and finite.max() > LOG_FROM * finite.min():
            panel.set_yscale("log")
        panel.set(xlabel="step along the direction", ylabel="loss")
        panel.legend()
        style.title(panel, title)
    return figure


def plane_figure(a: Tensor, b: Tensor, losses: Tensor, title: str, axes: tuple[str, str]) -> Figure:
    """L over a plane, as contours on the left and as a surface on the right, in the same colours.

    Args:
        a, b: coordinates (p,) and (q,).
        losses: (p, q), L at (a_i, b_j). Losses that are inf or NaN are left white.
        axes: what the two directions are.
    """
    values: Array = np.ma.masked_invalid(losses.double().numpy())
    norm, levels = _colors(values)
    with style.styled():
        figure = style.figure(11.0, 4.6)
        left = figure.add_subplot(1, 2, 1)
        drawn = _contours(left, a, b, values, norm, levels)
        left.set(xlabel=axes[0], ylabel=axes[1])
        style.title(left, title)
        figure.colorbar(drawn, ax=left, label="loss", ticks=levels[::3], format="%.3g", shrink=0.92)
        _surface(figure, a, b, values, norm, levels, axes)
    return figure


def _contours(panel: Axes, a: Tensor, b: Tensor, values: Array, norm: Normalize, levels: Array) -> Any:
    x, y = a.numpy(), b.numpy()
    extend: Any = "neither" if levels[-1] >= values.max() else "max"
    drawn = panel.contourf(x, y, values.T, levels=levels, norm=norm, cmap=style.SURFACE, extend=extend)
    panel.contour(x, y, values.T, levels=levels, colors="white", linewidths=0.5, alpha=0.7, linestyles="solid")
    panel.plot(0, 0, marker="+", color="white", markersize=11, markeredgewidth=2)
    panel.grid(False)
    panel.set_aspect("equal" if abs(x[-1] - x[0]) == abs(y[-1] - y[0]) else "auto")
    return drawn


def _surface(
    figure: Figure, a: Tensor, b: Tensor, values: Array, norm: Normalize, levels: Array, axes: tuple[str, str]
) -> None:
    panel: Any = figure.add_subplot(1, 2, 2, projection="3d")
    x, y = np.meshgrid(a.numpy(), b.numpy(), indexing="ij")
    shown = np.clip(values.filled(levels[-1]) if isinstance(values, np.ma.MaskedArray) else values, None, levels[-1])
    logarithmic = isinstance(norm, LogNorm)
    height = np.log10(shown) if logarithmic else shown
    colors = colormaps[style.SURFACE](norm(shown))
    fine = {"rcount": 80, "ccount": 80, "linewidth": 0, "antialiased": False, "shade": False}
    panel.plot_surface(x, y, height, facecolors=colors, **fine)
    panel.set_xlabel(axes[0], labelpad=6)
    panel.set_ylabel(axes[1], labelpad=6)
    panel.set_zlabel("log10 loss" if logarithmic else "loss", labelpad=8)
    panel.view_init(elev=32, azim=-58)
    panel.set_box_aspect((1, 1, 0.7), zoom=0.88)
    for side in (panel.xaxis, panel.yaxis, panel.zaxis):
        side.set_pane_color((1.0, 1.0, 1.0, 0.0))
        side.set_major_locator(MaxNLocator(4))


def _colors(values: Array) -> tuple[Normalize, Array]:
    """How values become colours, and the levels of the contours: up to a high quantile, even in value or in log."""
    finite = np.asarray(values[np.isfinite(values)], dtype=np.float64)
    if finite.size == 0:
        return Normalize(0, 1), np.linspace(0, 1, LEVELS)
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > LOG_FROM * low:
        return LogNorm(low, high), np.geomspace(low, high, LEVELS)
    cut = float(np.quantile(finite, CEILING))
    high = cut if high - low > LOG_FROM * (cut - low) else high
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-9
    return Normalize(low, high), np.asarray(MaxNLocator(LEVELS).tick_values(low, high))
