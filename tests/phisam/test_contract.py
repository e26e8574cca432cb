"""What every measure must keep, whatever its (phi, psi, mu): one table, times what a training loop relies on."""

from __future__ import annotations

import copy
import typing
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phisam
from phisam.sharding import SampleMesh
from tests.phisam import gloo
from tests.phisam.contract import ALONG_THE_GRADIENT, TABLE, UNPERTURBED, Part, closure_of, evaluation_weights, sgd
from tests.phisam.test_optimizer import assert_bit_equal, examples, make_model, state

every_measure = pytest.mark.parametrize("name", TABLE)


def constructors_of(kind: type) -> set[str]:
    """The public functions of phisam that return a `kind`."""
    functions = {name: getattr(phisam, name) for name in phisam.__all__ if callable(getattr(phisam, name))}
    hints = {name: typing.get_type_hints(f).get("return") for name, f in functions.items() if not isinstance(f, type)}
    return {name for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, kind)}


def test_every_public_measure_and_noise_is_in_the_table() -> None:
    model = make_model()
    measures = [entry.optimizer(model).measure for entry in TABLE.values()]
    assert len(constructors_of(phisam.Measure)) >= 10
    assert constructors_of(phisam.Measure) | {"custom"} == {measure.name for measure in measures}
    drawn = {noise.name.split(",")[0] for measure in measures for noise in measure.noises}
    made = [
        getattr(phisam, name)(*([torch.ones(1)] if name == "dirac" else [])) for name in constructors_of(phisam.Noise)
    ]
    assert len(made) >= 6
    assert drawn == {noise.name for noise in made}


@every_measure
def test_resume_is_bit_exact_in_mid_run(name: str, tmp_path: Any) -> None:
    """With dropout and momentum; ssam's mask is then 2 steps old, and due again 2 steps later."""
    entry = TABLE[name]
    model = make_model(dropout=0.3)
    opt = entry.optimizer(model)
    for _ in range(6):
        opt.step(closure_of(model))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    for _ in range(4):
        opt.step(closure_of(model))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make_model(dropout=0.3)
    resumed_opt = entry.optimizer(resumed, seed=99, rho=5.0, lam=0.0)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    for _ in range(4):
        resumed_opt.step(closure_of(resumed))
    assert_bit_equal(state(model), state(resumed))
    assert_bit_equal({"losses": opt.last_step.losses}, {"losses": resumed_opt.last_step.losses})
    assert opt.skipped_steps == 0


@every_measure
def test_a_state_dict_is_a_snapshot(name: str) -> None:
    """Steps after it do not change what PhiSAM itself put into it (the base optimizer's slots are torch's matter)."""
    model = make_model()
    opt = TABLE[name].optimizer(model)
    opt.step(closure_of(model))
    own = opt.state_dict()["phisam"]
    before = copy.deepcopy(own)
    for _ in range(5):
        opt.step(closure_of(model))
    torch.testing.assert_close(own, before, rtol=0, atol=0)


@every_measure
def test_a_scheduler_does_the_same_on_either_optimizer(name: str) -> None:
    def train(on: str) -> dict[str, Tensor]:
        model = make_model()
        opt = TABLE[name].optimizer(model)
        scheduler = torch.optim.lr_scheduler.StepLR(
            opt if on == "phisam" else opt.base_optimizer, step_size=1, gamma=0.5
        )
        for lr in (0.05, 0.025, 0.0125):
            assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"] == lr
            opt.step(closure_of(model))
            scheduler.step()
        return state(model)

    assert_bit_equal(train("phisam"), train("base"))


