"""make(input_shape, num_classes, **options) -> torch.nn.Module, in float32 on the CPU."""

from __future__ import annotations

from torch import nn


def make(input_shape: tuple[int, int, int], num_classes: int, width: int = 64) -> nn.Module:
    """One hidden layer with GELU. torch's generator stands at the run's seed: just draw."""
    channels, height, width_of_image = input_shape
    pixels = channels * height * width_of_image
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.GELU(), nn.Linear(width, num_classes))
