"""SAM, ASAM and SSAM-F: the same steps as the peer package, and as the letters of their papers in `reference.py`."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import phisam
from phisam import reference
from tests.phisam.cases import Loss, Vector, network, phisam_gradient, quadratic
from tests.phisam.test_noise_options import evaluate

RHO = 0.3
EXACT = {"rtol": 1e-12, "atol": 1e-12}
peer = importlib.import_module("pytorch_optimizer.optimizer.sam")


def small_network(seed: int = 1, extra: tuple[nn.Module, ...] = ()) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 4)).double()  # d = 58


def batch(step: int, n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(0, 4, (n,), generator=generator)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy as a function of the flat x, in the model's order."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def L(x: Tensor) -> Tensor:
        parts = x.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, named, (inputs,)), targets)

    return L


def optimizer(model: nn.Module, measure: phisam.Measure, **settings: Any) -> phisam.PhiSAM:
    base = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-3)
    return phisam.PhiSAM(model, base, measure, **settings)


def by_part(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
    return lambda part: nn.functional.cross_entropy(model(part(inputs)), part(targets))


def train(opt: phisam.PhiSAM, steps: range) -> None:
    for step in steps:
        opt.step(by_part(opt.model, *batch(step)))


# The peer package


def peer_train(model: nn.Module, steps: int, adaptive: bool) -> None:
    opt = peer.SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=RHO,
        adaptive=adaptive,
        perturb_eps=0.0,
        lr=0.2,
        momentum=0.9,
        weight_decay=5e-3,
    )
    for step in range(steps):
        inputs, targets = batch(step)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        closure()
        opt.step(closure)


def norm_in_float64(groups: list[dict[str, Any]], *_: object, weight_adaptive: bool = False) -> Tensor:
    """What the peer's `get_global_gradient_norm` says it returns, without its rounding to float32."""
    squares = [
        ((p.grad * p.abs() if weight_adaptive and group["adaptive"] else p.grad) ** 2).sum()
        for group in groups
        for p in group["params"]
    ]
    return torch.stack(squares).sum().reshape(1)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_twenty_steps_equal_pytorch_optimizer(adaptive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum and weight decay included. asam(eta=0) is its adaptive=True at the same rho: no conversion.

    The package rounds ‖grad L‖ to float32 whatever the parameters are; its norm in float64 is put in its place. Its
    perturb_eps, which is added to the norm, is 0 here: it guards against a division by zero, as our v = 0 does.
    """
    monkeypatch.setattr(peer, "get_global_gradient_norm", norm_in_float64)
    ours, theirs = small_network(), small_network()
    start = flat(ours)
    train(optimizer(ours, phisam.asam(eta=0.0) if adaptive else phisam.sam(), rho=RHO), range(20))
    peer_train(theirs, 20, adaptive)
    assert float((flat(ours) - start).norm()) > 1
    torch.testing.assert_close(flat(ours), flat(theirs), **EXACT)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_pytorch_optimizer_as_shipped_is_as_near_as_its_float32_norm(adaptive: bool) -> None:
    ours, theirs = small_network(), small_network()
    train(optimizer(ours, phisam.asam(eta=0.0) if adaptive else phisam.sam(), rho=RHO), range(20))
    peer_train(theirs, 20, adaptive)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-6)


# The papers


@pytest.mark.parametrize("lam", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("n_samples", [1, 2, 5])
def test_sam_is_its_paper_and_lam_mixes(n_samples: int, lam: float) -> None:
    """lam = 1: the gradient at the perturbed point alone. 0 < lam < 1: (1 - lam) grad L(x) + lam grad L(x + eps)."""
    L, x = network()
    g = phisam_gradient(L, x, phisam.sam(), n_samples, rho=RHO, lam=lam)
    torch.testing.assert_close(g, (1 - lam) * reference.gradient(L, x) + lam * reference.sam(L, x, RHO), **EXACT)


@pytest.mark.parametrize("lam", [1.0, 0.4])
@pytest.mark.parametrize("eta", [0.0, 0.01, 2.0])
def test_asam_is_its_paper(eta: float, lam: float) -> None:
    L, x = network()
    g = phisam_gradient(L, x, phisam.asam(eta=eta), 1, rho=RHO, lam=lam)
    torch.testing.assert_close(g, (1 - lam) * reference.gradient(L, x) + lam * reference.asam(L, x, RHO, eta), **EXACT)


def test_asam_is_sam_where_t_is_constant() -> None:
    """T = c I: v = c grad L / ‖grad L‖, so rho is c times as long."""
    L, x = network()
    x = 0.25 * torch.sign(x)
    g = phisam_gradient(L, x, phisam.asam(eta=0.5), 1, rho=RHO)
    torch.testing.assert_close(g, reference.sam(L, x, 0.75 * RHO), **EXACT)


@pytest.mark.parametrize("scaled", ["weight", "all"])
@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_which_parameters_asam_scales(eta: float, scaled: str) -> None:
    model, (inputs, targets) = small_network(), batch(0)
    is_weight = torch.cat([torch.full((p.numel(),), "weight" in name) for name, p in model.named_parameters()])
    assert 0 < int(is_weight.sum()) < len(is_weight)
    x, L = flat(model), loss_of(model, inputs, targets)
    opt = optimizer(model, phisam.asam(eta=eta, scaled=scaled), rho=RHO)
    opt.step(lambda: nn.functional.cross_entropy(model(inputs), targets))
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    expected = reference.asam(L, x, RHO, eta, is_weight if scaled == "weight" else None)
    torch.testing.assert_close(g, expected, **EXACT)


@pytest.mark.parametrize("make", [phisam.sam, phisam.asam], ids=["sam", "asam"])
@pytest.mark.parametrize("n_samples", [1, 4])
def test_one_perturbed_point_whatever_n_samples_is(make: Callable[[], phisam.Measure], n_samples: int) -> None:
    L, x = network()
    assert make().n_points(n_samples) == 1
    opt, points = evaluate(L, x, make(), n_samples, rho=RHO)
    assert len(points) == 2
    assert opt.gradient_evaluations_per_step == 2
    torch.testing.assert_close(opt.last_step.weights, torch.tensor([0.0, 1.0], dtype=torch.float64), **EXACT)
    expected = (L(points[1]) - L(x)) / RHO**2
    torch.testing.assert_close(opt.last_step.delta, expected[None], **EXACT)
    torch.testing.assert_close(opt.last_step.sharpness, expected, **EXACT)


# Where the gradient vanishes


@pytest.mark.parametrize("measure", [phisam.sam(), phisam.asam(eta=0.1), phisam.asam(eta=0.0)], ids=lambda m: m.name)
def test_a_zero_gradient_gives_no_perturbation_and_no_nan(measure: phisam.Measure) -> None:
    L, _ = quadratic(torch.tensor([1.0, -2.0, 3.0]))
    opt, points = evaluate(L, torch.zeros(3, dtype=torch.float64), measure, 1, rho=RHO)
    assert torch.equal(torch.stack(points), torch.zeros(2, 3, dtype=torch.float64))
    assert opt.skipped_steps == 0
    assert float(opt.last_step.delta) == 0
    assert all(torch.equal(p.grad, torch.zeros(3, dtype=torch.float64)) for p in opt.model.parameters())


def test_asam_without_eta_at_x_zero_has_t_zero() -> None:
    """T grad L = 0 though grad L is not: v = 0 and g = grad L."""
    L, x = network()
    x = torch.zeros_like(x)
    opt, points = evaluate(L, x, phisam.asam(eta=0.0), 1, rho=RHO)
    assert torch.equal(points[1], x)
    assert torch.equal(next(opt.model.parameters()).grad, reference.gradient(L, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-30, 1e-36, 1e-160, 1e-250, 1e-300])
def test_a_tiny_gradient_never_gives_more_than_a_unit_v(size: float, dtype: torch.dtype) -> None:
    """Squares of such numbers underflow, and with them ‖grad L‖: v may then be short, never long."""
    c = torch.tensor([3.0, -4.0], dtype=torch.float64) * size
    opt, points = evaluate(lambda x: x @ c.to(x.dtype), torch.zeros(2, dtype=dtype), phisam.sam(), 1, rho=RHO)
    length = float((points[1].double() - points[0].double()).norm()) / RHO
    assert length < 1.001
    assert opt.skipped_steps == 0


def test_a_parameter_that_the_loss_does_not_use_stays_where_it_is() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
            self.unused = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))

    model, seen = Two(), []

    def closure() -> Tensor:
        seen.append(torch.cat([model.used.detach(), model.unused.detach()]))
        return (model.used**2).sum()

    phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.0), phisam.sam(), rho=RHO).step(closure)
    unit = torch.tensor([1.0, 2.0], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(seen[1] - seen[0], RHO * torch.cat([unit, torch.zeros(1).double()]), **EXACT)
    assert model.unused.grad is None


# The gradient as one mu among others


def test_the_gradient_noise_with_another_measure_is_algorithm_1() -> None:
    """psi = exp(-t), phi = -2 log t, mu a Dirac measure at grad L / ‖grad L‖: every draw is the same point."""
    L, x = network()
    v = reference.gradient(L, x) / reference.gradient(L, x).norm()
    g = phisam_gradient(L, x, phisam.log_determinant(), 3, noise=phisam.gradient_direction(), rho=RHO, lam=0.7)
    expected = reference.algorithm_1(
        L, x, v.expand(3, -1), RHO, lambda t: -2 * torch.log(t), lambda t: torch.exp(-t), 0.7
    )
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient_first", [True, False])
def test_a_list_of_the_gradient_and_a_gaussian_is_algorithm_2(gradient_first: bool) -> None:
    L, x = network()
    noises = [phisam.gradient_direction(), phisam.gaussian()]
    noises = noises if gradient_first else noises[::-1]
    measure = phisam.Measure(lambda t: t[0] * t[1] + t[0], lambda t: (torch.sin(t), torch.exp(-t)), noises)
    opt, points = evaluate(L, x, measure, 3, rho=RHO, lam=0.7, seed=4)
    v = (torch.stack(points[1:]) - x) / RHO
    mu = [v[0::2], v[1::2]]
    unit = reference.gradient(L, x) / reference.gradient(L, x).norm()
    of_gradient, of_gaussian = mu if gradient_first else reversed(mu)
    torch.testing.assert_close(of_gradient, unit.expand(3, -1), **EXACT)
    drawn = torch.pdist(of_gaussian)
    assert float(drawn.min()) > 1  # three draws, no two alike
    expected = reference.algorithm_2(
        L, x, mu, RHO, lambda t: t[0] * t[1] + t[0], (torch.sin, lambda t: torch.exp(-t)), 0.7
    )
    torch.testing.assert_close(next(opt.model.parameters()).grad, expected, rtol=1e-10, atol=1e-10)


def test_gradient_adaptive_is_asam_and_gradient_masked_is_ssam() -> None:
    L, x = network()
    mask = (torch.arange(len(x)) % 3 == 0).double()
    trace = phisam.trace()
    adaptive = phisam_gradient(L, x, trace, 1, noise=phisam.gradient_direction().adaptive(0.2), rho=RHO)
    torch.testing.assert_close(adaptive, reference.asam(L, x, RHO, 0.2), **EXACT)
    masked = phisam_gradient(L, x, trace, 1, noise=phisam.gradient_direction().masked(mask), rho=RHO)
    torch.testing.assert_close(masked, reference.ssam(L, x, RHO, mask), **EXACT)


# SSAM-F


def oracle_mask(model: nn.Module, x: Tensor, inputs: Tensor, targets: Tensor, sparsity: float, samples: int) -> Tensor:
    single = [loss_of(model, inputs[i : i + 1], targets[i : i + 1]) for i in range(samples)]
    return reference.fisher_mask(reference.fisher_diagonal(single, x), sparsity)


def step_and_see(opt: phisam.PhiSAM, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """x and x + rho v of one step; v is seen where the whole batch is evaluated at another x."""
    seen: list[Tensor] = []

    def closure(part: Callable[[Tensor], Tensor]) -> Tensor:
        if len(part(inputs)) == len(inputs):
            seen.append(flat(opt.model))
        return nn.functional.cross_entropy(opt.model(part(inputs)), part(targets))

    x = flat(opt.model)
    opt.step(closure)
    (moved,) = [point for point in seen if not torch.equal(point, x)]
    return x, moved


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 29), (0.0, 58), (0.9, 6)])
@pytest.mark.parametrize("samples", [16, 3])
def test_ssam_is_its_paper_from_the_first_step_on(sparsity: float, kept: int, samples: int) -> None:
    model, (inputs, targets) = small_network(), batch(0)
    L, x = loss_of(model, inputs, targets), flat(model)
    mask = oracle_mask(model, x, inputs, targets, sparsity, samples)
    assert int(mask.sum()) == kept
    opt = optimizer(model, phisam.ssam(sparsity=sparsity, fisher_samples=samples), rho=RHO)
    at, moved = step_and_see(opt, inputs, targets)
    assert torch.equal(at, x)
    assert torch.equal((moved != x).double(), mask)
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(g, reference.ssam(L, x, RHO, mask), **EXACT)
    assert opt.gradient_evaluations_per_step == 2


def test_the_fisher_information_is_of_single_examples() -> None:
    """The square of the mean gradient, or too many examples, would keep other parameters."""
    model, (inputs, targets) = small_network(), batch(0)
    x = flat(model)
    mask = oracle_mask(model, x, inputs, targets, 0.5, 16)
    of_the_mean = reference.fisher_mask(reference.gradient(loss_of(model, inputs[:16], targets[:16]), x) ** 2, 0.5)
    assert not torch.equal(mask, of_the_mean)
    assert not torch.equal(mask, oracle_mask(model, x, inputs, targets, 0.5, 20))


def test_the_mask_stays_between_refreshes() -> None:
    """Made in steps 0, 3, 6 of that step's x and batch, and used as it is in the steps between."""
    model = small_network()
    opt = optimizer(model, phisam.ssam(refresh_every=3), rho=RHO)
    masks: list[Tensor] = []
    for step in range(8):
        inputs, targets = batch(step)
        if step % 3 == 0:
            mask = oracle_mask(model, flat(model), inputs, targets, 0.5, 16)
        x, moved = step_and_see(opt, inputs, targets)
        assert torch.equal((moved != x).double(), mask), step
        masks.append(mask)
    assert not torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[3], masks[6])


