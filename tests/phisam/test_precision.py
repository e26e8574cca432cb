"""Weights and values against 50-digit arithmetic, and at the ends of float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Generator, Tensor

import phisam
from tests.phisam.cases import Vector

LAM = 0.3
EXPONENTIAL: dict[str, tuple[phisam.Measure, float, Callable[[Decimal], Decimal], Callable[[Decimal], Decimal]]] = {
    # name: (measure, sigma, phi, phi'), as the paper writes them, on T = mean exp(sigma delta)
    "determinant": (phisam.determinant(), -1.0, lambda T: T**-2, lambda T: -2 * T**-3),
    "log_determinant": (phisam.log_determinant(), -1.0, lambda T: -2 * T.ln(), lambda T: -2 / T),
    "exp_product": (phisam.exp_product(0.25), 0.25, lambda T: T**-2, lambda T: -2 * T**-3),
}


def decimals(values: Tensor) -> list[Decimal]:
    return [Decimal(value) for value in values.tolist()]


def deltas(size: float, n: int) -> Tensor:
    """n deltas of both signs whose sizes spread over six orders of magnitude below `size`."""
    generator = Generator().manual_seed(7)
    exponent = -6 * torch.rand(n, dtype=torch.float64, generator=generator)
    return size * torch.randn(n, dtype=torch.float64, generator=generator) * 10**exponent


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 60.0])
@pytest.mark.parametrize("n", [2, 3000])
@pytest.mark.parametrize("name", EXPONENTIAL)
def test_exponential_measures_to_12_digits(name: str, n: int, size: float) -> None:
    measure, sigma, phi, slope = EXPONENTIAL[name]
    delta = deltas(size, n)
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), delta])
    with localcontext() as context:
        context.prec = 50
        terms = [(Decimal(sigma) * t).exp() for t in decimals(delta)]
        T = sum(terms, Decimal(0)) / n
        value = float(phi(T))
        factor = Decimal(LAM) * slope(T) * Decimal(sigma) / n
        weights = [float(factor * term) for term in terms]
    # log T of tiny deltas is a mean of numbers of both signs: it can be as good as the largest of them, no better.
    tolerance = 1e-12 * max(abs(value), min(1.0, float(delta.abs().max())))
    assert float(measure.value(losses, 1.0)) == pytest.approx(value, rel=0, abs=tolerance)
    # A weight below 1e-16 of the largest may come out as 0.
    smallest = 1e-15 * max(abs(weight) for weight in weights)
    assert measure.weights(losses, 1.0, LAM)[1:].tolist() == pytest.approx(weights, rel=1e-12, abs=smallest)


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1e-12), (1.0, 1e-6), (1e6, 1e-2)])
def test_frobenius_to_the_precision_of_its_deltas(offset: float, spread: float) -> None:
    """A variance by t_2 - t_1^2 has error offset^2 eps; the deltas themselves are only good to offset eps."""
    n = 400
    delta = offset + deltas(spread, n)
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), delta])
    with localcontext() as context:
        context.prec = 50
        exact = decimals(delta)
        mean = sum(exact, Decimal(0)) / n
        variance = sum(((t - mean) ** 2 for t in exact), Decimal(0)) / (n - 1)
        weights = torch.tensor([float(4 * Decimal(LAM) * (t - mean) / (n - 1)) for t in exact], dtype=torch.float64)
    resolution = max(spread, offset) * 2.0**-50
    assert float(phisam.frobenius().value(losses, 1.0)) == pytest.approx(2 * float(variance), rel=1e-10)
    error = (phisam.frobenius().weights(losses, 1.0, LAM)[1:] - weights).abs().max()
    assert float(error) < 4 * LAM / (n - 1) * 4 * resolution


@pytest.mark.parametrize("size", [90.0, 1e4])
def test_losses_that_fall_far_leave_the_determinant_no_weight(size: float) -> None:
    """T = mean exp(-delta) is huge, phi = T^-2 and all weights tend to 0: the step is the base optimizer's."""
    losses = torch.tensor([0.0, -size, 3.0, size], dtype=torch.float64)
    expected = [1.0, 0.0, 0.0, 0.0]
    assert phisam.determinant().weights(losses, 1.0, 1.0).tolist() == pytest.approx(expected, abs=1e-70)
    assert phisam.exp_product(-1.0).weights(losses, 1.0, 1.0).tolist() == pytest.approx(expected, abs=1e-70)


