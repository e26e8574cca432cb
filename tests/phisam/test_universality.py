"""Theorems 6 and 7: the class is universal. Small d, float64.

Theorem 6: d exponential components recover all eigenvalues. Theorem 7: Dirac measures recover all entries.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import phisam
from phisam import reference
from tests.phisam.cases import draws, phisam_gradient, quadratic


@pytest.mark.parametrize("eigenvalues", [[0.5, 1.0], [-0.7, 0.4, 0.9], [-1.0, 0.0, 0.3, 0.8], [0.2, 0.2, 0.5, -0.4]])
def test_theorem_6_exact_integrals_recover_the_eigenvalues(eigenvalues: list[float]) -> None:
    lam = torch.tensor(eigenvalues, dtype=torch.float64)
    bound = 1 / lam.abs().max()  # equation (47)
    sigmas = bound * torch.linspace(-0.8, 0.9, len(lam), dtype=torch.float64)
    integrals = (1 - sigmas[:, None] * lam).prod(1) ** -0.5  # equation (45)
    torch.testing.assert_close(polynomial_roots(sigmas, integrals**-2), lam.sort().values, rtol=0, atol=1e-6)


def polynomial_roots(sigmas: Tensor, p: Tensor) -> Tensor:
    """Eigenvalues from p(sigma_i) = prod_j (1 - sigma_i lambda_j) and p(0) = 1: equations (49) to (55)."""
    one = torch.ones(1, dtype=torch.float64)
    nodes = torch.cat([0 * one, sigmas])
    V = nodes[:, None] ** torch.arange(len(nodes), dtype=torch.float64)
    coefficients = torch.linalg.solve(V, torch.cat([one, p]))  # p_0 = 1, p_1, ..., p_d
    # prod (x - lambda_j) = x^d + p_1 x^(d-1) + ... + p_d
    companion = torch.diag(torch.ones(len(p) - 1, dtype=torch.float64), -1)
    companion[0] = -coefficients[1:]
    return torch.linalg.eigvals(companion).real.sort().values


def test_theorem_6_by_sampling_through_the_library() -> None:
    """`exp_product(sigma_i).value` estimates p(sigma_i); antithetic copies are not needed at this accuracy."""
    lam = torch.tensor([-0.6, 0.9], dtype=torch.float64)
    L, H = quadratic(lam)
    sigmas = torch.tensor([-0.4, 0.4], dtype=torch.float64)
    n = 400_000
    v = draws_at_once(n, len(lam))
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * ((v @ H) * v).sum(1)])
    p = torch.stack([phisam.exp_product(float(sigma)).value(losses, 1.0) for sigma in sigmas])
    torch.testing.assert_close(polynomial_roots(sigmas, p), lam, rtol=0, atol=0.05)
    assert float(L(torch.zeros(2, dtype=torch.float64))) == 0.0


def draws_at_once(n: int, d: int) -> Tensor:
    flat = torch.empty(n * d, dtype=torch.float64)
    phisam.gaussian().draw_(flat, torch.Generator(), 0, 0, 1)
    return flat.view(n, d)


def theorem_7_noises(d: int) -> tuple[list[phisam.Noise], list[tuple[int, int]]]:
    """mu_i = delta_{e_i} and mu_ij = delta_{e_i + e_j}, m = d (d + 1) / 2 of them."""
    e = torch.eye(d, dtype=torch.float64)
    pairs = list(itertools.combinations_with_replacement(range(d), 2))
    return [phisam.dirac(e[i] if i == j else e[i] + e[j]) for i, j in pairs], pairs


def hessian_from(t: Tensor, pairs: list[tuple[int, int]], d: int) -> Tensor:
    """Solves (58) and (59), with t_l = v^T H v / 2."""
    H = torch.zeros(d, d, dtype=torch.float64)
    for value, (i, j) in zip(t, pairs, strict=True):
        if i == j:
            H[i, i] = 2 * value
    for value, (i, j) in zip(t, pairs, strict=True):
        if i != j:
            H[i, j] = H[j, i] = (2 * value - H[i, i] - H[j, j]) / 2
    return H


@pytest.mark.parametrize("d", [2, 3])
def test_theorem_7_any_function_of_the_entries(d: int) -> None:
    """A measure with m noises whose phi is the permanent-like product of all entries: S is that of the true Hessian."""
    eigenvalues = torch.tensor([-0.5, 0.8, 1.3], dtype=torch.float64)[:d]
    L, H = quadratic(eigenvalues)
    noises, pairs = theorem_7_noises(d)

    def S(hessian: Tensor) -> Tensor:
        return (hessian + 2).prod()

    m = len(pairs)
    measure = phisam.Measure(lambda t: S(hessian_from(t, pairs, d)), lambda t: t.expand(m), noises)
    assert measure.n_points(1) == m == d * (d + 1) // 2
    v = draws(measure, m, d)
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * ((v @ H) * v).sum(1)])
    torch.testing.assert_close(measure.value(losses, 1.0), S(H), rtol=1e-12, atol=1e-12)

    x = torch.zeros(d, dtype=torch.float64)
    expected = reference.algorithm_2(
        L, x, [v[[k]] for k in range(m)], 1.0, lambda t: S(hessian_from(t, pairs, d)), [lambda t: t] * m, 0.4
    )
    actual = phisam_gradient(L, x, measure, 1, rho=1.0, lam=0.4)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_theorem_7_on_a_loss_that_is_not_quadratic() -> None:
    """At a critical point R_rho tends to S as rho does to 0: the Hessian of cosines at 0 is the identity, negated."""
    d = 3
    noises, pairs = theorem_7_noises(d)
    m = len(pairs)
    measure = phisam.Measure(lambda t: hessian_from(t, pairs, d).diagonal().sum(), lambda t: t.expand(m), noises)
    v = draws(measure, m, d)
    errors = []
    for rho in (0.1, 0.01):
        losses = torch.stack([torch.tensor(float(d), dtype=torch.float64), *(torch.cos(rho * v_i).sum() for v_i in v)])
        errors.append(abs(float(measure.value(losses, rho)) + d))
    assert errors[1] < 1e-3
    assert math.log10(errors[0] / errors[1]) > 1.8  # the error falls like rho^2
