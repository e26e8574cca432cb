"""Example 2 and Theorem 11 through the library's measures, with exact integrals and controls that must differ."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import phisam
from phisam import reference
from tests.phisam.cases import Loss
from tests.phisam.test_exact_integrals import close, gaussian_points, icosahedron, midpoints
from tests.phisam.test_invariance import rescalable


def losses_of_hessian(L: Loss, x: Tensor, v: Tensor) -> Tensor:
    """L_e with L replaced by its second-order part at x (rho = 1): S itself, as rho -> 0 has it."""
    H = reference.hessian(L, x)
    return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * ((v @ H) * v).sum(1)])


@pytest.mark.parametrize("k", [0.5, 1.6])
def test_example_2_off_the_zero_loss_manifold(k: float) -> None:
    """On x_1 x_2 = 1 every determinant is 0; here it is not. The trace moves as k^2 x_1^2 + x_2^2 / k^2."""
    x = torch.tensor([1.0, 0.8], dtype=torch.float64)
    scaled = torch.stack([k * x[0], x[1] / k])
    H = reference.hessian(rescalable, x)
    assert float(torch.linalg.det(H)) > 0.5

    cube = midpoints(16.0, 300, 2)
    S = phisam.determinant().value(losses_of_hessian(rescalable, x, cube), 1.0)
    close(phisam.determinant().value(losses_of_hessian(rescalable, scaled, cube), 1.0), S, rtol=1e-9)

    for at in (x, scaled):
        losses = losses_of_hessian(rescalable, at, gaussian_points(2))
        close(phisam.trace().value(losses, 1.0), at @ at)
    assert float(scaled @ scaled) != pytest.approx(float(x @ x), rel=0.05)


def rotation() -> Tensor:
    Q, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0, -1.0], [0.5, 1.0, 3.0], [-2.0, 0.0, 1.0]], dtype=torch.float64))
    return Q


def radial(x: Tensor) -> Tensor:
    """Invariant under rotations, Hessian 4 (‖x‖^2 - 1) I + 8 x x^T."""
    return (x @ x - 1) ** 2


def signs() -> Tensor:
    """All of {-1, 1}^3: the Rademacher measure, exactly."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)


INVARIANT = {"sphere": icosahedron(), "gaussian": gaussian_points(3)}
MEASURES = {
    "trace": phisam.trace(),
    "frobenius": phisam.frobenius(unbiased=False),
    "eigen_power": phisam.eigen_power(2),
}


@pytest.mark.parametrize("mu", INVARIANT)
@pytest.mark.parametrize("name", MEASURES)
def test_theorem_11_rotations_of_an_invariant_loss(name: str, mu: str) -> None:
    """L(Q x) = L(x) and mu invariant under rotations: S(Q x) = S(x)."""
    x, Q = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64), rotation()
    S = MEASURES[name].value(losses_of_hessian(radial, x, INVARIANT[mu]), 1.0)
    close(MEASURES[name].value(losses_of_hessian(radial, Q @ x, INVARIANT[mu]), 1.0), S)


@pytest.mark.parametrize("name", ["frobenius", "eigen_power"])
def test_a_mu_that_is_not_invariant_gives_an_S_that_is_not(name: str) -> None:
    """Rademacher noise: E v v^T = I keeps the trace, but 2 Var(v^T H v / 2) is the off-diagonal part of ‖H‖_F^2."""
    x, Q = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64), rotation()
    S = MEASURES[name].value(losses_of_hessian(radial, x, signs()), 1.0)
    moved = MEASURES[name].value(losses_of_hessian(radial, Q @ x, signs()), 1.0)
    assert float(moved) != pytest.approx(float(S), rel=0.05)
    H = reference.hessian(radial, x)
    off_diagonal = float((H * H).sum() - (H.diagonal() ** 2).sum())
    close(MEASURES["frobenius"].value(losses_of_hessian(radial, x, signs()), 1.0), off_diagonal)
