"""antithetic, symmetric, adaptive, masked: what each does to the points, to delta, and to the gradient of a step.

The points are seen from outside, by the closure, and everything is checked against closed forms at those points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phisam
from phisam import reference
from tests.phisam.cases import CASES, Loss, Vector, network, quadratic
from tests.phisam.test_invariance import rescalable

RHO, LAM = 0.4, 0.7
ALL = {**{name: case.make for name, case in CASES.items()}, "frobenius": phisam.frobenius}
INDEFINITE = torch.tensor([-0.5, 0.2, 0.9, 1.4], dtype=torch.float64)
MANY = torch.linspace(-1, 1.5, 24, dtype=torch.float64)  # of like size: v^T H v is nearly Gaussian, its variance quick


def evaluate(
    L: Loss, x: Tensor, measure: phisam.Measure, n_samples: int, **settings: Any
) -> tuple[phisam.PhiSAM, list[Tensor]]:
    """One step of PhiSAM at x, and every point that it evaluated L at, in its order."""
    model = Vector(x)
    points: list[Tensor] = []

    def closure() -> Tensor:
        points.append(model.x.detach().clone())
        return L(model.x)

    opt = phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.0), measure, n_samples=n_samples, **settings)
    opt.step(closure)
    return opt, points


def gradient_of(opt: phisam.PhiSAM) -> Tensor:
    (p,) = opt.model.parameters()
    assert p.grad is not None
    return p.grad


def pairs(x: Tensor, points: Sequence[Tensor], rho: float) -> Tensor:
    """v_i of points that come as x + rho v_i, x - rho v_i; x itself is left out."""
    moved = [point for point in points if not torch.equal(point, x)]
    plus, minus = torch.stack(moved[0::2]), torch.stack(moved[1::2])
    torch.testing.assert_close(plus + minus, (2 * x).expand_as(plus), rtol=1e-12, atol=1e-12)
    return (plus - minus) / (2 * rho)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def autograd(F: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F(leaf), leaf)[0]


def psi_of(name: str) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    return lambda t: tuple(psi(t) for psi in CASES[name].psi)


# antithetic


@pytest.mark.parametrize("noise", [phisam.gaussian(), phisam.sphere(), phisam.rademacher(), phisam.hypercube(1.0)])
def test_antithetic_draws_are_exact_pairs(noise: phisam.Noise) -> None:
    """At x = 0 the points are rho v itself, to the last bit."""
    L, x = network()
    _, points = evaluate(L, torch.zeros_like(x), phisam.trace(), 6, noise=noise.antithetic(), rho=RHO)
    v = torch.stack(points[1:])
    assert len(v) == 6
    assert torch.equal(v[1::2], -v[0::2])
    assert len({tuple(row.tolist()) for row in v}) == 6
    assert not bool((v[0] == v[2]).all() | (v[0] == -v[2]).all())


def test_antithetic_pairs_keep_their_distribution() -> None:
    """The first of a pair is a draw of mu: mean 0 and variance 1 within 4 standard errors, over 100 x 23 numbers."""
    L, x = network()
    _, points = evaluate(L, torch.zeros_like(x), phisam.trace(), 200, noise=phisam.gaussian().antithetic(), rho=RHO)
    v = torch.stack(points[1::2]) / RHO
    assert abs(float(v.mean())) < 4 / math.sqrt(v.numel())
    assert abs(float(v.var()) - 1) < 4 * math.sqrt(2 / v.numel())


def test_an_odd_number_of_antithetic_draws_is_refused() -> None:
    L, x = network()
    with pytest.raises(ValueError, match="even"):
        evaluate(L, x, phisam.trace(), 3, noise=phisam.gaussian().antithetic())
    with pytest.raises(ValueError, match="even"):
        evaluate(L, x, phisam.frobenius(), 3, noise=[phisam.gaussian(), phisam.gaussian().antithetic()])


def test_antithetic_in_a_list_pairs_its_own_draws_alone() -> None:
    L, x = network()
    x = torch.zeros_like(x)
    both = [phisam.gaussian().antithetic(), phisam.rademacher()]
    _, points = evaluate(L, x, phisam.frobenius(unbiased=False), 4, noise=both, rho=RHO)
    paired, free = torch.stack(points[1::2]), torch.stack(points[2::2])
    assert torch.equal(paired[1::2], -paired[0::2])
    assert not torch.equal(free[1], -free[0])
    assert not torch.equal(free[3], -free[2])


@pytest.mark.parametrize("name", CASES)
def test_the_antithetic_step_is_the_algorithm_on_its_points(name: str) -> None:
    case, (L, x) = CASES[name], network()
    measure = case.make()
    noise = measure.noises[0].antithetic()
    opt, points = evaluate(L, x, measure, 4, noise=noise, rho=RHO, lam=LAM)
    v = (torch.stack(points[1:]) - x) / RHO
    F = lambda at: reference.sharpness_aware_loss(L, at, v, RHO, case.phi, psi_of(name), LAM)  # noqa: E731
    close(gradient_of(opt), autograd(F, x))
    assert opt.gradient_evaluations_per_step == 5


def test_antithetic_trace_is_symmetric_trace_with_half_the_draws() -> None:
    """(delta_+ + delta_-) / 2 is the symmetric delta, and the trace is linear in it."""
    L, x = network()
    opt, points = evaluate(L, x, phisam.trace(), 6, noise=phisam.gaussian().antithetic(), rho=RHO, lam=LAM)
    v = pairs(x, points, RHO)
    assert len(v) == 3
    F = lambda at: reference.symmetric_loss(L, at, v, RHO, lambda t: t, lambda t: t, LAM)  # noqa: E731
    close(gradient_of(opt), autograd(F, x))


def test_antithetic_frobenius_leans_to_the_gradient() -> None:
    """The two draws of a pair are not independent: E R = 2 n/(n-1) ‖g‖^2/rho^2 + (n-2)/(n-1) ‖H‖_F^2 (docs/options.md).

    With n = 2 nothing would be left of the Hessian, whatever it is: that is refused.
    """
    with pytest.raises(ValueError, match=r"nothing of the Hessian would be seen; use symmetric\(\), or n_samples >= 4"):
        phisam.frobenius().with_noise(phisam.gaussian().antithetic()).n_points(2)

    g = torch.linspace(-0.4, 0.4, 24, dtype=torch.float64)
    L, H = quadratic(MANY, g)
    R = sharpness_of_steps(L, torch.zeros_like(g), phisam.gaussian().antithetic(), n_samples=4, steps=400)
    expected = 8 / 3 * float(g @ g) / RHO**2 + 2 / 3 * float((H * H).sum())
    assert_mean(R, expected)


def sharpness_of_steps(L: Loss, x: Tensor, noise: phisam.Noise, n_samples: int, steps: int) -> Tensor:
    """R_rho of many steps at one x, (steps,)."""
    model = Vector(x)
    base = torch.optim.SGD([model.x], lr=0.0)
    opt = phisam.PhiSAM(model, base, phisam.frobenius(), noise=noise, n_samples=n_samples, rho=RHO)
    values = []
    for _ in range(steps):
        opt.step(lambda: L(model.x))
        values.append(opt.last_step.sharpness)
    return torch.stack(values)


def assert_mean(values: Tensor, expected: float) -> None:
    """Within 4 standard errors, which must be small enough to tell expected from 5 / 4 of it."""
    error = float(values.std()) / math.sqrt(len(values))
    assert 4 * error < expected / 4
    assert abs(float(values.mean()) - expected) < 4 * error


# symmetric


def test_symmetric_delta_is_v_h_v_half_whatever_the_gradient_is() -> None:
    """On a quadratic there is no O(rho^2): exact to the rounding of a loss divided by rho^2, for any rho."""
    g = torch.tensor([30.0, -20.0, 10.0, 40.0], dtype=torch.float64)
    L, H = quadratic(INDEFINITE, g)
    x = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    for rho in (0.1, 1.0, 7.0):
        opt, points = evaluate(L, x, phisam.frobenius(), 5, noise=phisam.gaussian().symmetric(), rho=rho)
        v = pairs(x, points, rho)
        delta = opt.last_step.delta
        assert delta.shape == (5,)
        torch.testing.assert_close(delta, 0.5 * ((v @ H) * v).sum(1), rtol=1e-9, atol=1e-13 / rho**2 * 100)
        first_order = (v @ (H @ x + g)).abs() / rho
        assert float(first_order.max()) > 2
        plain, _ = evaluate(L, x, phisam.frobenius(), 5, noise=phisam.gaussian(), rho=rho)
        assert float((plain.last_step.delta - delta).abs().max()) > 1  # without the option the gradient is in it


def test_symmetric_frobenius_is_unbiased_for_the_hessian_alone() -> None:
    """E 2 Var(delta) = ‖H‖_F^2 with 2 pairs, where the plain estimate has 2 ‖g‖^2 / rho^2 on top, 40 times as much."""
    g = torch.linspace(-4, 4, 24, dtype=torch.float64)
    L, H = quadratic(MANY, g)
    squared_norm = float((H * H).sum())
    assert 2 * float(g @ g) / RHO**2 > 40 * squared_norm
    assert_mean(sharpness_of_steps(L, torch.zeros_like(g), phisam.gaussian().symmetric(), 2, 800), squared_norm)


@pytest.mark.parametrize("noise", [phisam.sphere(), phisam.rademacher()], ids=lambda noise: noise.name)
def test_symmetric_measures_of_a_multiple_of_the_identity_are_exact(noise: phisam.Noise) -> None:
    """H = c I and ‖v‖ constant: delta is c ‖v‖^2 / 2 in every draw. The gradient, which is not 0, is not in it."""
    c, d = 0.8, 4
    g = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    L, _ = quadratic(torch.full((d,), c, dtype=torch.float64), g)
    x = torch.zeros(d, dtype=torch.float64)
    squared = 1.0 if noise.name == "sphere" else d
    opt, _ = evaluate(L, x, phisam.trace(), 3, noise=noise.symmetric(), rho=RHO)
    close(opt.last_step.sharpness, torch.tensor(c * squared / 2, dtype=torch.float64), 1e-12)
    opt, _ = evaluate(L, x, phisam.frobenius(), 3, noise=noise.symmetric(), rho=RHO)
    assert float(opt.last_step.sharpness) < 1e-20
    close(gradient_of(opt), g)  # R is at its minimum 0: the step is the base optimizer's


@pytest.mark.parametrize("lam", [1.0, LAM, -0.2])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_symmetric_step_is_autograd_through_pair_means(name: str, n: int, lam: float) -> None:
    case, (L, x) = CASES[name], network()
    measure = case.make()
    opt, points = evaluate(L, x, measure, n, noise=measure.noises[0].symmetric(), rho=RHO, lam=lam, seed=4)
    v = pairs(x, points, RHO)
    assert len(v) == n
    F = lambda at: reference.symmetric_loss(L, at, v, RHO, case.phi, psi_of(name), lam)  # noqa: E731
    close(gradient_of(opt), autograd(F, x))
    record = opt.last_step
    close(record.losses[0] + lam * RHO**2 * record.sharpness, F(x))
    close(record.weights.sum(), torch.ones((), dtype=torch.float64))
    assert opt.gradient_evaluations_per_step == 2 * n + 1
    assert len(points) == 2 * n + 1


def test_the_symmetric_unbiased_frobenius_step() -> None:
    L, x = network()
    opt, points = evaluate(L, x, phisam.frobenius(), 3, noise=phisam.gaussian().symmetric(), rho=RHO, lam=LAM)
    v = pairs(x, points, RHO)

    def F(at: Tensor) -> Tensor:
        delta = torch.stack([(L(at + RHO * v_i) + L(at - RHO * v_i) - 2 * L(at)) / (2 * RHO**2) for v_i in v])
        return L(at) + LAM * RHO**2 * 2 * delta.var(correction=1)

    close(gradient_of(opt), autograd(F, x))


@pytest.mark.parametrize("second_is_symmetric", [False, True])
def test_symmetric_in_a_list_of_noises(second_is_symmetric: bool) -> None:
    """mu_1 in pairs; mu_2 with or without. The cost is counted for each."""
    L, x = network()
    second = phisam.rademacher().symmetric() if second_is_symmetric else phisam.rademacher()
    noises = [phisam.gaussian().symmetric(), second]
    opt, points = evaluate(L, x, phisam.frobenius(unbiased=False), 2, noise=noises, rho=RHO, lam=LAM)
    assert opt.gradient_evaluations_per_step == len(points) == (9 if second_is_symmetric else 7)
    v = (torch.stack(points[1:]) - x) / RHO
    first_draw, second_draw = v.chunk(2)  # each: v_1, -v_1, v_2 and perhaps -v_2
    v_1, v_2 = torch.stack([first_draw[0], second_draw[0]]), torch.stack([first_draw[2], second_draw[2]])
    close(torch.stack([first_draw[1], second_draw[1]]), -v_1)
    close(v_2.abs(), torch.ones_like(v_2))
    if second_is_symmetric:
        close(torch.stack([first_draw[3], second_draw[3]]), -v_2)

    def delta(at: Tensor, v: Tensor, symmetric: bool) -> Tensor:
        L_i = (L(at + RHO * v) + L(at - RHO * v)) / 2 if symmetric else L(at + RHO * v)
        return (L_i - L(at)) / RHO**2

    def F(at: Tensor) -> Tensor:
        t_1 = torch.stack([delta(at, v, True) for v in v_1]).mean()
        t_2 = torch.stack([delta(at, v, second_is_symmetric) ** 2 for v in v_2]).mean()
        return L(at) + LAM * RHO**2 * 2 * (t_2 - t_1**2)

    close(gradient_of(opt), autograd(F, x))


def test_pairs_of_pairs_and_pairs_of_the_gradient_are_refused() -> None:
    for make in (
        lambda: phisam.gaussian().symmetric().antithetic(),
        lambda: phisam.gaussian().antithetic().symmetric(),
        lambda: phisam.gradient_direction().symmetric(),
        lambda: phisam.gradient_direction().antithetic(),
    ):
        with pytest.raises(ValueError, match=r"antithetic|pair"):
            make()


# adaptive


@pytest.mark.parametrize("noise", [phisam.gaussian(), phisam.sphere(), phisam.rademacher()], ids=lambda mu: mu.name)
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_adaptive_scales_the_same_draw_after_its_normalisation(noise: phisam.Noise, eta: float) -> None:
    L, x = network()
    _, plain = evaluate(L, x, phisam.trace(), 3, noise=noise, rho=RHO, seed=7)
    _, scaled = evaluate(L, x, phisam.trace(), 3, noise=noise.adaptive(eta), rho=RHO, seed=7)
    close(torch.stack(scaled) - x, (x.abs() + eta) * (torch.stack(plain) - x), 1e-13)


def test_adaptive_scales_a_dirac_measure() -> None:
    L, x = network()
    v = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    _, points = evaluate(L, x, phisam.trace(), 1, noise=phisam.dirac(v).adaptive(0.1), rho=RHO)
    close(points[1], x + RHO * (x.abs() + 0.1) * v, 1e-13)


def test_scaled_weight_leaves_the_other_tensors_as_they_are() -> None:
    inputs = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def steps(noise: phisam.Noise) -> tuple[list[dict[str, Tensor]], nn.Module]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        seen: list[dict[str, Tensor]] = []

        def closure() -> Tensor:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return model(inputs).square().mean()

        base = torch.optim.SGD(model.parameters(), lr=0.0)
        phisam.PhiSAM(model, base, phisam.trace(), noise=noise, n_samples=1, rho=RHO).step(closure)
        return seen, model

    plain, model = steps(phisam.gaussian())
    scaled, _ = steps(phisam.gaussian().adaptive(0.2, scaled="weight"))
    for name, x in model.named_parameters():
        T = x.detach().abs() + 0.2 if "weight" in name else torch.ones_like(x)
        close(scaled[1][name] - x.detach(), T * (plain[1][name] - x.detach()), 1e-13)


def relu_network() -> tuple[Loss, Tensor, Tensor]:
    """L and x of a network 3 - 6 - 5 - 3 with biases, and D: two hidden layers rescaled unit by unit, L(D x) = L(x)."""
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 3, (20,), generator=generator)
    shapes = [(6, 3), (6,), (5, 6), (5,), (3, 5), (3,)]
    sizes = [math.prod(shape) for shape in shapes]

    def L(x: Tensor) -> Tensor:
        W1, b1, W2, b2, W3, b3 = (part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True))
        hidden = torch.relu(inputs @ W1.T + b1)
        hidden = torch.relu(hidden @ W2.T + b2)
        return nn.functional.cross_entropy(hidden @ W3.T + b3, targets)

    x = torch.randn(sum(sizes), dtype=torch.float64, generator=generator) * 0.8
    c1 = torch.exp(torch.linspace(-1.5, 1.2, 6, dtype=torch.float64))
    c2 = torch.exp(torch.linspace(1.4, -0.7, 5, dtype=torch.float64))
    D = [c1[:, None].expand(6, 3), c1, c2[:, None] / c1, c2, (1 / c2).expand(3, 5), torch.ones(3).double()]
    return L, x, torch.cat([part.reshape(-1) for part in D])


def example_2() -> tuple[Loss, Tensor, Tensor]:
    k = 3.0
    return rescalable, torch.tensor([1.3, -0.6], dtype=torch.float64), torch.tensor([k, 1 / k], dtype=torch.float64)


INVARIANT_LOSSES = {"example_2": example_2, "relu_network": relu_network}
OPTIONS: dict[str, Callable[[phisam.Noise], phisam.Noise]] = {
    "plain": lambda noise: noise,
    "symmetric": lambda noise: noise.symmetric(),
    "antithetic": lambda noise: noise.antithetic(),
}


def at_both_ends(
    loss: str, measure: phisam.Measure, noise: phisam.Noise | None = None
) -> tuple[phisam.PhiSAM, phisam.PhiSAM, Tensor]:
    """The step at x and the step at D x, with the same seed."""
    L, x, D = INVARIANT_LOSSES[loss]()
    close(L(D * x), L(x), 1e-13)
    settings = {"rho": RHO, "lam": LAM, "seed": 3, "noise": noise}
    return evaluate(L, x, measure, 4, **settings)[0], evaluate(L, D * x, measure, 4, **settings)[0], D


def assert_invariant(here: phisam.PhiSAM, there: phisam.PhiSAM, D: Tensor) -> None:
    assert float(here.last_step.delta.abs().max()) > 1e-4  # there is something to be equal
    close(there.last_step.delta, here.last_step.delta, 1e-9)
    close(there.last_step.weights, here.last_step.weights, 1e-9)
    close(there.last_step.sharpness, here.last_step.sharpness, 1e-9)
    close(gradient_of(there), gradient_of(here) / D, 1e-9)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", INVARIANT_LOSSES)
@pytest.mark.parametrize("name", ALL)
def test_adaptive_is_exactly_invariant_for_every_measure(name: str, loss: str, option: str) -> None:
    """eta = 0: T(D x) = D T(x), so each point at D x is D times the point at x. The gradient becomes D^-1 g."""
    measure = ALL[name]()
    noise = OPTIONS[option](measure.noises[0].adaptive())
    assert_invariant(*at_both_ends(loss, measure, noise))


@pytest.mark.parametrize("loss", INVARIANT_LOSSES)
def test_asam_without_eta_is_invariant_too(loss: str) -> None:
    """grad L becomes D^-1 grad L, and T^2 grad L / ‖T grad L‖ becomes D times itself."""
    assert_invariant(*at_both_ends(loss, phisam.asam(eta=0.0)))


@pytest.mark.parametrize("loss", INVARIANT_LOSSES)
@pytest.mark.parametrize("name", ALL)
def test_eta_breaks_the_invariance(name: str, loss: str) -> None:
    """And so does its absence altogether: the tests above can fail."""
    measure = ALL[name]()
    own = measure.noises[0]
    for noise in (own.adaptive(0.5), own):
        here, there, _ = at_both_ends(loss, measure, noise)
        difference = (there.last_step.delta - here.last_step.delta).abs().max()
        assert float(difference) > 0.05 * float(here.last_step.delta.abs().max())


@pytest.mark.parametrize("loss", INVARIANT_LOSSES)
@pytest.mark.parametrize("measure", [phisam.sam(), phisam.asam(eta=0.5)], ids=["sam", "asam_with_eta"])
def test_sam_and_asam_with_eta_are_not_invariant(measure: phisam.Measure, loss: str) -> None:
    here, there, _ = at_both_ends(loss, measure)
    assert abs(float(there.last_step.delta - here.last_step.delta)) > 0.05 * abs(float(here.last_step.delta))


def test_scaling_the_weights_alone_is_not_invariant() -> None:
    """A unit's bias is rescaled with its incoming weights: scaled="weight" leaves T = 1 there."""
    L, x, D = relu_network()

    def delta(at: Tensor, scaled: str) -> Tensor:
        model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()  # the layout of relu_network
        nn.utils.vector_to_parameters(at, model.parameters())
        noise = phisam.gaussian().adaptive(scaled=scaled)
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        opt = phisam.PhiSAM(model, base, phisam.trace(), noise=noise, n_samples=4, rho=RHO, seed=3)
        opt.step(lambda: L(torch.cat([p.reshape(-1) for p in model.parameters()])))
        return opt.last_step.delta

    close(delta(D * x, "all"), delta(x, "all"), 1e-9)
    assert float((delta(D * x, "weight") - delta(x, "weight")).abs().max()) > 0.05


