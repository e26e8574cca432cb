"""What the paper says of invariance: Example 1, Example 2, Theorem 10 and Theorem 11, on two parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

import phisam
from phisam import reference
from tests.phisam.cases import quadratic


def saddle(x: Tensor) -> Tensor:
    """Example 1: L = (x_1^2 - x_2^2) / 2."""
    return 0.5 * (x[0] ** 2 - x[1] ** 2)


def rescalable(x: Tensor) -> Tensor:
    """Example 2: L = x_1^2 x_2^2 - 2 x_1 x_2 + 1, the same at (k x_1, x_2 / k)."""
    return (x[0] * x[1]) ** 2 - 2 * x[0] * x[1] + 1


def gaussian(n: int, d: int = 2) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=Generator().manual_seed(1))


def test_example_1_the_trace_is_blind_to_a_saddle_and_frobenius_is_not() -> None:
    for x in ([0.0, 0.0], [0.3, -2.0]):
        H = reference.hessian(saddle, torch.tensor(x, dtype=torch.float64))
        v = gaussian(200_000)
        trace = reference.sharpness(H, v[:2000], lambda t: t, lambda t: t)
        assert abs(float(trace)) < 4 * math.sqrt(1.0 / 2000)  # Var(v^T H v / 2) = ‖H‖_F^2 / 2 = 1
        delta = 0.5 * ((v @ H) * v).sum(1)
        frobenius = phisam.frobenius().value(torch.cat([torch.zeros(1, dtype=torch.float64), delta]), 1.0)
        assert float(frobenius) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("k", [0.2, 3.0])
def test_example_2_the_trace_is_not_invariant_and_the_determinant_is(k: float) -> None:
    x = torch.tensor([1.5, 1 / 1.5], dtype=torch.float64)
    scaled = torch.tensor([k * x[0], x[1] / k], dtype=torch.float64)
    torch.testing.assert_close(rescalable(x), rescalable(scaled))
    H, H_scaled = reference.hessian(rescalable, x), reference.hessian(rescalable, scaled)
    expected = torch.tensor([[2 * x[1] ** 2, 4 * x[0] * x[1] - 2], [4 * x[0] * x[1] - 2, 2 * x[0] ** 2]])
    torch.testing.assert_close(H, expected.double())
    assert float(H.trace()) != pytest.approx(float(H_scaled.trace()), rel=0.1)
    torch.testing.assert_close(torch.linalg.det(H), torch.linalg.det(H_scaled), rtol=1e-10, atol=1e-10)


def hyperbolic_grid() -> tuple[Tensor, Tensor]:
    """Points and weights of a quadrature over {(v_1, v_2): v_1, v_2 > 0}, laid out along hyperbolas v_1 v_2 = const.

    In coordinates p = log(v_1 v_2), q = log(v_1 / v_2) the area element is dv_1 dv_2 = exp(p) / 2 dp dq, and the
    rescaling D = diag(k, 1/k) is a shift of q by 2 log k: on a grid that is fine and wide in q it changes nothing.
    """
    p, q = torch.meshgrid(
        torch.linspace(-12, 3, 400, dtype=torch.float64),
        torch.linspace(-30, 30, 3000, dtype=torch.float64),
        indexing="ij",
    )
    v = torch.stack([torch.exp((p + q) / 2), torch.exp((p - q) / 2)], dim=-1)
    return v.reshape(-1, 2), (torch.exp(p) / 2).reshape(-1)


@pytest.mark.parametrize("k", [0.5, 2.0])
@pytest.mark.parametrize("psi", [lambda t: torch.exp(-t), lambda t: 1 / (1 + t**2)], ids=["exp", "rational"])
def test_theorem_10_a_density_of_the_product_of_coordinates_is_invariant(psi: object, k: float) -> None:
    """dmu = f(v_1 v_2) dv_1 dv_2, f(t) = exp(-t^2): S at x and at D x agree, though the Hessians do not."""
    x = torch.tensor([1.2, 0.9], dtype=torch.float64)
    D = torch.diag(torch.tensor([k, 1 / k], dtype=torch.float64))
    v, area = hyperbolic_grid()
    mu = area * torch.exp(-((v[:, 0] * v[:, 1]) ** 2))

    def S(at: Tensor, density: Tensor) -> Tensor:
        H = reference.hessian(rescalable, at)
        return (psi(0.5 * ((v @ H) * v).sum(1)) * density).sum()  # type: ignore[operator]

    torch.testing.assert_close(S(D @ x, mu), S(x, mu), rtol=1e-3, atol=0)
    # A density that is no function of the product is not invariant: the test could fail.
    other = area * torch.exp(-(v[:, 0] ** 2 + v[:, 1] ** 2))
    assert float(S(D @ x, other)) != pytest.approx(float(S(x, other)), rel=0.02)


@pytest.mark.parametrize("noise", [phisam.gaussian(), phisam.sphere()], ids=lambda noise: noise.name)
@pytest.mark.parametrize("measure", [phisam.trace(), phisam.frobenius(), phisam.exp_product(0.2)], ids=lambda m: m.name)
def test_theorem_11_rotations(noise: phisam.Noise, measure: phisam.Measure) -> None:
    """mu is invariant under rotations, so S depends on the eigenvalues alone: H and Q^T H Q, rotated draws."""
    eigenvalues = torch.tensor([-0.5, 0.3, 0.8], dtype=torch.float64)
    _, H = quadratic(eigenvalues)  # a rotation of diag(eigenvalues)
    n = 100_000
    flat = torch.empty(n, 3, dtype=torch.float64)
    generator = Generator()
    if noise.name == "gaussian":
        noise.draw_(flat.view(-1), generator, 0, 0, 1)
    else:
        for i in range(2000):
            noise.draw_(flat[i], generator, 0, 0, i)
        n = 2000

    def value(hessian: Tensor) -> float:
        v = flat[:n]
        losses = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * ((v @ hessian) * v).sum(1)])
        return float(measure.value(losses, 1.0))

    tolerance = 0.15 if noise.name == "sphere" else 0.03
    assert value(H) == pytest.approx(value(torch.diag(eigenvalues)), rel=tolerance, abs=0.02)
