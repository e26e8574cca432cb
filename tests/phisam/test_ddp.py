"""DDP as it is really set up, on two ranks: its options, a compression hook, accumulation, scopes, GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import phisam
from phisam.sharding import SampleMesh
from tests.phisam import gloo
from tests.phisam.contract import Part, sgd
from tests.phisam.test_optimizer import examples
from tests.phisam.test_sharding import Branching, collectives

STEPS = 4

Settings = dict[str, Any]

MEASURES: dict[str, Callable[[], Settings]] = {
    "frobenius": lambda: {"measure": phisam.frobenius(), "lam": 0.01, "n_samples": 3},
    "symmetric": lambda: {
        "measure": phisam.frobenius(),
        "noise": phisam.gaussian().symmetric(),
        "lam": 0.01,
        "n_samples": 3,
    },
    "sam": lambda: {"measure": phisam.sam(), "lam": 0.8},
    "asam": lambda: {"measure": phisam.asam(), "lam": 0.8},
    "ssam": lambda: {"measure": phisam.ssam(fisher_samples=16, refresh_every=2), "lam": 0.8},
}
OF_THE_GRADIENT = ("sam", "asam", "ssam")

OPTIONS: dict[str, Settings] = {
    "bucket_view": {"gradient_as_bucket_view": True},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "small_buckets": {"bucket_cap_mb": 1e-5},
}

LOOPS: dict[str, Settings] = {"every": {"every": 2}, "clipped": {"max_grad_norm": 0.1}}


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(mesh: SampleMesh, k: int) -> list[tuple[Tensor, Tensor]]:
    """This data rank's share of the shared examples, as k micro-batches."""
    x, y = (part.chunk(mesh.data_size)[mesh.data_rank] for part in examples())
    return list(zip(x.double().chunk(k), y.chunk(k), strict=True))


def closures(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Callable[[Part], Tensor]]:
    def closure_on(x: Tensor, y: Tensor) -> Callable[[Part], Tensor]:
        return lambda part: nn.functional.cross_entropy(model(part(x)), part(y))

    return [closure_on(x, y) for x, y in data]


def optimizer(model: nn.Module, name: str, mesh: SampleMesh, **settings: Any) -> phisam.PhiSAM:
    return phisam.PhiSAM(
        model, sgd(model.parameters()), **{"rho": 0.3, "seed": 7, "mesh": mesh, **MEASURES[name](), **settings}
    )


def train(
    model: nn.Module,
    called: nn.Module,
    name: str,
    mesh: SampleMesh,
    *,
    k: int = 1,
    data: list[tuple[Tensor, Tensor]] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """What STEPS steps on `called`, the wrapped or compiled form of `model`, make of it."""
    opt = optimizer(called, name, mesh, **settings)
    for step in range(STEPS):
        opt.step(closures(called, batches(mesh, k) if data is None else data))
        if step == 0:
            gradient = torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])
    return {
        "gradient": gradient,
        "weights": opt.last_step.weights,
        "parameters": torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
    }


def on_mesh(name: str, S: int, *, ddp: bool = True, options: Settings | None = None, **settings: Any) -> Any:
    model = make_model()
    called = DistributedDataParallel(model, **(options or {})) if ddp else model
    return train(model, called, name, phisam.sample_mesh(1, S), **settings)


def alone(name: str, **settings: Any) -> Any:
    model = make_model()
    return train(model, model, name, SampleMesh(), **settings)


def on_rank(rank: int) -> dict[str, Any]:
    """Everything that the tests below compare, in one pair of processes."""
    results: dict[str, Any] = {}
    for name in MEASURES:
        results[f"{name}/alone"] = alone(name)
        results[f"{name}/part/alone"] = alone(name, data=batches(SampleMesh(), 2), perturb_fraction=0.5)
        results[f"{name}/whole_part/alone"] = alone(name, perturb_fraction=0.5)
        for loop, settings in LOOPS.items():
            results[f"{name}/{loop}/alone"] = alone(name, **settings)
        for S in (1, 2):
            for loop, settings in LOOPS.items():
                results[f"{name}/{S}/{loop}"] = on_mesh(name, S, **settings)
            for option, settings in OPTIONS.items():
                results[f"{name}/{S}/{option}"] = on_mesh(name, S, options=settings)
            for ddp in (True, False):
                results[f"{name}/{S}/accumulated/{ddp}"] = on_mesh(name, S, ddp=ddp, k=2)
                results[f"{name}/{S}/part/{ddp}"] = on_mesh(name, S, ddp=ddp, perturb_fraction=0.5)
            results[f"{name}/{S}/bf16_hook"] = _compressed(name, S)
            results[f"{name}/{S}/compiled_inside"] = _compiled_inside(name, S)
            results[f"{name}/{S}/overflow"] = [_overflow(rank, name, S, base) for base in ("sgd", "fused_adam")]
        results[f"{name}/shard"] = on_mesh(name, 1, scope="shard")
        results[f"{name}/shard/accumulated"] = on_mesh(name, 1, scope="shard", k=2)
        own = batches(phisam.sample_mesh(1, 1), 1)
        results[f"{name}/shard/alone"] = alone(name, data=own)
        results[f"{name}/collectives"] = {
            (S, k, scope): _count(name, S, k, scope)
            for S, k, scope in ((1, 1, "global"), (1, 3, "global"), (2, 1, "global"), (2, 3, "global"), (1, 3, "shard"))
        }
    results["unused"] = [
        _unused(SampleMesh(), ddp=False),
        *(_unused(phisam.sample_mesh(1, S), ddp=ddp) for S in (1, 2) for ddp in (True, False)),
    ]
    results["compiled_outside"] = _compiled_outside()
    assert dist.get_world_size() == 2
    return results


