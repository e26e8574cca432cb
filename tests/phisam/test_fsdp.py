"""FSDP2: the step on sharded parameters is that of one process, and no rank ever holds a whole v."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import phisam
from phisam.noise import BLOCK
from phisam.sharding import SampleMesh
from tests.phisam import gloo
from tests.phisam.contract import Part, sgd
from tests.phisam.test_optimizer import examples

STEPS = 5

Settings = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]

MEASURES: dict[str, Callable[[], Settings]] = {
    "trace": lambda: {"measure": phisam.trace()},
    "trace_gaussian": lambda: {"measure": phisam.trace(), "noise": phisam.gaussian()},
    "frobenius": lambda: {"measure": phisam.frobenius(), "lam": 0.01},
    "determinant": lambda: {"measure": phisam.determinant()},
    "list_of_noises": lambda: {
        "measure": phisam.Measure(
            lambda t: 2 * (t[1] - t[0] ** 2), lambda t: (t, t**2), [phisam.gaussian(), phisam.rademacher()]
        ),
        "lam": 0.01,
    },
    "adaptive": lambda: {"measure": phisam.trace(), "noise": phisam.sphere().adaptive(0.01, scaled="weight")},
    "preconditioned": lambda: {"measure": phisam.trace(), "noise": phisam.gaussian().preconditioned()},
    "symmetric": lambda: {"measure": phisam.frobenius(), "noise": phisam.gaussian().symmetric(), "lam": 0.01},
    "antithetic": lambda: {"measure": phisam.trace(), "noise": phisam.gaussian().antithetic()},
    "dirac": lambda: {"measure": phisam.trace(), "noise": phisam.dirac(torch.linspace(-1, 1, D).double())},
    "sam": lambda: {"measure": phisam.sam(), "lam": 0.8},
    "asam": lambda: {"measure": phisam.asam(), "lam": 0.8},
    "sgd": lambda: {"measure": phisam.sgd()},
}

LOOPS: dict[str, Settings] = {
    "clipped": {"max_grad_norm": 0.2},
    "every": {"every": 2},
    "part": {"perturb_fraction": 0.5},
}


def make_model(dropout: float = 0.0) -> nn.Module:
    """Rows 7, 3 and 1 over 2 ranks: every shard uneven, and rank 1 without any of the last layer."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)
    ).double()


D = sum(p.numel() for p in make_model().parameters())


def whole_model(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def layers_and_rest(model: nn.Module) -> nn.Module:
    """Nested: two layers are units of their own, the root keeps what is left."""
    fully_shard(model[0])
    fully_shard(model[3], reshard_after_forward=False)
    return fully_shard(model)


WRAPS: dict[str, Wrap] = {"whole": whole_model, "nested": layers_and_rest}


def batches(mesh: SampleMesh, k: int = 1) -> list[tuple[Tensor, Tensor]]:
    x, y = (part.chunk(mesh.data_size)[mesh.data_rank] for part in examples())
    return list(zip(x.double().chunk(k), y.double().chunk(k), strict=True))


def closures(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Callable[[Part], Tensor]]:
    def closure_on(x: Tensor, y: Tensor) -> Callable[[Part], Tensor]:
        return lambda part: ((model(part(x))[:, 0] - part(y)) ** 2).mean()

    return [closure_on(x, y) for x, y in data]


def base_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01) if name == "preconditioned" else sgd(model.parameters())


def optimizer(model: nn.Module, name: str, mesh: SampleMesh, **settings: Any) -> phisam.PhiSAM:
    return phisam.PhiSAM(
        model,
        base_of(name, model),
        **{"rho": 0.1, "lam": 0.3, "n_samples": 2, "seed": 7, "mesh": mesh, **MEASURES[name](), **settings},
    )


def sharded_mesh() -> SampleMesh:
    return phisam.sample_mesh(2, sample_parallel=1)