def test_a_run_that_resumes_between_refreshes_is_the_same_run() -> None:
    whole, first, second = small_network(), small_network(), small_network(seed=9)
    train(optimizer(whole, phisam.ssam(refresh_every=5), rho=RHO), range(8))

    before = optimizer(first, phisam.ssam(refresh_every=5), rho=RHO)
    train(before, range(3))
    state, weights = copy.deepcopy(before.state_dict()), copy.deepcopy(first.state_dict())
    train(before, range(3, 4))  # what the first process did afterwards must not matter
    second.load_state_dict(weights)
    after = optimizer(second, phisam.ssam(refresh_every=5), rho=RHO)
    after.load_state_dict(state)
    train(after, range(3, 8))
    assert torch.equal(flat(second), flat(whole))


def test_ties_do_not_change_how_many_parameters_are_kept() -> None:
    """A tanh unit that no example reaches: its incoming weights have no Fisher information at all, and tie at 0."""
    model, (inputs, targets) = small_network(), batch(0)
    inputs[:, :3] = 0  # 18 of 58 Fisher entries are 0
    noise = phisam.gaussian().masked(phisam.fisher_mask(sparsity=0.1, fisher_samples=16))
    opt = optimizer(model, phisam.trace(), noise=noise, n_samples=1, rho=RHO)
    x, moved = step_and_see(opt, inputs, targets)
    assert int((moved != x).sum()) == 52


