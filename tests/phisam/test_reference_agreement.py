"""The fast step equals the paper's pseudocode, and the pseudocode is the gradient of the paper's objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import phisam
from phisam import reference
from tests.phisam.cases import CASES, draws, network, phisam_gradient

RHO, LAM = 0.4, 0.7


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def paper_gradient(name: str, n: int, rho: float, lam: float) -> Tensor:
    case, (L, x) = CASES[name], network()
    v = draws(case.make(), n, len(x), seed=4)
    if len(case.psi) == 1:
        return reference.algorithm_1(L, x, v, rho, case.phi, case.psi[0], lam)
    return reference.algorithm_2(L, x, [v] * len(case.psi), rho, case.phi, case.psi, lam)


@pytest.mark.parametrize("lam", [1.0, 0.3, -0.2])
@pytest.mark.parametrize("rho", [1e-2, 0.4])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_step_equals_algorithms_1_and_2(name: str, n: int, rho: float, lam: float) -> None:
    L, x = network()
    actual = phisam_gradient(L, x, CASES[name].make(), n, rho=rho, lam=lam, seed=4)
    assert_close(actual, paper_gradient(name, n, rho, lam))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_step_equals_algorithm_3(n: int) -> None:
    L, x = network()
    v = draws(phisam.frobenius(), n, len(x), seed=4)
    actual = phisam_gradient(L, x, phisam.frobenius(), n, rho=RHO, lam=LAM, seed=4)
    assert_close(actual, reference.algorithm_3(L, x, v, RHO, LAM))


def test_algorithm_3_is_algorithm_2_with_the_unbiased_factor() -> None:
    """Appendix N: the same draws for both components, and n / (n - 1) on the sharpness term."""
    L, x = network()
    n = 4
    v = draws(phisam.frobenius(), n, len(x))
    biased = reference.algorithm_2(
        L, x, [v, v], RHO, lambda t: 2 * (t[1] - t[0] ** 2), (lambda t: t, lambda t: t**2), LAM * n / (n - 1)
    )
    assert_close(reference.algorithm_3(L, x, v, RHO, LAM), biased)


def test_one_noise_per_component_is_algorithm_2_with_draws_of_their_own() -> None:
    L, x = network()
    measure = phisam.frobenius(unbiased=False).with_noise([phisam.gaussian(), phisam.rademacher()])
    v = draws(measure, 6, len(x), seed=4)
    expected = reference.algorithm_2(
        L, x, [v[0::2], v[1::2]], RHO, lambda t: 2 * (t[1] - t[0] ** 2), (lambda t: t, lambda t: t**2), LAM
    )
    assert_close(phisam_gradient(L, x, measure, 3, rho=RHO, lam=LAM, seed=4), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_algorithms_are_the_gradient_of_definition_8(name: str) -> None:
    """Appendix H: g_t = grad ( L(x) + rho^2 R(x) ), by autograd through the whole objective."""
    case, (L, x) = CASES[name], network()
    v = draws(case.make(), 4, len(x), seed=4)
    leaf = x.clone().requires_grad_()
    F = reference.sharpness_aware_loss(L, leaf, v, RHO, case.phi, lambda t: tuple(psi(t) for psi in case.psi), LAM)
    assert_close(torch.autograd.grad(F, leaf)[0], paper_gradient(name, 4, RHO, LAM))


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_sharpness_term_of_definition_8(name: str) -> None:
    case, (L, x) = CASES[name], network()
    v = draws(case.make(), 4, len(x), seed=4)
    losses = torch.stack([L(x), *(L(x + RHO * v_i) for v_i in v)])
    F = reference.sharpness_aware_loss(L, x, v, RHO, case.phi, lambda t: tuple(psi(t) for psi in case.psi), LAM)
    assert_close(losses[0] + LAM * RHO**2 * case.make().value(losses, RHO), F)


@pytest.mark.parametrize("name", [*CASES, "frobenius"])
def test_rows_and_factors_expand_the_weights(name: str) -> None:
    """w_e = sum_l factor_l slope_{e,l}, for points that a rank sums up without knowing the later losses."""
    measure = CASES[name].make() if name in CASES else phisam.frobenius()
    losses = torch.tensor([0.7, 1.0, 0.2, 0.9, 0.75], dtype=torch.float64)
    weights = measure.weights(losses, RHO, LAM)
    for e in range(1, 5):
        delta = (losses[e] - losses[0]) / RHO**2
        slopes, log_scale = measure.slopes(delta, e)
        assert_close(measure.factors(losses, RHO, LAM, log_scale) @ slopes, weights[e])


def test_sgd_is_the_gradient() -> None:
    L, x = network()
    assert torch.equal(phisam_gradient(L, x, phisam.sgd(), 3), reference.gradient(L, x))