def _compressed(name: str, S: int) -> Any:
    model = make_model()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, bf16_compress_hook)
    return train(model, ddp, name, phisam.sample_mesh(1, S))


def _compiled_inside(name: str, S: int) -> Any:
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    return train(model, DistributedDataParallel(compiled), name, phisam.sample_mesh(1, S))


def _compiled_outside() -> str:
    model = DistributedDataParallel(make_model())
    try:
        optimizer(torch.compile(model, backend="eager"), "frobenius", phisam.sample_mesh(3, 1))
    except ValueError as error:
        return str(error)
    return "accepted"


def _overflow(rank: int, name: str, S: int, base: str) -> dict[str, Any]:
    """Two good steps; one where rank 1's loss is so large that its scaled gradient overflows; one good step."""
    mesh = phisam.sample_mesh(1, S)
    model = make_model().float()
    ddp = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    base_optimizer = (
        sgd(model.parameters()) if base == "sgd" else torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    )
    opt = phisam.PhiSAM(ddp, base_optimizer, rho=0.3, mesh=mesh, grad_scaler=scaler, **MEASURES[name]())
    (x, y), *_ = batches(mesh, 1)
    factor = 1.0

    def closure(part: Part) -> Tensor:
        return factor * nn.functional.cross_entropy(ddp(part(x.float())), part(y))

    def now() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    for _ in range(2):
        opt.step(closure)
    before = now()
    factor = 1e36 if rank == 1 else 1.0
    opt.step(closure)
    after, scale, skipped = now(), scaler.get_scale(), opt.skipped_steps
    factor = 1.0
    opt.step(closure)
    return {"before": before, "after": after, "scale": scale, "skipped": skipped, "last": now()}


class TwoHeads(Branching):
    """Two heads, one of which only some micro-batches use."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.left(x)
        return logits + self.right(x) if x.sum() > 0 else logits  # type: ignore[no-any-return]


def _unused(mesh: SampleMesh, *, ddp: bool) -> Tensor:
    model = TwoHeads()
    called = DistributedDataParallel(model, find_unused_parameters=True) if ddp else model
    parameters: Tensor = train(model, called, "frobenius", mesh, k=4 // mesh.data_size)["parameters"]
    return parameters


def _count(name: str, S: int, k: int, scope: str) -> list[tuple[str, int]]:
    mesh = phisam.sample_mesh(1, S)
    model = make_model()
    ddp = DistributedDataParallel(model)
    opt = optimizer(ddp, name, mesh, scope=scope, **({} if name != "ssam" else {"measure": phisam.ssam()}))
    micro_batches = closures(ddp, batches(mesh, 1) * k)
    for _ in range(2):  # DDP arranges its buckets in the first two steps
        opt.step(micro_batches)
    return collectives(ddp, opt, micro_batches)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return gloo.run(2, on_rank)


every_measure = pytest.mark.parametrize("name", MEASURES)
both_meshes = pytest.mark.parametrize("S", [1, 2])


def assert_one_training(ranks: list[dict[str, Any]], case: str, expected: dict[str, Tensor]) -> None:
    """Rank 0 has what one process has, and rank 1 what rank 0 has, to the bit."""
    result = ranks[0][case]
    torch.testing.assert_close(result["gradient"], expected["gradient"], rtol=0, atol=1e-10)
    torch.testing.assert_close(result["parameters"], expected["parameters"], rtol=0, atol=1e-9)
    assert torch.equal(result["parameters"], ranks[1][case]["parameters"])


@pytest.mark.parametrize("option", OPTIONS)
@both_meshes
@every_measure
def test_options_of_ddp_change_nothing(ranks: list[dict[str, Any]], name: str, S: int, option: str) -> None:
    assert_one_training(ranks, f"{name}/{S}/{option}", ranks[0][f"{name}/alone"])


@pytest.mark.parametrize("loop", LOOPS)
@both_meshes
@every_measure
def test_loops_on_two_ranks(ranks: list[dict[str, Any]], name: str, S: int, loop: str) -> None:
    assert_one_training(ranks, f"{name}/{S}/{loop}", ranks[0][f"{name}/{loop}/alone"])


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "plain"])
@both_meshes
@every_measure
def test_accumulation_on_two_ranks_is_the_whole_batch(
    ranks: list[dict[str, Any]], name: str, S: int, ddp: bool
) -> None:
    assert_one_training(ranks, f"{name}/{S}/accumulated/{ddp}", ranks[0][f"{name}/alone"])


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "plain"])
@both_meshes
@every_measure
def test_perturb_fraction_is_of_each_data_ranks_batch(
    ranks: list[dict[str, Any]], name: str, S: int, ddp: bool
) -> None:
    """Two data ranks: the first half of each one's batch, as of two micro-batches in one process."""
    expected = ranks[0][f"{name}/part/alone" if S == 1 else f"{name}/whole_part/alone"]
    assert_one_training(ranks, f"{name}/{S}/part/{ddp}", expected)