def test_the_look_at_single_examples_leaves_no_trace() -> None:
    """Evaluation mode while it looks, the modes and the buffers of before afterwards."""
    extra = (nn.BatchNorm1d(6), nn.Dropout(0.5))
    model, plain = small_network(extra=extra), small_network(extra=extra)
    for network_ in (model, plain):
        network_[2].eval()  # a dropout that its owner has switched off
    modes = [module.training for module in model.modules()]
    inputs, targets = batch(0)
    random_state = torch.get_rng_state()
    optimizer(model, phisam.ssam(), rho=RHO).step(by_part(model, inputs, targets))
    assert torch.equal(torch.get_rng_state(), random_state)
    optimizer(plain, phisam.sgd()).step(by_part(plain, inputs, targets))
    assert [module.training for module in model.modules()] == modes
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def masked_trace() -> phisam.Measure:
    return phisam.trace().with_noise(phisam.gaussian().masked(phisam.fisher_mask()))


@pytest.mark.parametrize("make", [phisam.ssam, masked_trace])
def test_a_closure_that_cannot_show_single_examples_is_refused(make: Callable[[], phisam.Measure]) -> None:
    model, (inputs, targets) = small_network(), batch(0)
    x = flat(model)
    with pytest.raises(ValueError, match="part"):
        optimizer(model, make(), rho=RHO).step(lambda: nn.functional.cross_entropy(model(inputs), targets))
    assert torch.equal(flat(model), x)


