"""What users change between steps is checked then, followed, and never taken half."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phisam


def make(measure: phisam.Measure, **settings: Any) -> tuple[nn.Module, phisam.PhiSAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, phisam.PhiSAM(model, base, measure, **{"rho": 0.1, **settings})


def step(model: nn.Module, opt: phisam.PhiSAM) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (8,), generator=generator)
    return opt.step(lambda part: nn.functional.cross_entropy(model(part(x)), part(y)))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("every", 0, "every must be an integer >= 1, got 0"),
        ("every", 1.5, r"every must be an integer >= 1, got 1\.5"),
        ("perturb_fraction", 1.1, r"perturb_fraction must be in \(0, 1\], got 1\.1"),
        ("scope", "local", 'scope must be "global" or "shard", got \'local\''),
        ("n_samples", 2.5, r"n_samples must be an integer, got 2\.5"),
        ("measure", phisam.trace, r"measure must be a phisam\.Measure"),
        ("measure", phisam.frobenius().with_noise(phisam.gaussian().antithetic()), "n_samples = 3, but antithetic"),
    ],
)
def test_assigned_settings_are_checked_as_those_of_the_constructor(setting: str, value: Any, message: str) -> None:
    model, opt = make(phisam.frobenius(), n_samples=3)
    before = getattr(opt, setting)
    with pytest.raises(ValueError, match=message):
        setattr(opt, setting, value)
    assert getattr(opt, setting) is before
    with pytest.raises(ValueError, match=message):
        make(**{"measure": phisam.frobenius(), "n_samples": 3, setting: value})
    step(model, opt)


@pytest.mark.parametrize(
    "measure",
    [
        phisam.frobenius,
        lambda: phisam.ssam(fisher_samples=4),
        lambda: phisam.trace().with_noise(phisam.gaussian().masked(torch.arange(43) % 2)),
    ],
    ids=["frobenius", "ssam", "masked"],
)
def test_a_measure_that_is_assigned_steps_as_one_given_at_the_start(measure: Any) -> None:
    model, opt = make(phisam.sgd())
    opt.measure = measure()
    other, from_the_start = make(measure())
    for _ in range(3):
        assert torch.equal(step(model, opt), step(other, from_the_start))
    assert opt.last_step.measure is opt.measure
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_measure_whose_mask_does_not_fit_is_refused_in_every_step_until_it_is_replaced() -> None:
    model, opt = make(phisam.sgd())
    opt.measure = phisam.trace().with_noise(phisam.gaussian().masked(torch.ones(7)))
    for _ in range(2):
        with pytest.raises(ValueError, match="the mask has 7 numbers, the trained parameters have 43"):
            step(model, opt)
    opt.measure = phisam.trace()
    step(model, opt)


def test_parameters_that_cannot_be_perturbed_are_refused_in_every_step() -> None:
    model, opt = make(phisam.trace())
    model.half()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is torch\.float16, which cannot hold a small perturbation"):
            step(model, opt)


def test_a_rho_scale_that_is_assigned_acts_in_the_next_step() -> None:
    model, opt = make(phisam.trace(), lam=1.0)
    opt.param_groups[0]["rho_scale"] = 0.0
    step(model, opt)
    assert float(opt.last_step.delta.abs().max()) == 0.0
    opt.param_groups[0]["rho_scale"] = 1.0
    step(model, opt)
    assert float(opt.last_step.delta.abs().max()) > 0.0
    opt.param_groups[0]["rho_scale"] = float("nan")
    with pytest.raises(ValueError, match="rho_scale of a parameter group must be a finite number"):
        step(model, opt)


def test_a_gradient_of_weight_zero_is_not_kept_but_checked() -> None:
    """SAM with lam = 1: grad L_0 makes the direction alone, and an infinite one must skip the step all the same."""

    class Root(torch.autograd.Function):
        """x -> 0 with an infinite slope at 0, where the network stands."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.abs().sqrt()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            slope: Tensor = 0.5 / x.abs().sqrt()
            return gradients[0] * slope

    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), phisam.sam(), rho=0.1)
    opt.step(lambda: Root.apply(model.weight).sum())
    assert opt.skipped_steps == 1
    assert float(model.weight.detach()) == 0.0