@both_meshes
@every_measure
def test_a_compression_hook_compresses_and_keeps_replicas_equal(ranks: list[dict[str, Any]], name: str, S: int) -> None:
    expected, result = ranks[0][f"{name}/alone"], ranks[0][f"{name}/{S}/bf16_hook"]
    assert torch.equal(result["parameters"], ranks[1][f"{name}/{S}/bf16_hook"]["parameters"])
    torch.testing.assert_close(result["gradient"], expected["gradient"], rtol=0.05, atol=5e-3)
    torch.testing.assert_close(result["parameters"], expected["parameters"], rtol=0.05, atol=5e-3)
    assert not torch.equal(result["gradient"], expected["gradient"])


@both_meshes
@every_measure
def test_ddp_around_a_compiled_model(ranks: list[dict[str, Any]], name: str, S: int) -> None:
    assert_one_training(ranks, f"{name}/{S}/compiled_inside", ranks[0][f"{name}/alone"])


def test_a_compiled_ddp_is_refused_with_the_right_order(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "DistributedDataParallel(torch.compile(model))" in rank["compiled_outside"]


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "ssam"])
def test_scope_shard_is_the_mean_of_the_steps_that_shards_take_alone(ranks: list[dict[str, Any]], name: str) -> None:
    """m-sharpness: with sam each rank climbs its own gradient. (A Fisher mask is of all ranks, so ssam is not.)"""
    mean = torch.stack([rank[f"{name}/shard/alone"]["gradient"] for rank in ranks]).mean(0)
    for case in (f"{name}/shard", f"{name}/shard/accumulated"):
        for rank in ranks:
            torch.testing.assert_close(rank[case]["gradient"], mean, rtol=0, atol=1e-10)
        assert torch.equal(ranks[0][case]["parameters"], ranks[1][case]["parameters"])
    difference = ranks[0][f"{name}/shard"]["gradient"] - ranks[0][f"{name}/alone"]["gradient"]
    assert difference.abs().max() > 1e-6


@every_measure
def test_collectives_do_not_grow_with_micro_batches(ranks: list[dict[str, Any]], name: str) -> None:
    """One all-reduce of d numbers, and one more where a direction needs the gradient of all data ranks."""
    d = sum(p.numel() for p in make_model().parameters())
    for rank in ranks:
        for (S, k, scope), calls in rank[f"{name}/collectives"].items():
            reduces = [n for call, n in calls if call == "gloo:all_reduce"]
            gathers = [n for call, n in calls if call == "gloo:all_gather"]
            first = name in OF_THE_GRADIENT and scope == "global" and S == 1
            assert sorted(reduces)[-1 - first :] == [d] * (1 + first), (S, k, scope, calls)
            assert sum(reduces) <= (1 + first) * d + 8, (S, k, scope, calls)
            assert len(reduces) + len(gathers) == len(calls), (S, k, scope, calls)
            if scope == "global":
                assert calls == rank[f"{name}/collectives"][S, 1, "global"], (S, k)


@pytest.mark.parametrize("base", [0, 1], ids=["sgd", "fused_adam"])
@pytest.mark.parametrize(("name", "S"), [*((name, 1) for name in MEASURES), ("frobenius", 2), ("symmetric", 2)])
def test_an_overflow_on_one_rank_is_one_on_all(ranks: list[dict[str, Any]], name: str, S: int, base: int) -> None:
    results = [rank[f"{name}/{S}/overflow"][base] for rank in ranks]
    for result in results:
        assert torch.equal(result["before"], result["after"])
        assert (result["scale"], result["skipped"]) == (2.0**15, 1)
        assert torch.equal(result["last"], results[0]["last"])
        assert not torch.equal(result["last"], result["after"])
        assert torch.isfinite(result["last"]).all()


def test_parameters_that_only_some_micro_batches_use(ranks: list[dict[str, Any]]) -> None:
    expected, *sharded = ranks[0]["unused"]
    for parameters, other in zip(sharded, ranks[1]["unused"][1:], strict=True):
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-9)
        assert torch.equal(parameters, other)