def test_lam_mixes_for_ssam_too() -> None:
    model, (inputs, targets) = small_network(), batch(0)
    L, x = loss_of(model, inputs, targets), flat(model)
    mask = oracle_mask(model, x, inputs, targets, 0.5, 16)
    optimizer(model, phisam.ssam(), rho=RHO, lam=0.25).step(by_part(model, inputs, targets))
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    expected = 0.75 * reference.gradient(L, x) + 0.25 * reference.ssam(L, x, RHO, mask)
    torch.testing.assert_close(g, expected, **EXACT)


def test_sam_of_a_vector_follows_rho_scale() -> None:
    """rho_scale multiplies a group's share of v after the normalisation, as for every noise."""
    L, x = network()
    model = Vector(x)
    base = torch.optim.SGD([{"params": [model.x], "rho_scale": 0.5}], lr=0.0)
    phisam.PhiSAM(model, base, phisam.sam(), rho=RHO).step(lambda: L(model.x))
    torch.testing.assert_close(model.x.grad, reference.sam(L, x, RHO / 2), **EXACT)


def test_a_mask_is_made_anew_when_other_parameters_are_trained() -> None:
    model = small_network()
    opt = optimizer(model, phisam.ssam(refresh_every=10), rho=RHO, lam=1.0)
    train(opt, range(2))
    model[0].requires_grad_(False)
    train(opt, range(2, 4))
    model[0].requires_grad_(True)
    train(opt, range(4, 6))
    assert opt.skipped_steps == 0
