"""Schedules of rho and lam: closed forms, end values, warm-up, what a step uses, and resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import phisam
from phisam import schedules
from tests.phisam.cases import Vector, network

Schedule = Callable[[int], float]


def test_constant() -> None:
    assert [schedules.constant(0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (0.7, 0.1), (0.0, 1.0), (-1.0, 2.0)])
@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
def test_from_start_to_end(make: Callable[[float, float, int], Schedule], start: float, end: float) -> None:
    """start in step 0, half-way at half of the steps, end at `steps` and for ever after; monotone between."""
    schedule = make(start, end, 8)
    values = [schedule(step) for step in range(20)]
    assert values[0] == pytest.approx(start, rel=1e-14, abs=1e-15)
    assert values[4] == pytest.approx((start + end) / 2, rel=1e-14)
    assert values[8:] == pytest.approx([end] * 12, rel=1e-14, abs=1e-15)
    assert sorted(values[:9], reverse=end < start) == values[:9]
    assert len(set(values[:9])) == 9
    assert schedule(10**12) == values[8]


def test_linear_and_cosine_are_their_formulas() -> None:
    linear, cosine = schedules.linear(0.2, 1.0, 5), schedules.cosine(0.2, 1.0, 6)
    assert [linear(t) for t in range(6)] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84, 1.0], rel=1e-14)
    # cos(0), cos(30), 60, 90, 120, 150, 180 degrees
    cosines = [1, math.sqrt(3) / 2, 0.5, 0, -0.5, -math.sqrt(3) / 2, -1]
    assert [cosine(t) for t in range(7)] == pytest.approx([1.0 - 0.8 * (1 + c) / 2 for c in cosines], rel=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_warmup_is_never_zero_and_ends_at_its_value(steps: int) -> None:
    schedule = schedules.warmup(0.05, steps)
    values = [schedule(step) for step in range(steps + 3)]
    assert values[:steps] == pytest.approx([0.05 * (step + 1) / steps for step in range(steps)], rel=1e-14)
    assert min(values) > 0
    assert values[steps - 1 :] == [0.05] * 4


def test_warmup_of_a_schedule_multiplies_it() -> None:
    """The schedule's own clock runs from step 0: warm-up delays nothing."""
    after = schedules.cosine(1.0, 0.0, 10)
    schedule = schedules.warmup(after, 4)
    assert [schedule(t) for t in range(12)] == pytest.approx(
        [0.25, 0.5 * after(1), 0.75 * after(2), *(after(t) for t in range(3, 12))], rel=1e-14, abs=1e-15
    )
    nested = schedules.warmup(schedules.warmup(1.0, 2), 4)
    assert [nested(t) for t in range(4)] == pytest.approx([0.125, 0.5, 0.75, 1.0])


def optimizer(rho: float | Schedule, lam: float | Schedule, **settings: int) -> tuple[phisam.PhiSAM, list[Tensor]]:
    """mu = Dirac at (1, ..., 1): the points of a step are x + rho, so that the rho of a step can be seen."""
    _, x = network()
    model = Vector(x)
    noise = phisam.dirac(torch.ones(len(x), dtype=torch.float64))
    base = torch.optim.SGD([model.x], lr=0.1, momentum=0.9)
    opt = phisam.PhiSAM(model, base, phisam.trace(), noise=noise, n_samples=1, rho=rho, lam=lam, **settings)
    return opt, []


def take(opt: phisam.PhiSAM, steps: int, seen: list[Tensor]) -> list[tuple[float, float]]:
    """(rho, lam) that each step used: rho from the perturbed point, lam from w_1 = lam / n."""
    L, _ = network()
    (x,) = opt.model.parameters()
    used = []

    def closure() -> Tensor:
        seen.append(x.detach().clone())
        return L(x)

    for _ in range(steps):
        seen.clear()
        opt.step(closure)
        used.append((float((seen[1] - seen[0]).mean()), float(opt.last_step.weights[1])))
    return used


def test_a_step_uses_the_value_of_its_own_step() -> None:
    rho, lam = schedules.warmup(0.4, 3), schedules.linear(1.0, 0.2, 4)
    opt, seen = optimizer(rho, lam)
    for step in range(7):
        assert opt.rho == rho(step)  # of the coming step
        assert opt.lam == lam(step)
        ((used_rho, used_lam),) = take(opt, 1, seen)
        assert used_rho == pytest.approx(rho(step), rel=1e-12)
        assert used_lam == pytest.approx(lam(step), rel=1e-12)
        record = opt.last_step  # delta divides by the rho that the step had
        assert float(record.delta) == pytest.approx(float(record.losses[1] - record.losses[0]) / rho(step) ** 2)
        assert float(record.sharpness) == pytest.approx(float(record.delta))


def test_every_multiplies_the_scheduled_lam() -> None:
    lam = schedules.linear(0.1, 0.4, 6)
    opt, seen = optimizer(0.3, lam, every=3)
    L, _ = network()
    (x,) = opt.model.parameters()
    for step in range(7):
        if step % 3 == 0:
            ((_, used),) = take(opt, 1, seen)
            assert used == pytest.approx(3 * lam(step), rel=1e-12)
        else:
            opt.step(lambda: L(x))
            assert opt.last_step.losses.shape == (1,)


def test_an_assigned_number_or_schedule_replaces_what_was_there() -> None:
    opt, seen = optimizer(schedules.linear(0.1, 0.5, 4), 1.0)
    take(opt, 2, seen)
    opt.rho, opt.lam = 0.25, schedules.linear(0.0, 1.0, 10)
    used = take(opt, 3, seen)
    assert [rho for rho, _ in used] == pytest.approx([0.25] * 3)
    assert [lam for _, lam in used] == pytest.approx([0.2, 0.3, 0.4])
    opt.rho = schedules.constant(0.125)
    assert take(opt, 1, seen)[0][0] == pytest.approx(0.125)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_resumed_run_goes_on_in_its_schedules(at: int) -> None:
    rho, lam = schedules.warmup(schedules.cosine(0.4, 0.1, 6), 3), schedules.linear(1.0, 0.2, 5)
    whole, seen = optimizer(rho, lam)
    expected = take(whole, 8, seen)

    first, seen = optimizer(rho, lam)
    take(first, at, seen)
    state = copy.deepcopy(first.state_dict())
    weights = copy.deepcopy(first.model.state_dict())

    second, seen = optimizer(rho, lam)
    second.model.load_state_dict(weights)
    second.load_state_dict(state)
    assert (second.rho, second.lam) == (rho(at), lam(at))
    assert take(second, 8 - at, seen) == expected[at:]
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_a_rho_that_a_schedule_may_not_have_is_refused_and_nothing_is_moved(value: float) -> None:
    """Step 2 of the schedule is no radius: the error says rho, and the step leaves x as it was."""
    opt, seen = optimizer(lambda step: 0.3 if step < 2 else value, 1.0)
    take(opt, 2, seen)
    (x,) = opt.model.parameters()
    before = x.detach().clone()
    with pytest.raises(ValueError, match="rho"):
        take(opt, 1, seen)
    assert torch.equal(x, before)


@pytest.mark.parametrize("steps", [0, -3])
@pytest.mark.parametrize("make", [lambda n: schedules.linear(0.1, 0.2, n), lambda n: schedules.warmup(0.1, n)])
def test_a_schedule_of_no_steps_is_refused(make: Callable[[int], Schedule], steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        make(steps)
