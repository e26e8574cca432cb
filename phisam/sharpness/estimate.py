"""A measured number and how far it may be off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the number of random vectors it is made of (0: it is exact)."""

    name: str
    value: float
    standard_error: float
    probes: int


def mean_of(values: Tensor, name: str) -> Estimate:
    """The mean of independent values (n,), n >= 2, and its standard error."""
    return Estimate(name, float(values.mean()), float(values.std() / len(values) ** 0.5), len(values))


def jackknife(statistic: Callable[[Tensor], Tensor], draws: Tensor, name: str) -> Estimate:
    """n theta - (n - 1) mean_i theta_(-i), with theta = statistic(draws) and theta_(-i) that of all draws but i.

    For a phi of degree 1 or 2 in the means over the draws this is the unbiased U-statistic; for any other smooth phi
    the bias falls from O(1 / n) to O(1 / n^2). The standard error is the jackknife's,

        sqrt( (n - 1) / n sum_i (theta_(-i) - mean theta_(-.))^2 ),

    which for a plain mean is the usual one. draws (n, ...), n >= 3.
    """
    n = len(draws)
    others = torch.stack([statistic(torch.cat([draws[:i], draws[i + 1 :]])) for i in range(n)])
    mean = others.mean()
    value = n * statistic(draws) - (n - 1) * mean
    error = ((n - 1) / n * (others - mean).square().sum()).sqrt()
    return Estimate(name, float(value), float(error), n)
