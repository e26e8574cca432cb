"""The spectrum of a Hessian as a density, from stochastic Lanczos quadrature."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from phisam import sharpness
from ray_jobs.figures import style


def density_figure(density: sharpness.Density, title: str, width: float | None = None, points: int = 801) -> Figure:
    """Density of the eigenvalues on a logarithmic axis, with a band of one standard error over the probes.

    width: of the Gaussian that each node is smeared by; None: 1 % of the spectrum's extent. The outer eigenvalues, few
    among d, would not show on a linear axis.
    """
    used = density.nodes[density.weights > 0]
    low, high = float(used.min()), float(used.max())
    extent = max(high - low, 1e-12)
    width = width or 0.01 * extent
    margin = 0.05 * extent + 3 * width
    grid = torch.linspace(low - margin, high + margin, points, dtype=torch.float64)
    mean, error = density.curve(grid, width)
    floor = max(float(mean.max()) * 1e-9, 0.1 / (density.d * width))  # a tenth of one eigenvalue, smeared
    with style.styled():
        figure = style.figure(6.4, 3.8)
        panel = figure.subplots()
        x, color = grid.numpy(), style.COLORS[1]
        panel.fill_between(x, floor, mean.clamp_min(floor).numpy(), color=color, alpha=0.15, linewidth=0)
        below, above = (mean - error).clamp_min(floor).numpy(), (mean + error).clamp_min(floor).numpy()
        panel.fill_between(x, below, above, color=color, alpha=0.35, linewidth=0)
        panel.plot(x, mean.clamp_min(floor).numpy(), color=color)
        panel.axvline(0, color="#666666", linewidth=0.8, linestyle=":")
        panel.set(yscale="log", xlabel="eigenvalue of the Hessian", ylabel="density", xlim=(x[0], x[-1]))
        panel.set_ylim(bottom=floor)
        style.title(panel, title)
    return figure
