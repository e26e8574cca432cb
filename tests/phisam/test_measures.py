"""Numerics of the weights: log domain, small deltas, dtypes, closed forms, and words for mistakes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import phisam
from tests.phisam.cases import CASES

MEASURES = {**{name: case.make for name, case in CASES.items()}, "frobenius": phisam.frobenius, "sgd": phisam.sgd}


def losses(*deltas: float, rho: float = 1.0) -> Tensor:
    return torch.tensor([0.0, *(rho**2 * delta for delta in deltas)], dtype=torch.float64)


@pytest.mark.parametrize("name", MEASURES)
def test_weights_sum_to_1_and_keep_the_dtype(name: str) -> None:
    measure = MEASURES[name]()
    values = torch.tensor([0.7, 1.0, 0.2, 0.9]) if name != "sgd" else torch.tensor([0.7])
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        weights = measure.weights(values.to(dtype), 0.3, 0.6)
        assert weights.dtype == dtype
        assert weights.shape == values.shape
        assert float(weights.sum()) == pytest.approx(1.0, abs=tolerance * max(1.0, float(weights.abs().max())))
        assert measure.value(values.to(dtype), 0.3).dtype == dtype
        assert measure.value(values.to(dtype), 0.3).shape == ()


@pytest.mark.parametrize("name", MEASURES)
def test_lam_0_weighs_the_unperturbed_loss_alone(name: str) -> None:
    values = losses(0.5, -0.2, 0.7) if name != "sgd" else losses()
    assert MEASURES[name]().weights(values, 1.0, 0.0).tolist() == [1.0] + [0.0] * (len(values) - 1)


def test_closed_forms_of_the_design_table() -> None:
    rho, lam, n = 0.2, 0.3, 4
    values = torch.tensor([0.5, 0.6, 0.4, 0.9, 0.3], dtype=torch.float64)
    L, delta = values[1:], (values[1:] - values[0]) / rho**2
    closed = {
        "trace": lam / n * torch.ones(n, dtype=torch.float64),
        "frobenius": 4 * lam * (L - L.mean()) / (rho**2 * (n - 1)),
        "determinant": 2 * lam * torch.exp(-delta).mean() ** -2 * torch.softmax(-delta, 0),
        "log_determinant": 2 * lam * torch.softmax(-delta, 0),
        "exp_product": -2 * 0.3 * lam * torch.exp(0.3 * delta).mean() ** -2 * torch.softmax(0.3 * delta, 0),
        "eigen_power": lam / n * 3 * delta**2,
    }
    for name, expected in closed.items():
        weights = MEASURES[name]().weights(values, rho, lam)
        torch.testing.assert_close(weights[1:], expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(weights[0], 1 - expected.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [90.0, 1e4, 1e8])
def test_log_determinant_is_bounded_whatever_the_losses_do(size: float) -> None:
    weights = phisam.log_determinant().weights(losses(size, -size, 0.0), 1.0, 0.25)
    assert weights.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0], abs=1e-15)
    assert float(phisam.log_determinant().value(losses(size, -size, 0.0), 1.0)) == pytest.approx(
        -2 * (size - math.log(3)), rel=1e-12
    )


@pytest.mark.parametrize("size", [90.0, 300.0])
def test_exponential_measures_survive_where_the_linear_domain_overflows(size: float) -> None:
    """exp(90) is beyond float32, exp(-2 * 300) is not beyond float64: the weights tend to those of the largest term."""
    for measure in (phisam.determinant(), phisam.exp_product(-1.0)):
        weights = measure.weights(losses(-size, 0.0), 1.0, 1.0)
        assert torch.isfinite(weights).all()
        assert float(weights[1]) == pytest.approx(2 * 4 * math.exp(-2 * size), rel=1e-9)


def test_small_deltas_keep_their_relative_precision() -> None:
    """R = -2 log mean exp(-delta) = 2 mean delta - Var delta + ...; at 1e-9 a plain log(mean(exp)) keeps 7 digits."""
    n = 1000
    delta = 1e-9 * torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    value = phisam.log_determinant().value(torch.cat([torch.zeros(1, dtype=torch.float64), delta]), 1.0)
    expected = 2 * float(delta.mean()) - float(delta.var(correction=0))
    assert float(value) == pytest.approx(expected, rel=1e-14)


def test_frobenius_has_no_cancellation_far_from_zero() -> None:
    """The variance of deltas around 1e6 with a spread of 1: t_2 - t_1^2 would keep 4 digits."""
    delta = 1e6 + torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    value = phisam.frobenius().value(torch.cat([torch.zeros(1, dtype=torch.float64), delta]), 1.0)
    assert float(value) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list"])
def test_psi_may_return_its_components_in_any_form(form: str) -> None:
    psi = {
        "tensor": lambda t: torch.stack([t, t**2]),
        "tuple": lambda t: (t, t**2),
        "list": lambda t: [t, t**2],
    }[form]
    measure = phisam.Measure(lambda t: 2 * (t[1] - t[0] ** 2), psi, phisam.gaussian())
    values = losses(0.4, -0.3, 0.9)
    expected = phisam.frobenius(unbiased=False)
    torch.testing.assert_close(measure.weights(values, 1.0, 0.3), expected.weights(values, 1.0, 0.3))


@pytest.mark.parametrize("make", [phisam.trace, phisam.sam, phisam.frobenius])
def test_slopes_in_closed_form_are_those_of_autograd(make: Callable[[], phisam.Measure]) -> None:
    measure = make()
    assert measure.slope is not None
    by_autograd = copy.copy(measure)
    by_autograd.slope = None
    for delta in (-3.0, 0.0, 0.7):
        t = torch.tensor(delta, dtype=torch.float64)
        assert torch.equal(measure.slopes(t, 1)[0], by_autograd.slopes(t, 1)[0])


@pytest.mark.parametrize("lam", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("make", [phisam.trace, phisam.sam, phisam.frobenius, lambda: phisam.frobenius(unbiased=False)])
def test_weights_in_closed_form_are_those_of_autograd(make: Callable[[], phisam.Measure], lam: float) -> None:
    measure, values = make(), losses(0.4, -0.3, 1.1)
    weights = phisam.Measure.weights(measure, values, 0.7, lam)
    factors = phisam.Measure.factors(measure, values, 0.7, lam, None)
    torch.testing.assert_close(measure.weights(values, 0.7, lam), weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(measure.factors(values, 0.7, lam, None), factors, rtol=1e-12, atol=1e-12)
    assert measure.weight_at_x(lam) in (None, pytest.approx(float(weights[0])))


def test_a_constant_component_has_no_slope() -> None:
    measure = phisam.Measure(lambda t: t[0] * t[1], lambda t: (t, torch.ones_like(t)), phisam.gaussian())
    values = losses(0.4, -0.3)
    torch.testing.assert_close(
        measure.weights(values, 1.0, 0.5), phisam.trace().weights(values, 1.0, 0.5), rtol=1e-12, atol=1e-12
    )
    assert measure.slopes(values[1], 1)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: phisam.exp_product(0.0), ValueError, "sigma must be a finite number other than 0, got 0.0"),
        (lambda: phisam.exp_product(math.nan), ValueError, "sigma must be a finite number other than 0, got nan"),
        (lambda: phisam.eigen_power(0), ValueError, "k must be an integer >= 1, got 0"),
        (lambda: phisam.eigen_power(1.5), ValueError, r"k must be an integer >= 1, got 1\.5"),  # type: ignore[arg-type]
        (lambda: phisam.hypercube(0.0), ValueError, "half_width must be a positive finite number, got 0.0"),
        (lambda: phisam.trace().with_noise("gaussian"), TypeError, "noise must be a phisam noise"),  # type: ignore[arg-type]
        (lambda: phisam.frobenius().n_points(1), ValueError, "use n_samples >= 2, or measure=phisam.frobenius"),
        (lambda: phisam.trace().n_points(0), ValueError, "n_samples = 0, but the mean over mu needs n_samples >= 1"),
    ],
)
def test_mistakes(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_phi_that_returns_no_number_and_noises_that_do_not_match_psi() -> None:
    with pytest.raises(ValueError, match="phi must return one number"):
        phisam.Measure(lambda t: t.expand(2), lambda t: t, phisam.gaussian()).value(losses(1.0), 1.0)
    two = phisam.Measure(lambda t: t[0], lambda t: t, [phisam.gaussian(), phisam.gaussian()])
    with pytest.raises(ValueError, match="2 noises need a psi with 2 components, it has 1"):
        two.value(losses(1.0, 2.0), 1.0)
