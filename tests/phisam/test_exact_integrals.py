"""Table 1, Appendix D and Theorem 6 without sampling: equal-weight cubature in place of draws, to 1e-9 and better.

`Measure.value` takes a plain mean over its points, so a rule whose points all weigh the same, exact for polynomials
of the needed degree, turns the n-sample estimator into the integral itself. Nothing here is random: a wrong
factor, sign or power cannot hide in a standard error.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import phisam
from phisam import reference
from tests.phisam.cases import Loss, quadratic
from tests.phisam.test_universality import polynomial_roots

POSITIVE = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
INDEFINITE = torch.tensor([-0.5, 0.2, 0.9], dtype=torch.float64)
BOTH = pytest.mark.parametrize("eigenvalues", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])


def product_rule(nodes: Tensor, d: int) -> Tensor:
    """All combinations of the nodes in d coordinates, (len(nodes)^d, d)."""
    return torch.cartesian_prod(*[nodes.double()] * d).reshape(-1, d)


def gaussian_points(d: int) -> Tensor:
    """Equal weights, exact for N(0, I_d) up to degree 5: Gauss-Hermite (1/6, 2/3, 1/6) in each coordinate."""
    return product_rule(math.sqrt(3) * torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64), d)


def icosahedron() -> Tensor:
    """Its 12 vertices: equal weights, exact for the sphere in 3 dimensions up to degree 5."""
    golden = (1 + math.sqrt(5)) / 2
    vertices = [(0.0, a, b * golden) for a, b in itertools.product((-1.0, 1.0), repeat=2)]
    points = torch.tensor([v[-k:] + v[:-k] for v in vertices for k in range(3)], dtype=torch.float64)
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)


def circle(n: int) -> Tensor:
    """n equispaced points: exact for the sphere in 2 dimensions up to degree n - 1."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def midpoints(half_width: float, n: int, d: int) -> Tensor:
    """The midpoint rule on [-a, a]^d: for a Gaussian that has died out at the faces exact to rounding."""
    return product_rule(half_width * (2 * torch.arange(n, dtype=torch.float64) + 1 - n) / n, d)


def losses_at(L: Loss, x: Tensor, v: Tensor, rho: float) -> Tensor:
    """L_0, L_1, ..., L_n."""
    return torch.cat([L(x)[None], torch.func.vmap(L)(x + rho * v)])


def losses_at_minimum(eigenvalues: Tensor, v: Tensor, rho: float = 0.3) -> Tensor:
    L, H = quadratic(eigenvalues)
    return losses_at(L, torch.zeros(len(H), dtype=torch.float64), v, rho)


def close(actual: Tensor, expected: Tensor | float, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-12)


@BOTH
def test_row_1_trace(eigenvalues: Tensor) -> None:
    """S = tr(H) / 2d on the sphere; tr(H) / 2 with N(0, I)."""
    d, trace = len(eigenvalues), float(eigenvalues.sum())
    close(phisam.trace().value(losses_at_minimum(eigenvalues, icosahedron()), 0.3), trace / (2 * d))
    close(phisam.trace().value(losses_at_minimum(eigenvalues, gaussian_points(d)), 0.3), trace / 2)


@BOTH
def test_row_2_frobenius(eigenvalues: Tensor) -> None:
    """S = sum lambda_i^2 from the biased form, which is the integral; the unbiased one has n / (n - 1) on top."""
    losses = losses_at_minimum(eigenvalues, gaussian_points(len(eigenvalues)))
    S, n = float((eigenvalues**2).sum()), len(losses) - 1
    close(phisam.frobenius(unbiased=False).value(losses, 0.3), S)
    close(phisam.frobenius().value(losses, 0.3), S * n / (n - 1))


@pytest.mark.parametrize("half_width", [9.0, 11.0])
def test_row_3_determinant(half_width: float) -> None:
    """(2 pi)^d / ((2a)^d T)^2 = det H, T the cube's mean of exp(-delta); log_determinant is its logarithm."""
    eigenvalues = torch.tensor([0.6, 1.7], dtype=torch.float64)
    d, det = 2, float(eigenvalues.prod())
    losses = losses_at_minimum(eigenvalues, midpoints(half_width, 60, d))
    constant = (2 * math.pi) ** d / (2 * half_width) ** (2 * d)
    close(constant * phisam.determinant().value(losses, 0.3), det, rtol=1e-9)
    close(math.log(constant) + phisam.log_determinant().value(losses, 0.3), math.log(det), rtol=1e-9)


def test_row_3_on_a_singular_hessian_is_the_product_of_the_other_eigenvalues() -> None:
    """Footnote 1, Appendix H: a direction without curvature is cut off by the cube, a factor 2 pi / (2a)^2."""
    a, eigenvalues = 10.0, torch.tensor([0.5, 0.0, 1.2], dtype=torch.float64)
    v = midpoints(a, 60, 3)
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * (v**2 @ eigenvalues)])
    constant = (2 * math.pi) ** 2 / (2 * a) ** 4
    close(constant * phisam.determinant().value(losses, 1.0), 0.5 * 1.2, rtol=1e-9)