@pytest.mark.parametrize("size", [90.0, 300.0])
def test_losses_that_rise_give_the_determinant_its_true_huge_weights(size: float) -> None:
    """w = 2 T^-2 n^2 exp(2 min delta): 1e79 at 90 is a number like others in float64; the far point has no share."""
    weights = phisam.determinant().weights(torch.tensor([0.0, size, 3 * size], dtype=torch.float64), 1.0, 1.0)
    huge = 8 * math.exp(2 * size)
    assert weights.tolist() == pytest.approx([-huge, huge, 0.0], rel=1e-12, abs=1e-15 * huge)


def test_a_determinant_beyond_float64_skips_the_step_where_its_logarithm_takes_it() -> None:
    """delta = 1e4: T^-2 = exp(2e4) is no number, the step is skipped; log_determinant's weights are at most 2 lam."""
    for measure, skipped in ((phisam.determinant(), 1), (phisam.log_determinant(), 0)):
        model = Vector(torch.tensor([2.0, -1.0], dtype=torch.float64))
        before = model.x.detach().clone()
        opt = phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.1), measure, noise=phisam.gaussian(), rho=1.0)
        rises = iter([0.0, 1e4, 1e4])
        opt.step(lambda x=model.x, rises=rises: next(rises) + x @ x)
        assert opt.skipped_steps == skipped
        assert torch.isfinite(model.x).all()
        assert torch.equal(model.x.detach(), before) == bool(skipped)


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_slopes_and_factors_in_the_log_domain(size: float) -> None:
    """w_e = factor slope_e with exp(log_scale_e) inside: no row needs exp(1e8)."""
    losses = torch.tensor([0.0, size, -size, 0.5 - size], dtype=torch.float64)
    measure = phisam.log_determinant()
    weights = measure.weights(losses, 1.0, LAM)
    for e in range(1, 4):
        slopes, log_scale = measure.slopes(losses[e], e)
        factors = measure.factors(losses, 1.0, LAM, log_scale)
        torch.testing.assert_close(factors @ slopes, weights[e], rtol=1e-6, atol=1e-300)
    share = 1 / (1 + torch.exp(torch.tensor(-0.5, dtype=torch.float64)))
    torch.testing.assert_close(weights[2], 2 * LAM * share, rtol=1e-6, atol=0)


def test_float32_losses_are_weighed_in_float64() -> None:
    """Only the losses' own rounding remains: equal to the float64 weights of the same numbers, rounded once."""
    losses = torch.tensor([1.0, 1.0 + 2.0**-20, 1.0 - 2.0**-21, 1.0 + 2.0**-22])
    for measure in (phisam.trace(), phisam.frobenius(), phisam.determinant(), phisam.exp_product(0.5)):
        expected = measure.weights(losses.double(), 1e-3, LAM).float()
        assert torch.equal(measure.weights(losses, 1e-3, LAM), expected)
        assert torch.equal(measure.value(losses, 1e-3), measure.value(losses.double(), 1e-3).float())


@pytest.mark.parametrize("returned", [[1.0], []], ids=str)
def test_a_psi_that_returns_no_tensor(returned: object) -> None:
    measure = phisam.Measure(lambda t: t, lambda t: returned, phisam.gaussian())  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="psi must return a tensor or a sequence of tensors, got"):
        measure.value(torch.tensor([0.0, 1.0]), 1.0)
