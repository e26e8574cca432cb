"""Losses and measures that several tests share: x is one flat float64 vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

import phisam
from phisam import reference

Loss = Callable[[Tensor], Tensor]


class Vector(nn.Module):
    """A model that is its parameter vector, for losses written as functions of x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())


def quadratic(eigenvalues: Tensor, g: Tensor | None = None) -> tuple[Loss, Tensor]:
    """L(x) = x^T H x / 2 + g^T x with H = Q diag(eigenvalues) Q^T for a fixed rotation Q; returns L and H."""
    d = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=Generator().manual_seed(5)))
    H = Q @ torch.diag(eigenvalues.double()) @ Q.T
    linear = torch.zeros(d, dtype=torch.float64) if g is None else g.double()
    return lambda x: 0.5 * x @ H @ x + linear @ x, H


def network() -> tuple[Loss, Tensor]:
    """Cross-entropy of a small tanh network on fixed data, and a starting point."""
    generator = Generator().manual_seed(3)
    inputs = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 3, (16,), generator=generator)
    shapes = [(5, 4), (5,), (3, 5), (3,)]
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def L(x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True))
        return nn.functional.cross_entropy(torch.tanh(inputs @ w1.T + b1) @ w2.T + b2, targets)

    return L, torch.randn(sum(sizes), dtype=torch.float64, generator=generator) * 0.7


@dataclass(frozen=True)
class Case:
    """A measure as the library has it, and its phi and psi as the paper writes them; psi has one entry a component."""

    make: Callable[[], phisam.Measure]
    phi: reference.Phi
    psi: tuple[Callable[[Tensor], Tensor], ...]


CASES: dict[str, Case] = {
    "trace": Case(phisam.trace, lambda t: t, (lambda t: t,)),
    "frobenius_biased": Case(
        lambda: phisam.frobenius(unbiased=False), lambda t: 2 * (t[1] - t[0] ** 2), (lambda t: t, lambda t: t**2)
    ),
    "determinant": Case(phisam.determinant, lambda t: 1 / t**2, (lambda t: torch.exp(-t),)),
    "log_determinant": Case(phisam.log_determinant, lambda t: -2 * torch.log(t), (lambda t: torch.exp(-t),)),
    "exp_product": Case(lambda: phisam.exp_product(0.3), lambda t: 1 / t**2, (lambda t: torch.exp(0.3 * t),)),
    "eigen_power": Case(lambda: phisam.eigen_power(3), lambda t: t, (lambda t: t**3,)),
    "eigen_power_with_phi": Case(lambda: phisam.eigen_power(2, torch.sqrt), torch.sqrt, (lambda t: t**2,)),
    "custom": Case(
        lambda: phisam.Measure(torch.sin, lambda t: torch.tanh(t) if t > 0 else t, phisam.gaussian()),
        torch.sin,
        (lambda t: torch.tanh(t) if t > 0 else t,),
    ),
}


def draws(measure: phisam.Measure, n_points: int, d: int, seed: int = 0, step: int = 0) -> Tensor:
    """The v of points 1..n_points, (n_points, d)."""
    v = torch.empty(n_points, d, dtype=torch.float64)
    for e in range(1, n_points + 1):
        measure.noise_of(e).draw_(v[e - 1], Generator(), seed, step, e)
    return v


def phisam_gradient(L: Loss, x: Tensor, measure: phisam.Measure, n_samples: int, **settings: Any) -> Tensor:
    """g of one step of PhiSAM at x."""
    model = Vector(x)
    opt = phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.0), measure, n_samples=n_samples, **settings)
    opt.step(lambda: L(model.x))
    assert model.x.grad is not None
    return model.x.grad