def weighted_losses(eigenvalues: Tensor, sigma: float) -> Tensor:
    """Losses (rho = 1) for which the plain mean of exp(sigma delta) is its integral over N(0, I).

    Trapezoidal rule with step h; a node's weight h^d (2 pi)^(-d/2) exp(-‖u‖^2 / 2) rides in its delta.
    """
    d, h = len(eigenvalues), 0.5
    u = product_rule(h * torch.arange(-32, 33, dtype=torch.float64), d)
    _, H = quadratic(eigenvalues)
    log_weight = d * math.log(h / math.sqrt(2 * math.pi)) - (u**2).sum(1) / 2
    delta = 0.5 * ((u @ H) * u).sum(1) + (log_weight + math.log(len(u))) / sigma
    return torch.cat([torch.zeros(1, dtype=torch.float64), delta])


@BOTH
@pytest.mark.parametrize("sigma", [0.4, -0.6])
def test_row_4_exp_product(eigenvalues: Tensor, sigma: float) -> None:
    """S = prod (1 - sigma lambda_i)."""
    losses = weighted_losses(eigenvalues, sigma)
    close(phisam.exp_product(sigma).value(losses, 1.0), float((1 - sigma * eigenvalues).prod()), rtol=1e-9)


@BOTH
def test_equation_19_and_its_form_on_the_sphere(eigenvalues: Tensor) -> None:
    """E (v^T H v / 2)^2: equation (19) for N(0, I); divided by d (d + 2) = E r^4 on the sphere, equation (17)."""
    d, squares = len(eigenvalues), float((eigenvalues**2).sum())
    q = 3 / 4 * squares + 1 / 4 * (float(eigenvalues.sum()) ** 2 - squares)
    close(phisam.eigen_power(2).value(losses_at_minimum(eigenvalues, gaussian_points(d)), 0.3), q)
    on_sphere = losses_at_minimum(eigenvalues, icosahedron())
    close(phisam.eigen_power(2).value(on_sphere, 0.3), q / (d * (d + 2)))
    close(phisam.eigen_power(2, torch.sqrt).value(on_sphere, 0.3), math.sqrt(q / (d * (d + 2))))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_power_on_the_circle(k: int) -> None:
    """v^T H v / 2 = s + r cos t with s, r = (lambda_1 +- lambda_2) / 4: even powers of the cosine survive."""
    a, b = -0.4, 1.0
    s, r = (a + b) / 4, (a - b) / 4
    expected = sum(
        math.comb(k, j) * s ** (k - j) * r**j * math.comb(j, j // 2) / 2**j for j in range(k + 1) if j % 2 == 0
    )
    losses = losses_at_minimum(torch.tensor([a, b], dtype=torch.float64), circle(2 * k + 1))
    close(phisam.eigen_power(k).value(losses, 0.3), expected)


@pytest.mark.parametrize("rho", [0.1, 1.0, 3.0])
def test_frobenius_away_from_a_minimum_sees_the_gradient(rho: float) -> None:
    """2 Var(delta) = ‖H‖_F^2 + 2 ‖g‖^2 / rho^2 with g the gradient at x."""
    L, H = quadratic(INDEFINITE, torch.tensor([0.3, -0.2, 0.5]))
    x = torch.tensor([0.4, -1.0, 0.2], dtype=torch.float64)
    g = reference.gradient(L, x)
    losses = losses_at(L, x, gaussian_points(3), rho)
    close(phisam.frobenius(unbiased=False).value(losses, rho), float((H * H).sum() + 2 * g @ g / rho**2))
    close(phisam.trace().value(losses, rho), float(H.trace() / 2))


@pytest.mark.parametrize("eigenvalues", [[0.5, 1.0], [-0.7, 0.6], [-0.6, 0.1, 0.9]], ids=str)
def test_theorem_6_as_one_measure(eigenvalues: list[float]) -> None:
    """phi = S o phi_1 o phi~ of equations (48) to (57), m = d, psi_l = exp(sigma_l t): any S of the eigenvalues."""
    lam = torch.tensor(eigenvalues, dtype=torch.float64)
    d = len(lam)
    sigmas = torch.linspace(-0.5, 0.6, d, dtype=torch.float64)

    def S(roots: Tensor) -> Tensor:
        return roots.abs().max() + roots[0] ** 3

    measure = phisam.Measure(
        lambda t: S(polynomial_roots(sigmas, t**-2)),
        lambda t: tuple(torch.exp(sigma * t) for sigma in sigmas),
        [phisam.gaussian()] * d,
        elementwise=True,
    )
    by_component = torch.stack([weighted_losses(lam, float(sigma))[1:] for sigma in sigmas], dim=1)
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), by_component.reshape(-1)])  # point 1 + i m + l
    torch.testing.assert_close(measure.value(losses, 1.0), S(lam), rtol=0, atol=1e-7)