@pytest.mark.parametrize("symmetric_first", [True, False])
def test_the_gradient_of_an_adaptive_step_keeps_v_fixed(symmetric_first: bool) -> None:
    """v = T(x) u is held while F is differentiated, as SAM holds its eps: no term dv/dx."""
    L, x = network()
    noise = phisam.gaussian()
    noise = noise.symmetric().adaptive(0.1) if symmetric_first else noise.adaptive(0.1).symmetric()
    opt, points = evaluate(L, x, phisam.log_determinant(), 2, noise=noise, rho=RHO, lam=LAM)
    v = pairs(x, points, RHO)
    case = CASES["log_determinant"]

    def F(at: Tensor, v: Tensor) -> Tensor:
        return reference.symmetric_loss(L, at, v, RHO, case.phi, psi_of("log_determinant"), LAM)

    close(gradient_of(opt), autograd(lambda at: F(at, v), x))
    u = v / (x.abs() + 0.1)
    through_v = autograd(lambda at: F(at, (at.abs() + 0.1) * u), x)
    assert float((through_v - gradient_of(opt)).abs().max()) > 1e-3


# masked


def test_masked_coordinates_are_not_touched() -> None:
    L, x = network()
    mask = (torch.arange(len(x)) % 3 == 0).double()
    for noise in (phisam.gaussian(), phisam.sphere(), phisam.gaussian().symmetric(), phisam.gaussian().adaptive(0.1)):
        _, points = evaluate(L, x, phisam.trace(), 2, noise=noise.masked(mask), rho=RHO, seed=2)
        _, whole = evaluate(L, x, phisam.trace(), 2, noise=noise, rho=RHO, seed=2)
        kept = mask.bool()
        assert len(points) == len(whole) >= 3
        for point, unmasked in zip(points, whole, strict=True):
            assert torch.equal(point[~kept], x[~kept])
            assert torch.equal(point[kept], unmasked[kept])  # the same draw, normalised before the mask


