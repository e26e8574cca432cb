"""One mu per component of psi: Algorithm 2 and Theorem 7, through whole steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import phisam
from phisam import reference
from tests.phisam.cases import Vector, draws, network, phisam_gradient

RHO, LAM = 0.4, 0.7
PSI = (lambda t: torch.exp(0.3 * t), lambda t: t**2, torch.sin)
NOISES = [phisam.gaussian(), phisam.rademacher(), phisam.hypercube(1.5)]


def phi(t: Tensor) -> Tensor:
    return t[0] * t[1] - torch.cos(t[2]) / t[0]


def measure() -> phisam.Measure:
    return phisam.Measure(phi, lambda t: tuple(psi(t) for psi in PSI), NOISES)


def by_component(v: Tensor) -> list[Tensor]:
    """Point 1 + i m + l is draw i of mu_l, both counted from 0."""
    return [v[l::3] for l in range(3)]  # noqa: E741


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_three_components_with_three_noises_are_algorithm_2(n: int) -> None:
    L, x = network()
    v = by_component(draws(measure(), 3 * n, len(x), seed=4))
    expected = reference.algorithm_2(L, x, v, RHO, phi, PSI, LAM)
    close(phisam_gradient(L, x, measure(), n, rho=RHO, lam=LAM, seed=4), expected)


def test_rows_and_factors_expand_the_weights() -> None:
    """A draw of mu_l has a slope in row l alone."""
    losses = torch.tensor([0.7, 1.0, 0.2, 0.9, 0.75, 0.8, 0.6], dtype=torch.float64)
    weights = measure().weights(losses, RHO, LAM)
    factors = measure().factors(losses, RHO, LAM, None)
    for e in range(1, 7):
        slopes, log_scale = measure().slopes((losses[e] - losses[0]) / RHO**2, e)
        assert log_scale is None
        assert slopes.nonzero().reshape(-1).tolist() == [(e - 1) % 3]
        close(factors @ slopes, weights[e])


def test_every_step_draws_anew() -> None:
    """The second step of a run has the draws of step 1, at the parameters that the first step left."""
    L, x = network()
    model = Vector(x)
    opt = phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.1), measure(), n_samples=2, rho=RHO, lam=LAM, seed=4)
    for step in range(3):
        before = model.x.detach().clone()
        opt.step(lambda: L(model.x))
        v = by_component(draws(measure(), 6, len(x), seed=4, step=step))
        g = reference.algorithm_2(L, before, v, RHO, phi, PSI, LAM)
        close(model.x.detach(), before - 0.1 * g)


def test_theorem_7_entries_of_a_hessian_that_is_not_diagonal() -> None:
    """L = sum log cosh(B x) has the Hessian B^T B at its minimum 0; each entry to O(rho^2), through `step`."""
    B = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -0.4]], dtype=torch.float64)
    H, e, rho = B.T @ B, torch.eye(3, dtype=torch.float64), 1e-3
    for i in range(3):
        for j in range(i):
            # (58) and (59): v^T H v / 2 for v = e_i, e_j and e_i + e_j.
            entry = phisam.Measure(
                lambda t: t[2] - t[0] - t[1],
                lambda t: (t, t, t),
                [phisam.dirac(e[i]), phisam.dirac(e[j]), phisam.dirac(e[i] + e[j])],
            )
            model = Vector(torch.zeros(3, dtype=torch.float64))
            opt = phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.0), entry, n_samples=1, rho=rho)
            opt.step(lambda x=model.x: torch.log(torch.cosh(B @ x)).sum())
            assert float(opt.last_step.sharpness) == pytest.approx(float(H[i, j]), abs=1e-5)
            assert abs(float(H[i, j])) > 1e-2