def whole(tensor: Tensor) -> Tensor:
    """Collective for a sharded tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([whole(p).reshape(-1) for p in model.parameters()])


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([whole(p.grad).reshape(-1) for p in model.parameters()])


def train(
    model: nn.Module, name: str, mesh: SampleMesh, *, data: list[tuple[Tensor, Tensor]] | None = None, **settings: Any
) -> dict[str, Any]:
    opt = optimizer(model, name, mesh, **settings)
    losses = []
    for step in range(STEPS):
        opt.step(closures(model, batches(mesh) if data is None else data))
        losses.append(opt.last_step.losses)
        if step == 0:
            gradient = gradient_of(model)
    return {"gradient": gradient, "losses": torch.cat(losses), "parameters": flat(model), "skipped": opt.skipped_steps}


def on_rank(rank: int) -> dict[str, Any]:
    mesh = sharded_mesh()
    results: dict[str, Any] = {}
    for name in MEASURES:
        results[f"{name}/alone"] = train(make_model(), name, SampleMesh())
        for wrap, shard in WRAPS.items():
            results[f"{name}/{wrap}"] = train(shard(make_model()), name, mesh)
    for name in ("frobenius", "sam", "symmetric"):
        for loop, settings in LOOPS.items():
            two = batches(SampleMesh(), 2)  # as the two ranks have it: perturb_fraction is of each one's batch
            results[f"{name}/{loop}/alone"] = train(make_model(), name, SampleMesh(), data=two, **settings)
            results[f"{name}/{loop}"] = train(layers_and_rest(make_model()), name, mesh, **settings)
        results[f"{name}/accumulated"] = train(layers_and_rest(make_model()), name, mesh, data=batches(mesh, 4))
        results[f"{name}/interrupted"] = _interrupted(name)
        results[f"{name}/resumed"] = _resumed(name)
        results[f"{name}/evaluated"] = _evaluated_between_steps(name)
        results[f"{name}/bad_on_one"] = {bad: _bad_on_one_rank(rank, name, bad) for bad in ("loss", "gradient")}
        results[f"{name}/lam_0"] = _lam_0(name)
        results[f"{name}/buffers"] = _buffers(name)
    results["scaled"] = [_train_scaled(scale) for scale in (None, 2.0**8)]
    results["overflow"] = _overflow_of_one_piece(mesh)
    results["frozen"] = [_frozen(whole_model), _frozen(lambda model: model)]
    results["dropout"] = _dropout()
    results["tied"] = [_tied(whole_model, mesh), _tied(lambda model: model, SampleMesh())]
    results["compiled"] = _compiled(mesh)
    results["largest"] = _largest_tensor(mesh)
    results["refused"] = _refused()
    results["bf16_reduction"] = _bf16_reduction(mesh)
    assert dist.get_world_size() == 2
    return results


def _interrupted(name: str) -> dict[str, Tensor]:
    """An exception on both ranks at each call in turn, then two steps; and two steps without it."""
    model, undisturbed = layers_and_rest(make_model()), layers_and_rest(make_model())
    opt, undisturbed_opt = (optimizer(each, name, sharded_mesh()) for each in (model, undisturbed))
    (closure,), (undisturbed_closure,) = (closures(each, batches(opt.mesh)) for each in (model, undisturbed))
    for at_call in range(int(opt.gradient_evaluations_per_step)):
        calls = iter(range(10))

        def raising(part: Part, calls: Any = calls, at_call: int = at_call) -> Tensor:
            loss = closure(part)
            if next(calls) == at_call:
                raise KeyboardInterrupt
            return loss

        try:
            opt.step(raising)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the interrupt was swallowed")
    after_interrupts = flat(model)
    for _ in range(2):
        opt.step(closure)
        undisturbed_opt.step(undisturbed_closure)
    return {
        "start": flat(make_model()),
        "after_interrupts": after_interrupts,
        "parameters": flat(model),
        "undisturbed": flat(undisturbed),
    }


def _resumed(name: str) -> list[Tensor]:
    """Training to the end, and from a state_dict in the middle."""
    model = layers_and_rest(make_model(dropout=0.3))
    opt = optimizer(model, name, sharded_mesh())
    for _ in range(2):
        opt.step(closures(model, batches(opt.mesh))[0])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    for _ in range(3):
        opt.step(closures(model, batches(opt.mesh))[0])
    resumed = layers_and_rest(make_model(dropout=0.3))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_opt = optimizer(resumed, name, sharded_mesh(), seed=99, rho=1.0)
    resumed_opt.load_state_dict(saved["opt"])
    for _ in range(3):
        resumed_opt.step(closures(resumed, batches(opt.mesh))[0])
    return [flat(model), flat(resumed)]


def _evaluated_between_steps(name: str) -> list[Tensor]:
    """Training with a look at the validation loss after each step, and without."""
    parameters = []
    for looks in (True, False):
        model = layers_and_rest(make_model())
        opt = optimizer(model, name, sharded_mesh())
        (closure,) = closures(model, batches(opt.mesh))
        for _ in range(3):
            if looks:
                with torch.no_grad():
                    closure(lambda t: t)
            opt.step(closure)
        parameters.append(flat(model))
    return parameters


def _bad_on_one_rank(rank: int, name: str, bad: str) -> dict[str, Any]:
    """A loss, or only a gradient, that is not finite on rank 1 alone; then a good step."""
    model = layers_and_rest(make_model())
    opt = optimizer(model, name, sharded_mesh())
    (closure,) = closures(model, batches(opt.mesh))
    opt.step(closure)
    before = flat(model)

    def spoilt(part: Part) -> Tensor:
        loss = closure(part)
        if rank == 0:
            return loss
        return loss * math.inf if bad == "loss" else loss + (loss - loss.detach()).square().sqrt()

    opt.step(spoilt)
    after, skipped = flat(model), opt.skipped_steps
    opt.step(closure)
    return {"before": before, "after": after, "skipped": skipped, "last": flat(model)}


def _train_scaled(scale: float | None) -> Tensor:
    model = layers_and_rest(make_model())
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    train(model, "frobenius", sharded_mesh(), grad_scaler=scaler, max_grad_norm=0.2)
    return flat(model)


class InfiniteGradient(torch.autograd.Function):
    """The identity, with a gradient that is inf."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(grad, math.inf)


