"""tr H and ‖H‖_F^2 from random vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from phisam.noise import gaussian
from phisam.sharpness.curvature import Curvature, Progress
from phisam.sharpness.estimate import Estimate, mean_of
from phisam.sharpness.probes import draw, per_probe


def trace(curvature: Curvature, probes: int = 100, seed: int = 0, *, progress: Progress | None = None) -> Estimate:
    """tr H = E z^T H z, z ~ N(0, I). Unbiased; the variance of one probe is 2 ‖H‖_F^2.

    Raises:
        ValueError: probes < 2, which has no standard error.
        Unmeasurable: an operation of the model has no second derivative.
    """
    return trace_and_frobenius(curvature, probes, seed, progress=progress)[0]


def frobenius_squared(
    curvature: Curvature, probes: int = 100, seed: int = 0, *, progress: Progress | None = None
) -> Estimate:
    """‖H‖_F^2 = E ‖H z‖^2, z ~ N(0, I), as Appendix O measures it. Unbiased; the variance of one probe is 2 tr H^4.

    Raises:
        ValueError: probes < 2, which has no standard error.
        Unmeasurable: an operation of the model has no second derivative.
    """
    return trace_and_frobenius(curvature, probes, seed, progress=progress)[1]


def trace_and_frobenius(
    curvature: Curvature, probes: int = 100, seed: int = 0, *, progress: Progress | None = None
) -> tuple[Estimate, Estimate]:
    """`trace` and `frobenius_squared` from the same products: the two cost no more than one.

    Raises:
        ValueError: probes < 2, which has no standard error.
        Unmeasurable: an operation of the model has no second derivative.
    """
    if probes < 2:
        raise ValueError(f"probes = {probes}, but a standard error needs probes >= 2")

    def reduce(Z: Tensor, HZ: Tensor) -> Tensor:
        return torch.stack([dots(Z, HZ), dots(HZ, HZ)], dim=1)

    noise = gaussian()
    values = per_probe(curvature, probes, lambda part: draw(curvature, noise, seed, part), reduce, progress)
    return mean_of(values[:, 0], "trace"), mean_of(values[:, 1], "frobenius_squared")


def dots(A: Tensor, B: Tensor) -> Tensor:
    """The inner products of the columns of A and B, (k,)."""
    products: Tensor = torch.linalg.vecdot(A, B, dim=0)
    return products