def test_a_mask_may_be_given_by_parameter_or_as_truth_values() -> None:
    L, x = network()
    truth = torch.arange(len(x)) % 3 == 0
    forms: list[Any] = [truth.double(), truth, [truth.double()], truth.float()]
    results = [evaluate(L, x, phisam.trace(), 2, noise=phisam.gaussian().masked(form))[1] for form in forms]
    for points in results[1:]:
        assert torch.equal(torch.stack(points), torch.stack(results[0]))


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    L, x = network()
    with pytest.raises(ValueError, match="mask"):
        evaluate(L, x, phisam.trace(), 2, noise=phisam.gaussian().masked(torch.ones(len(x) - 1)))


def test_a_masked_measure_is_the_measure_of_the_sub_block() -> None:
    """v^T H v = u^T H_KK u on the kept coordinates K. With all of H diagonal and v = +-1 the trace is exact."""
    g = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    x = torch.zeros(4, dtype=torch.float64)
    diagonal = lambda x: 0.5 * (INDEFINITE * x * x).sum() + g @ x  # noqa: E731
    opt, _ = evaluate(diagonal, x, phisam.trace(), 3, noise=phisam.rademacher().symmetric().masked(mask), rho=RHO)
    close(opt.last_step.delta, torch.full((3,), 0.5 * float(INDEFINITE[0] + INDEFINITE[2]), dtype=torch.float64))

    L, H = quadratic(MANY)
    mask = (torch.arange(24) % 3 > 0).double()
    block = H[mask.bool()][:, mask.bool()]
    squared_norm = float((block * block).sum())
    assert squared_norm < 0.6 * float((H * H).sum())
    noise = phisam.gaussian().masked(mask).symmetric()
    assert_mean(sharpness_of_steps(L, torch.zeros_like(mask), noise, 4, 400), squared_norm)