class LastLayer(nn.Linear):
    """Its bias, which rank 0 alone holds, can get a gradient that is inf."""

    overflows = False

    def forward(self, x: Tensor) -> Tensor:
        bias = InfiniteGradient.apply(self.bias) if self.overflows else self.bias
        return nn.functional.linear(x, self.weight, bias)


def _overflow_of_one_piece(mesh: SampleMesh) -> dict[str, Any]:
    """A gradient that overflows in the one piece that rank 1 does not see; then a good step."""
    inner = make_model()
    inner[5] = LastLayer(3, 1).double()
    model = layers_and_rest(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt = optimizer(model, "frobenius", mesh, grad_scaler=scaler)
    (closure,) = closures(model, batches(mesh))
    opt.step(closure)
    before = flat(model)
    inner[5].overflows = True
    opt.step(closure)
    after, scale, skipped = flat(model), scaler.get_scale(), opt.skipped_steps
    inner[5].overflows = False
    opt.step(closure)
    return {"before": before, "after": after, "scale": scale, "skipped": skipped, "last": flat(model)}


def _lam_0(name: str) -> list[Tensor]:
    """With lam = 0, and FSDP2 with the base optimizer alone."""
    model, plain = layers_and_rest(make_model()), layers_and_rest(make_model())
    opt, plain_opt = optimizer(model, name, sharded_mesh(), lam=0.0), base_of(name, plain)
    for _ in range(3):
        opt.step(closures(model, batches(opt.mesh)))
        plain_opt.zero_grad()
        closures(plain, batches(opt.mesh))[0](lambda t: t).backward()
        plain_opt.step()
    return [flat(model), flat(plain)]


def _buffers(name: str) -> list[Tensor]:
    """BatchNorm's running mean after a step, and after one forward of the sharded model."""
    means = []
    for step in (True, False):
        torch.manual_seed(1)
        model = fully_shard(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double())
        (closure,) = closures(model, batches(sharded_mesh()))
        if step:
            optimizer(model, name, sharded_mesh()).step(closure)
        else:
            closure(lambda t: t)
        means += [whole(buffer).double() for buffer in model.buffers()]
    return means


def _frozen(wrap: Wrap) -> dict[str, Tensor]:
    model = make_model()
    model[0].requires_grad_(False)
    model = wrap(model)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    mesh = sharded_mesh() if sharded else SampleMesh()
    base = sgd([p for p in model.parameters() if p.requires_grad])
    opt = phisam.PhiSAM(model, base, phisam.frobenius(), rho=0.1, lam=0.01, n_samples=2, mesh=mesh)
    for _ in range(3):
        opt.step(closures(model, batches(mesh)))
    return {"first": whole(model[0].weight), "parameters": flat(model)}


def _dropout() -> Tensor:
    """Losses of two steps in which nothing is perturbed."""
    model = layers_and_rest(make_model(dropout=0.5))
    base = torch.optim.SGD([{"params": model.parameters(), "rho_scale": 0.0}], lr=0.0)
    opt = phisam.PhiSAM(model, base, phisam.frobenius(), n_samples=3, mesh=sharded_mesh())
    losses = []
    for _ in range(2):
        opt.step(closures(model, batches(opt.mesh)))
        losses.append(opt.last_step.losses)
    return torch.stack(losses)


class Tied(nn.Module):
    """A layer that is used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


def _tied(wrap: Wrap, mesh: SampleMesh) -> Tensor:
    model = wrap(Tied().double())
    parameters: Tensor = train(model, "frobenius", mesh)["parameters"]
    return parameters


def _compiled(mesh: SampleMesh) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = make_model()
    for layer in (0, 3):
        model[layer] = torch.compile(model[layer], backend="eager")
    result = train(fully_shard(model), "frobenius", mesh)
    return {key: result[key] for key in ("gradient", "parameters")}


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made on this rank, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def _largest_tensor(mesh: SampleMesh) -> dict[str, dict[str, int]]:
    """In steps on 8 layers that are units of their own: d is 8 layers, a rank's part of it is 4."""
    results = {}
    for name in ("trace", "frobenius", "sam", "asam", "symmetric"):
        model = nn.Sequential(*(nn.Linear(301, 301, bias=False) for _ in range(8)))
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(2, 301)
        with Largest() as largest:
            opt = phisam.PhiSAM(model, base, **{"mesh": mesh, "n_samples": 2, **MEASURES[name]()})
            opt.step(lambda: model(x).square().mean())  # noqa: B023
        d = sum(p.numel() for p in model.parameters())
        d_local = sum(p.to_local().numel() for p in model.parameters())
        results[name] = {"largest": largest.numbers, "d": d, "d_local": d_local}
    return results


def _refused() -> dict[str, str]:
    """What does not compose, and what is said about it."""

    def second_dimension(model: nn.Module) -> nn.Module:
        return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.shape == (7, 4) else None)

    def partly(model: nn.Module) -> nn.Module:
        fully_shard(model[0])
        return model

    def replicated_too(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))

    def half(model: nn.Module) -> nn.Module:
        return fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    def half_inside(model: nn.Module) -> nn.Module:
        fully_shard(model[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        return fully_shard(model)

    cases: dict[str, tuple[Wrap, Settings]] = {
        "sample_parallel": (whole_model, {"mesh": phisam.sample_mesh(1, sample_parallel=2)}),
        "no_mesh": (whole_model, {"mesh": None}),
        "scope": (whole_model, {"scope": "shard"}),
        "ssam": (whole_model, {"measure": phisam.ssam()}),
        "fisher_mask": (whole_model, {"noise": phisam.gaussian().masked(phisam.fisher_mask())}),
        "half": (half, {}),
        "half_inside": (half_inside, {}),
        "second_dimension": (second_dimension, {}),
        "partly": (partly, {}),
        "replicated_too": (replicated_too, {}),
    }
    told = {}
    for name, (wrap, settings) in cases.items():
        model = wrap(make_model())
        try:
            opt = optimizer(model, "trace", settings.pop("mesh", sharded_mesh()), **settings)
            opt.step(closures(model, batches(sharded_mesh()))[0])
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        else:
            told[name] = "accepted"
    return told


def _bf16_reduction(mesh: SampleMesh) -> dict[str, Any]:
    """Gradients that are sent in bf16 are the user's choice, as a DDP hook is; offloaded parameters are where x is."""
    results: dict[str, Any] = {}
    policies: dict[str, Settings] = {
        "reduction": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    for name, policy in policies.items():
        try:
            results[name] = train(fully_shard(make_model(), **policy), "frobenius", mesh)
        except ValueError as error:
            results[name] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return gloo.run(2, on_rank)


def assert_one_training(ranks: list[dict[str, Any]], case: str, expected: dict[str, Any]) -> None:
    for rank in ranks:
        for what in ("gradient", "parameters", *(["losses"] if "losses" in rank[case] else [])):
            torch.testing.assert_close(rank[case][what], expected[what], rtol=0, atol=1e-10, msg=f"{case}: {what}")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", MEASURES)
def test_sharded_parameters_take_the_steps_of_one_process(ranks: list[dict[str, Any]], name: str, wrap: str) -> None:
    """Noise is that of (seed, step, point), of whatever pieces a rank holds; norms are of all pieces together."""
    assert_one_training(ranks, f"{name}/{wrap}", ranks[0][f"{name}/alone"])


three_measures = pytest.mark.parametrize("name", ["frobenius", "sam", "symmetric"])


@pytest.mark.parametrize("loop", LOOPS)
@three_measures
def test_loops_on_sharded_parameters(ranks: list[dict[str, Any]], name: str, loop: str) -> None:
    assert_one_training(ranks, f"{name}/{loop}", ranks[0][f"{name}/{loop}/alone"])


@three_measures
def test_accumulation_on_sharded_parameters(ranks: list[dict[str, Any]], name: str) -> None:
    assert_one_training(ranks, f"{name}/accumulated", ranks[0][f"{name}/alone"])


@three_measures
def test_an_exception_leaves_sharded_parameters_as_they_were(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        result = rank[f"{name}/interrupted"]
        assert torch.equal(result["start"], result["after_interrupts"])
        assert torch.equal(result["parameters"], result["undisturbed"])


@three_measures
def test_resume_is_bit_exact(ranks: list[dict[str, Any]], name: str) -> None:
    undisturbed, resumed = ranks[0][f"{name}/resumed"]
    assert torch.equal(undisturbed, resumed)


@three_measures
def test_an_evaluation_between_steps_changes_nothing(ranks: list[dict[str, Any]], name: str) -> None:
    """FSDP2 leaves parameters gathered after a forward without a backward."""
    evaluated, undisturbed = ranks[0][f"{name}/evaluated"]
    assert torch.equal(evaluated, undisturbed)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@three_measures
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(ranks: list[dict[str, Any]], name: str, bad: str) -> None:
    for rank in ranks:
        result = rank[f"{name}/bad_on_one"][bad]
        assert result["skipped"] == 1
        assert torch.equal(result["before"], result["after"])
        assert torch.isfinite(result["last"]).all()
        assert not torch.equal(result["last"], result["after"])


def test_a_gradient_scaler_on_sharded_parameters(ranks: list[dict[str, Any]]) -> None:
    """A scale that is a power of 2 changes no bit."""
    plain, scaled = ranks[0]["scaled"]
    assert torch.equal(plain, scaled)


def test_a_piece_that_overflows_on_one_rank_lowers_the_scale_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["overflow"]
        assert (result["scale"], result["skipped"]) == (2.0**9, 1)
        assert torch.equal(result["before"], result["after"])
        assert torch.isfinite(result["last"]).all()
        assert not torch.equal(result["last"], result["after"])


@three_measures
def test_lam_0_is_the_base_optimizer_bit_for_bit(ranks: list[dict[str, Any]], name: str) -> None:
    ours, base = ranks[0][f"{name}/lam_0"]
    assert torch.equal(ours, base)


@three_measures
def test_only_point_0_changes_buffers(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        buffers = rank[f"{name}/buffers"]
        for after_step, after_forward in zip(buffers[:3], buffers[3:], strict=True):
            assert torch.equal(after_step, after_forward)


def test_frozen_parameters_stay(ranks: list[dict[str, Any]]) -> None:
    sharded, alone = ranks[0]["frozen"]
    assert torch.equal(sharded["first"], make_model()[0].weight)
    torch.testing.assert_close(sharded["parameters"], alone["parameters"], rtol=0, atol=1e-10)


def test_dropout_masks_are_the_same_at_all_points(ranks: list[dict[str, Any]]) -> None:
    losses = ranks[0]["dropout"]
    assert torch.equal(losses, losses[:, :1].expand_as(losses))
    assert losses[0, 0] != losses[1, 0]


def test_a_tied_parameter_is_one_parameter(ranks: list[dict[str, Any]]) -> None:
    sharded, alone = ranks[0]["tied"]
    torch.testing.assert_close(sharded, alone, rtol=0, atol=1e-10)


def test_compiled_layers_inside(ranks: list[dict[str, Any]]) -> None:
    assert_one_training(ranks, "compiled", ranks[0]["frobenius/alone"])


def test_no_rank_ever_holds_a_whole_v(ranks: list[dict[str, Any]]) -> None:
    """Nothing is larger than a rank's part of all parameters, but for one block of noise."""
    for rank in ranks:
        for name, numbers in rank["largest"].items():
            assert numbers["largest"] <= max(numbers["d_local"], BLOCK) < 0.7 * numbers["d"], name


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("sample_parallel", "sample_parallel=1"),
        ("no_mesh", "phisam.sample_mesh("),
        ("scope", 'scope="global"'),
        ("ssam", "mask"),
        ("fisher_mask", "mask"),
        ("half", "torch.autocast"),
        ("half_inside", "torch.autocast"),
        ("second_dimension", "dimension 0"),
        ("partly", "is not sharded"),
        ("replicated_too", "one dimension"),
    ],
)
def test_what_does_not_compose_is_refused(ranks: list[dict[str, Any]], case: str, message: str) -> None:
    for rank in ranks:
        assert rank["refused"][case].startswith("ValueError: ")
        assert message in rank["refused"][case]


def test_gradients_reduced_in_bf16_are_close(ranks: list[dict[str, Any]]) -> None:
    result, expected = ranks[0]["bf16_reduction"]["reduction"], ranks[0]["frobenius/alone"]
    torch.testing.assert_close(result["parameters"], expected["parameters"], rtol=0.05, atol=5e-3)
    assert result["skipped"] == 0


def test_offloaded_parameters(ranks: list[dict[str, Any]]) -> None:
    result, expected = ranks[0]["bf16_reduction"]["offload"], ranks[0]["frobenius/alone"]
    if isinstance(result, str):
        assert "offload" in result
    else:
        torch.testing.assert_close(result["parameters"], expected["parameters"], rtol=0, atol=1e-10)