class Breaks(torch.autograd.Function):
    """The identity; its backward is interrupted."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyboardInterrupt


def interrupted(closure: Callable[[Part], Tensor], at_call: int, where: str) -> Callable[[Part], Tensor]:
    """The closure, with Ctrl-C after its forward, or in the backward, of one of its calls."""
    calls = iter(range(10**6))

    def wrapped(part: Part) -> Tensor:
        loss = closure(part)
        if next(calls) != at_call:
            return loss
        if where == "forward":
            raise KeyboardInterrupt
        return Breaks.apply(loss)  # type: ignore[no-any-return]

    return wrapped


@pytest.mark.parametrize("where", ["forward", "backward"])
@every_measure
def test_an_exception_at_any_point_leaves_everything_as_it_was(name: str, where: str) -> None:
    """ssam's mask is renewed in the step that is interrupted, so that its passes over examples are among the points."""
    entry = TABLE[name]
    model = make_model(dropout=0.3)
    opt = entry.optimizer(model)
    for _ in range(4):
        opt.step(closure_of(model))
    before, before_opt = state(model), copy.deepcopy(opt.state_dict())

    undisturbed = copy.deepcopy(model)
    undisturbed_opt = entry.optimizer(undisturbed)
    undisturbed_opt.load_state_dict(copy.deepcopy(before_opt))
    calls = 0

    def counted(part: Part) -> Tensor:
        nonlocal calls
        calls += 1
        return closure_of(undisturbed)(part)

    undisturbed_opt.step(counted)
    assert calls >= 1 if name in UNPERTURBED else calls >= 2

    random_state = torch.get_rng_state()
    for at_call in range(calls):
        with pytest.raises(KeyboardInterrupt):
            opt.step(interrupted(closure_of(model), at_call, where))
        assert torch.equal(torch.get_rng_state(), random_state)
        assert_bit_equal(before, state(model))
    opt.step(closure_of(model))
    assert_bit_equal(state(undisturbed), state(model))
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("base", ["sgd", "fused_adam"])
@every_measure
def test_lam_0_is_the_base_optimizer_bit_for_bit(name: str, base: str) -> None:
    if base == "sgd" and TABLE[name].preconditioned:
        pytest.skip("SGD has no second moment")

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if base == "sgd":
            return sgd(model.parameters())
        return torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)

    model, plain = make_model(), make_model()
    opt = TABLE[name].optimizer(model, optimizer(model), lam=0.0)
    plain_opt = optimizer(plain)
    for _ in range(5):
        opt.step(closure_of(model))
        plain_opt.zero_grad()
        closure_of(plain)(lambda t: t).backward()
        plain_opt.step()
    assert_bit_equal(state(model), state(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_measure
def test_the_parameters_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    opt = TABLE[name].optimizer(model)
    for _ in range(2):
        loss = opt.step(closure_of(model, dtype))
    assert loss.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {dtype}
    last = opt.last_step
    assert {t.dtype for t in (last.losses, last.weights, last.delta)} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_measure
def test_on_cuda_everything_stays_there(name: str) -> None:
    model = make_model(dropout=0.3).cuda()
    opt = TABLE[name].optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        loss = opt.step(closure_of(model))
    last = opt.last_step
    for tensor in (loss, last.losses, last.weights, last.delta, *model.parameters(), *model.buffers()):
        assert tensor.is_cuda
        assert torch.isfinite(tensor).all()
    assert opt.skipped_steps == 0
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Weights(nn.Module):
    """A linear function with the given weights and no bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) if self.weight.dim() else x * self.weight


@pytest.mark.parametrize("flat", ["at_x", "everywhere"])
@every_measure
def test_a_zero_gradient_gives_a_well_defined_step(name: str, flat: str) -> None:
    """At a minimum, and on a plateau: no 0 / 0 on the way to a direction, a mask or a weight."""
    x = examples()[0].double()
    start = torch.zeros(4, dtype=torch.float64)
    model = Weights(start)
    opt = TABLE[name].optimizer(model, TABLE[name].base(model.parameters(), lr=0.1))
    factor = 1.0 if flat == "at_x" else 0.0
    for _ in range(2):
        opt.step(lambda part: 1 + factor * (model(part(x)) ** 2).mean())
        assert opt.skipped_steps == 0
        assert torch.isfinite(model.weight).all()
        assert torch.isfinite(opt.last_step.losses).all()
        assert torch.isfinite(opt.last_step.weights).all()
        assert float(opt.last_step.weights.sum()) == pytest.approx(1.0)
        if flat == "everywhere" or name in UNPERTURBED | ALONG_THE_GRADIENT:
            assert torch.equal(model.weight, start)
            assert torch.equal(opt.last_step.losses, torch.ones_like(opt.last_step.losses))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
@every_measure
def test_one_parameter_of_one_number(name: str, shape: tuple[int, ...]) -> None:
    """L = mean (a x - 3)^2: g is sum_e w_e dL/dx at the points that the closure was evaluated at."""
    a = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    model = Weights(torch.full(shape, 0.7, dtype=torch.float64))
    opt = TABLE[name].optimizer(model, TABLE[name].base(model.parameters(), lr=0.0))
    points: list[Tensor] = []

    def closure(part: Part) -> Tensor:
        inputs = part(a)
        if len(inputs) == len(a):
            points.append(model.weight.detach().clone().reshape(()))
        return ((inputs * model.weight - 3) ** 2).mean()

    opt.step(closure)
    slopes = torch.stack([(2 * a * (a * point - 3)).mean() for point in points])
    expected = (evaluation_weights(opt) * slopes).sum()
    torch.testing.assert_close(model.weight.grad.reshape(()), expected, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(model.weight.grad).all()
    assert opt.skipped_steps == 0


@every_measure
def test_an_empty_parameter_group_changes_nothing(name: str) -> None:
    def train(groups: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
        model = make_model()
        opt = TABLE[name].optimizer(model, TABLE[name].base(groups(model)))
        for _ in range(3):
            opt.step(closure_of(model))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step(closure_of(model))
        return state(model)

    with_empty = train(lambda model: [{"params": []}, {"params": list(model.parameters())}])
    assert_bit_equal(with_empty, train(lambda model: model.parameters()))


@every_measure
def test_only_point_0_changes_buffers(name: str) -> None:
    """BatchNorm's statistics, a counter that is replaced, a sum that is written to: as after one plain forward."""
    model, plain = make_model(), make_model()
    closure_of(plain)(lambda t: t)
    TABLE[name].optimizer(model).step(closure_of(model))
    assert_bit_equal(dict(plain.named_buffers()), dict(model.named_buffers()))


@every_measure
def test_the_cost_is_what_it_says(name: str) -> None:
    """Passes over the whole batch in 8 steps; on top come those of a Fisher mask, over single examples."""
    model = make_model()
    opt = TABLE[name].optimizer(model)
    n_examples = len(examples()[0])
    passes: Counter[int] = Counter()

    def closure(part: Part) -> Tensor:
        passes[len(part(torch.zeros(n_examples)))] += 1
        return closure_of(model)(part)

    for _ in range(8):
        opt.step(closure)
    assert passes.pop(n_examples) == 8 * opt.gradient_evaluations_per_step
    assert passes == ({1: 2 * 16} if "fisher" in name or name == "ssam" else {})


# Two ranks.


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(name: str, mesh: SampleMesh, *, ddp: bool) -> dict[str, Tensor]:
    model = network()
    wrapped = DistributedDataParallel(model) if ddp else model
    opt = TABLE[name].optimizer(wrapped, TABLE[name].base(model.parameters()), mesh=mesh, seed=7)
    x, y = (part.chunk(mesh.data_size)[mesh.data_rank] for part in examples())
    for step in range(5):
        opt.step(lambda part: nn.functional.cross_entropy(wrapped(part(x.double())), part(y)))
        if step == 0:
            gradient = torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])
    return {"gradient": gradient, "parameters": torch.cat([p.detach().reshape(-1) for p in model.parameters()])}


def on_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, entry in TABLE.items():
        results[f"{name}/alone"] = train(name, SampleMesh(), ddp=False)
        for S in (1, 2):
            for ddp in (True, False):
                mesh = phisam.sample_mesh(entry.n_samples, S, measure=entry.optimizer(network()).measure)
                results[f"{name}/{S}/{ddp}"] = train(name, mesh, ddp=ddp)
    assert dist.get_world_size() == 2
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Tensor]]]:
    return gloo.run(2, on_rank)


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "plain"])
@pytest.mark.parametrize("S", [1, 2])
@every_measure
def test_two_ranks_take_the_step_of_one(ranks: list[dict[str, Any]], name: str, S: int, ddp: bool) -> None:
    alone, sharded = ranks[0][f"{name}/alone"], ranks[0][f"{name}/{S}/{ddp}"]
    torch.testing.assert_close(sharded["gradient"], alone["gradient"], rtol=0, atol=1e-10)
    torch.testing.assert_close(sharded["parameters"], alone["parameters"], rtol=0, atol=1e-8)
    assert torch.equal(sharded["parameters"], ranks[1][f"{name}/{S}/{ddp}"]["parameters"])