def test_the_masked_step_is_the_algorithm_on_its_points() -> None:
    """The gradient of the sharpness term has all coordinates: the mask is on v, not on g."""
    L, x = network()
    mask = (torch.arange(len(x)) % 3 == 0).double()
    opt, points = evaluate(L, x, phisam.frobenius(), 3, noise=phisam.gaussian().masked(mask), rho=RHO, lam=LAM)
    v = (torch.stack(points[1:]) - x) / RHO
    close(gradient_of(opt), reference.algorithm_3(L, x, v, RHO, LAM))
    assert int((gradient_of(opt) != reference.gradient(L, x)).sum()) == len(x)


def test_options_leave_the_noise_that_they_are_called_on() -> None:
    L, x = network()
    noise = phisam.gaussian()
    before = torch.stack(evaluate(L, x, phisam.trace(), 2, noise=noise)[1])
    noise.antithetic(), noise.symmetric(), noise.adaptive(0.3), noise.masked(torch.zeros(len(x)))
    assert torch.equal(torch.stack(evaluate(L, x, phisam.trace(), 2, noise=noise)[1]), before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: phisam.gaussian().adaptive(-0.1), "eta"),
        (lambda: phisam.gaussian().adaptive(math.nan), "eta"),
        (lambda: phisam.gaussian().adaptive(0.1, scaled="biases"), "scaled"),
        (lambda: phisam.asam(eta=math.inf), "eta"),
        (lambda: phisam.ssam(sparsity=1.0), "sparsity"),
        (lambda: phisam.ssam(sparsity=-0.1), "sparsity"),
        (lambda: phisam.ssam(fisher_samples=0), "fisher_samples"),
        (lambda: phisam.fisher_mask(refresh_every=0), "refresh_every"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
