"""Every row of Table 1 on quadratics, whose Hessian is known: within 4 standard errors of the stated S.

On L(x) = x^T H x / 2 at x = 0 there is no first-order term, so delta_i = v_i^T H v_i / 2 for every rho, and
`Measure.value` of n + 1 losses is the estimate of S from n draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import phisam
from phisam import reference
from tests.phisam.cases import draws, quadratic

GROUPS, N = 200, 500
POSITIVE = torch.tensor([0.3, 0.7, 1.1])
INDEFINITE = torch.tensor([-0.5, 0.2, 0.6, 1.0])


def losses_of(measure: phisam.Measure, eigenvalues: Tensor, n: int, step: int, g: Tensor | None = None) -> Tensor:
    L, H = quadratic(eigenvalues, g)
    v = draws(measure, n, len(H), step=step)
    x = torch.zeros(len(H), dtype=torch.float64)
    return torch.cat([L(x)[None], 0.5 * ((v @ H) * v).sum(1) + (0 if g is None else v @ g)])  # rho = 1


def estimate(
    measure: phisam.Measure, eigenvalues: Tensor, statistic: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Mean of a statistic of psi over GROUPS * N draws and its standard error."""
    values = torch.cat([statistic(losses_of(measure, eigenvalues, N, step)[1:]).reshape(-1) for step in range(GROUPS)])
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def assert_within_4_errors(actual: tuple[float, float], expected: float) -> None:
    mean, error = actual
    assert error > 0
    assert abs(mean - expected) < 4 * error, f"{mean} +- {error}, expected {expected}"
    assert error < 0.05 * max(abs(expected), 0.1), "too noisy to show anything"


@pytest.mark.parametrize("eigenvalues", [POSITIVE, INDEFINITE])
def test_row_1_trace(eigenvalues: Tensor) -> None:
    """S = tr(H) / 2d on the sphere, tr(H) / 2 with Gaussian or Rademacher noise."""
    d, trace = len(eigenvalues), float(eigenvalues.sum())
    assert_within_4_errors(estimate(phisam.trace(), eigenvalues, lambda delta: delta), trace / (2 * d))
    for noise in (phisam.gaussian(), phisam.rademacher()):
        measure = phisam.trace().with_noise(noise)
        assert_within_4_errors(estimate(measure, eigenvalues, lambda delta: delta), trace / 2)
    cube = phisam.trace().with_noise(phisam.hypercube(2.0))
    assert_within_4_errors(estimate(cube, eigenvalues, lambda delta: delta), trace / 2 * 4 / 3)


@pytest.mark.parametrize("eigenvalues", [POSITIVE, INDEFINITE])
@pytest.mark.parametrize("n", [2, 10])
def test_row_2_frobenius_is_unbiased_for_every_n(eigenvalues: Tensor, n: int) -> None:
    """S = sum lambda_i^2; the biased form has expectation (n - 1) / n of it."""
    groups = 20_000 // n
    for unbiased, factor in ((True, 1.0), (False, (n - 1) / n)):
        measure = phisam.frobenius(unbiased)
        delta = losses_of(measure, eigenvalues, n * groups, 0)[1:].reshape(groups, n)
        values = torch.stack([measure.value(torch.cat([torch.zeros(1), part]).double(), 1.0) for part in delta])
        mean, error = float(values.mean()), float(values.std() / math.sqrt(groups))
        expected = factor * float((eigenvalues**2).sum())
        assert abs(mean - expected) < 4 * error
        assert error < 0.05 * expected


def test_row_3_determinant_by_the_truncated_lebesgue_integral() -> None:
    """S = (2 pi)^d ( integral exp(-v^T H v / 2) dv )^-2 = det H; the cube's volume (2a)^d turns mean into integral."""
    a, d = 7.0, len(POSITIVE)
    measure = phisam.determinant().with_noise(phisam.hypercube(a))
    mean, error = estimate(measure, POSITIVE, lambda delta: torch.exp(-delta))
    integral = (2 * a) ** d * mean
    determinant = (2 * math.pi) ** d / integral**2
    relative_error = 2 * error / mean
    assert relative_error < 0.05
    assert abs(determinant / float(POSITIVE.prod()) - 1) < 4 * relative_error
    # The library's value is the same up to the constant that DESIGN and the docs absorb in lam.
    losses = losses_of(measure, POSITIVE, N, 0)
    expected = 1 / torch.exp(-losses[1:]).mean() ** 2
    torch.testing.assert_close(measure.value(losses, 1.0), expected)
    torch.testing.assert_close(phisam.log_determinant().value(losses, 1.0), torch.log(expected))


@pytest.mark.parametrize(("eigenvalues", "sigma"), [(POSITIVE, 0.3), (INDEFINITE, 0.4), (INDEFINITE, -0.5)])
def test_row_4_exp_product(eigenvalues: Tensor, sigma: float) -> None:
    """S = prod (1 - sigma lambda_i): E exp(sigma delta) = prod (1 - sigma lambda_i)^(-1/2), equation (45)."""
    measure = phisam.exp_product(sigma)
    expected = float((1 - sigma * eigenvalues).prod())
    assert_within_4_errors(estimate(measure, eigenvalues, lambda delta: torch.exp(sigma * delta)), expected**-0.5)
    losses = losses_of(measure, eigenvalues, N, 0)
    torch.testing.assert_close(measure.value(losses, 1.0), 1 / torch.exp(sigma * losses[1:]).mean() ** 2)


def test_equation_19_the_second_moment() -> None:
    """E (v^T H v / 2)^2 = 3/4 sum lambda_i^2 + 1/4 sum_{i != j} lambda_i lambda_j for Gaussian v."""
    measure = phisam.eigen_power(2).with_noise(phisam.gaussian())
    squares = float((INDEFINITE**2).sum())
    cross = float(INDEFINITE.sum() ** 2) - squares
    assert_within_4_errors(estimate(measure, INDEFINITE, lambda delta: delta**2), 0.75 * squares + 0.25 * cross)


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_variance_of_delta_away_from_a_minimum(rho: float) -> None:
    """Var(delta) = ‖g‖^2 / rho^2 + ‖H‖_F^2 / 2: with a gradient, Frob-SAM without `symmetric` sees mostly ‖g‖."""
    g = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    L, H = quadratic(INDEFINITE, g)
    n = 100_000
    v = draws(phisam.frobenius(), n, len(H))
    delta = (0.5 * rho**2 * ((v @ H) * v).sum(1) + rho * v @ g) / rho**2
    expected = float(g @ g / rho**2 + (H * H).sum() / 2)
    fourth = float(((delta - delta.mean()) ** 4).mean())
    error = math.sqrt((fourth - expected**2) / n)
    assert abs(float(delta.var()) - expected) < 4 * error
    assert torch.allclose(reference.hessian(L, torch.zeros(4, dtype=torch.float64)), H)
