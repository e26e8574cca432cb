"""noise.preconditioned: D against its closed form, the length of v, the first step, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

import phisam
from phisam import reference
from phisam.noise import Preconditioning
from phisam.preconditioning import diagonal
from tests.phisam.cases import Vector, draws, network


def trained(base: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> tuple[Vector, phisam.PhiSAM]:
    L, x = network()
    model = Vector(x)
    opt = phisam.PhiSAM(model, base([model.x]), phisam.trace(), noise=phisam.gaussian(), n_samples=2, rho=0.1)
    for _ in range(steps):
        opt.step(lambda: L(model.x))
    return model, opt


@pytest.mark.parametrize(("power", "damping"), [(1.0, 0.1), (0.5, 0.3)])
@pytest.mark.parametrize(
    ("base", "slot"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.01), "exp_avg_sq"),
        (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), "exp_avg_sq"),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), "square_avg"),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), "sum"),
    ],
    ids=["adam", "adamw", "rmsprop", "adagrad"],
)
def test_the_gradient_is_that_of_the_reference(
    base: Callable[[list[nn.Parameter]], torch.optim.Optimizer], slot: str, power: float, damping: float
) -> None:
    """At the points that the base optimizer's own state gives, as the step found it."""
    L, _ = network()
    model, opt = trained(base, steps=3)
    m2 = opt.base_optimizer.state[model.x][slot].clone()
    assert m2.std() > 0.1 * m2.mean()  # D is no multiple of 1
    opt.measure = phisam.frobenius().with_noise(phisam.gaussian().preconditioned(power, damping))
    x = model.x.detach().clone()
    v = draws(phisam.frobenius(), 2, len(x), step=3)
    opt.step(lambda: L(model.x))
    moved = torch.stack([reference.preconditioned(v_i, m2, power, damping) for v_i in v])
    losses = torch.stack([L(x), *(L(x + 0.1 * v_i) for v_i in moved)])
    torch.testing.assert_close(opt.last_step.losses, losses, rtol=0, atol=1e-12)
    assert model.x.grad is not None
    torch.testing.assert_close(model.x.grad, reference.algorithm_3(L, x, moved, 0.1), rtol=1e-9, atol=1e-9)


def test_the_length_of_v_is_kept_on_average() -> None:
    """E‖D v‖^2 = sum D_j^2 = d, whatever the second moment's scale; dead parameters are moved damping^-power as far."""
    m2 = torch.rand(500, dtype=torch.float64, generator=Generator().manual_seed(1)) ** 4
    m2[:50] = 0
    held = [torch.zeros(500, dtype=torch.float64)]

    def of(scale: float) -> Tensor:
        found = diagonal([scale * m2], held, Preconditioning(1.0, 0.1), torch.linalg.vector_norm, 500)
        assert found is not None
        return found

    assert float((of(1.0) ** 2).sum()) == pytest.approx(500)
    torch.testing.assert_close(of(1e-12), of(1.0))
    strongest = m2.argmax()
    ratio = 1 + 10 * (m2[strongest] / m2.mean()).sqrt()
    assert float(of(1.0)[0] / of(1.0)[strongest]) == pytest.approx(float(ratio))


def test_before_the_first_step_it_is_the_plain_noise_bit_for_bit() -> None:
    L, x = network()
    losses = []
    for noise in (phisam.gaussian(), phisam.gaussian().preconditioned()):
        model = Vector(x)
        opt = phisam.PhiSAM(model, torch.optim.Adam([model.x]), phisam.trace(), noise=noise, rho=0.1)
        opt.step(lambda model=model: L(model.x))  # type: ignore[misc]
        losses.append(opt.last_step.losses)
        opt.step(lambda model=model: L(model.x))  # type: ignore[misc]
        losses.append(opt.last_step.losses)
    assert torch.equal(losses[0], losses[2])
    assert not torch.allclose(losses[1], losses[3])


def test_a_second_moment_of_zeros_is_the_plain_noise() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    found = diagonal([zeros], [zeros], Preconditioning(1.0, 0.1), torch.linalg.vector_norm, 4)
    assert found is not None
    torch.testing.assert_close(found, torch.ones_like(zeros))
    assert diagonal([None], [zeros], Preconditioning(1.0, 0.1), torch.linalg.vector_norm, 4) is None


class NoMoment(torch.optim.Optimizer):
    """Keeps something else."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps"] = 1


def test_what_is_refused() -> None:
    noise = phisam.gaussian().preconditioned()
    L, x = network()
    model = Vector(x)
    with pytest.raises(ValueError, match="SGD keeps none"):
        phisam.PhiSAM(model, torch.optim.SGD([model.x], lr=0.1), phisam.trace(), noise=noise)
    opt = phisam.PhiSAM(model, NoMoment([model.x], {}), phisam.trace(), noise=noise)
    opt.step(lambda: L(model.x))
    with pytest.raises(ValueError, match="NoMoment keeps none"):
        opt.step(lambda: L(model.x))
    with pytest.raises(ValueError, match="use one of them"):
        noise.adaptive()
    with pytest.raises(ValueError, match="use one of them"):
        phisam.gaussian().adaptive().preconditioned()
    for fixed in (phisam.dirac(torch.ones(3)), phisam.gradient_direction()):
        with pytest.raises(ValueError, match="not drawn"):
            fixed.preconditioned()
    for settings in ({"power": 0.0}, {"damping": 0.0}, {"power": float("inf")}):
        with pytest.raises(ValueError, match="must be a finite number > 0"):
            phisam.gaussian().preconditioned(**settings)
