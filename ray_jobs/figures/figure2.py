"""The paper's Figure 2 and Example 1: L(x1, x2) = (x1^2 - x2^2) / 2, a saddle whose Hessian has trace 0 everywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from phisam.sharpness import landscape
from ray_jobs.figures import style
from ray_jobs.figures.slices import plane_figure


class Saddle(nn.Module):
    """L as a network whose output is its loss: two parameters, and inputs that do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.x[0] ** 2 - self.x[1] ** 2) / 2


def criterion(outputs: Tensor, _targets: Tensor) -> Tensor:
    """The outputs themselves."""
    return outputs


def saddle_losses(axis: Tensor) -> Tensor:
    """L on the grid axis x axis, (p, p), computed as a slice of `Saddle` along its two coordinates."""
    e1, e2 = torch.eye(2, dtype=torch.float64)
    example = [(torch.zeros(1, 1), torch.zeros(1))]
    losses = landscape.slice_losses(Saddle(), criterion, example, [e1, e2], landscape.plane(axis, axis))
    return losses.view(len(axis), len(axis))


def reproduce_figure2(folder: Path) -> list[Path]:
    """Writes figure2.png and .svg."""
    axis = landscape.grid(radius=2.0, points=61)
    figure = plane_figure(axis, axis, saddle_losses(axis), "L = (x₁² - x₂²) / 2", ("x₁", "x₂"))
    return style.save(figure, folder, "figure2")
