"""Each finding on quadratics, where its number is known, and not where there is nothing to find."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import phisam
from phisam import diagnostics
from phisam.diagnostics import findings, numbers
from phisam.record import StepRecord
from tests.phisam.cases import Vector, quadratic

EIGENVALUES = torch.tensor([1.0, 2.0, 3.0, 4.0])


def found_of(
    measure: phisam.Measure, x: Tensor, *, rho: float = 0.1, n: int = 4, steps: int = 200, lam: float = 0.1
) -> dict[str, diagnostics.Finding]:
    """At x, which does not move."""
    L, _ = quadratic(EIGENVALUES)
    model = Vector(x)
    opt = phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.0), measure, rho=rho, lam=lam, n_samples=n)
    sums = torch.zeros(diagnostics.SUMS, dtype=torch.float64)
    for _ in range(steps):
        opt.step(lambda: L(model.x))
        sums += numbers(opt.last_step)
    return {finding.name: finding for finding in findings(sums)}


def gradient_of(x: Tensor) -> Tensor:
    _, H = quadratic(EIGENVALUES)
    return H @ x


MINIMUM = torch.zeros(4, dtype=torch.float64)
AWAY = torch.tensor([0.5, -0.5, 0.3, 0.2], dtype=torch.float64)


def test_signal_of_the_trace_on_a_quadratic() -> None:
    """At the minimum R = v^T H v / 2 of n draws: mean tr H / 2 = 5, variance ‖H‖_F^2 / 2 n = 15 / 4."""
    signal = found_of(phisam.trace().with_noise(phisam.gaussian()), MINIMUM)["signal"]
    assert signal.value == pytest.approx(5 / math.sqrt(15 / 4), rel=0.15)
    assert signal.text is None


def test_a_drowned_term_is_told() -> None:
    """Far from a minimum R of one draw has standard deviation ‖g‖ / rho, hundreds of times its mean."""
    measure = phisam.trace().with_noise(phisam.gaussian())
    drowned = found_of(measure, 10 * AWAY, rho=1e-3, n=1, steps=50)["signal"]
    expected = 5 / (float(gradient_of(10 * AWAY).norm()) / 1e-3)
    assert drowned.value < 3 / math.sqrt(50)
    assert expected < 0.01
    assert drowned.text is not None
    assert "n_samples" in drowned.text
    pairs = found_of(measure.with_noise(phisam.gaussian().symmetric()), 10 * AWAY, rho=1e-3, n=1, steps=50)["signal"]
    assert pairs.text is None


@pytest.mark.parametrize(("rho", "told"), [(0.1, True), (10.0, False)])
def test_the_share_of_the_first_order(rho: float, told: bool) -> None:
    """a^2 = ‖g‖^2 / rho^2 and Var b = ‖H‖_F^2 / 2 = 15 on average."""
    found = found_of(phisam.trace().with_noise(phisam.gaussian().antithetic()), AWAY, rho=rho, n=8)["first_order"]
    a2 = float(gradient_of(AWAY).square().sum()) / rho**2
    assert found.value == pytest.approx(a2 / (a2 + 15), rel=0.2)  # 800 pairs, of a variance with heavy tails
    assert (found.text is not None) == told


def test_draws_without_pairs_do_not_tell_it() -> None:
    for noise in (phisam.gaussian(), phisam.gaussian().symmetric()):
        assert "first_order" not in found_of(phisam.trace().with_noise(noise), AWAY, steps=3)


def test_resolution_is_the_error_that_rounding_to_float32_makes() -> None:
    """delta of rounded losses against the exact one: 2/3 u^2 |L|^2 / rho^4 bounds it, and is not 10 times too large."""
    generator = torch.Generator().manual_seed(0)
    rho, n = 1e-3, 4000
    L = 1.7 + 1e-7 * torch.randn(n + 1, dtype=torch.float64, generator=generator)
    exact, rounded = ((x[1:] - x[0]) / rho**2 for x in (L, L.float().double()))
    error = float((rounded - exact).var() * 2)  # of L_i, and as much again of L_0, which is one draw
    record = StepRecord(L, torch.ones(n + 1, dtype=torch.float64), rho, phisam.trace())
    bound = float(numbers(record)[7])
    assert error <= bound <= 10 * error
    (found,) = [finding for finding in findings(numbers(record)) if finding.name == "resolution"]
    assert found.value == pytest.approx(bound / float(exact.square().mean()))
    assert found.text is not None
    fine = findings(numbers(record, float32=False))
    assert all(finding.text is None for finding in fine if finding.name == "resolution")


def test_a_negative_w_0_is_told() -> None:
    measure = phisam.trace()
    assert found_of(measure, AWAY, lam=2.0, steps=3)["w0_negative"].value == 1.0
    assert found_of(measure, AWAY, lam=1.0, steps=3)["w0_negative"].text is None


def test_what_has_no_term_or_no_number_adds_nothing() -> None:
    bad = torch.tensor([1.0, math.inf], dtype=torch.float64)
    for losses, measure in ((torch.ones(1, dtype=torch.float64), phisam.sgd()), (bad, phisam.trace())):
        record = StepRecord(losses, torch.ones_like(losses), 0.1, measure)
        assert torch.equal(numbers(record), torch.zeros(diagnostics.SUMS, dtype=torch.float64))
    assert findings(torch.zeros(diagnostics.SUMS)) == []
