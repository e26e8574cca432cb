"""A sharded step cannot differ from the single one: W in {2, 3, 4}, every S, every measure, DDP-wrapped or plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phisam
from phisam.sharding import Deal, LossExchange, ProcessMesh, SampleMesh
from tests.phisam import gloo

BATCH = 12
STEPS = 20

MEASURES = {
    "trace": phisam.trace,
    "frobenius": phisam.frobenius,
    "frobenius_biased": lambda: phisam.frobenius(unbiased=False),
    "determinant": phisam.determinant,
    "log_determinant": phisam.log_determinant,
    "exp_product": lambda: phisam.exp_product(sigma=0.1),
    "eigen_power": lambda: phisam.eigen_power(3),
    "one_noise_per_component": lambda: phisam.Measure(
        phi=lambda t: 2 * (t[1] - t[0] ** 2),
        psi=lambda t: (t, t**2),
        noise=[phisam.gaussian(), phisam.rademacher()],
    ),
    "sgd": phisam.sgd,
}


def make_model(*, batch_norm: bool = False, dropout: bool = False) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh()]
    if batch_norm:
        layers.append(nn.BatchNorm1d(6))
    if dropout:
        layers.append(nn.Dropout(0.5))
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def train(
    measure: phisam.Measure,
    mesh: SampleMesh,
    *,
    model: nn.Module,
    ddp: bool,
    n_samples: int = 3,
    steps: int = STEPS,
    scope: Any = "global",
) -> dict[str, Tensor]:
    """Trains on this data rank's share of one batch; returns the first gradient and the last state."""
    x, y = (part.chunk(mesh.data_size)[mesh.data_rank] for part in examples())
    # broadcast_buffers is DDP's default: the step must not pay for it.
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if ddp else model
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    opt = phisam.PhiSAM(wrapped, base, measure, rho=0.3, lam=0.2, n_samples=n_samples, seed=7, mesh=mesh, scope=scope)
    result: dict[str, Tensor] = {}
    for step in range(steps):
        opt.step(lambda: nn.functional.cross_entropy(wrapped(x), y))
        if step == 0:
            result["gradient"] = torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])
            result["losses"] = opt.last_step.losses
            result["weights"] = opt.last_step.weights
    opt.sync_buffers()
    result["parameters"] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    result["buffers"] = torch.cat([b.double().reshape(-1) for b in model.buffers()] or [torch.zeros(0)])
    return result


def sample_sizes(world_size: int) -> list[int]:
    return [s for s in range(1, world_size + 1) if world_size % s == 0]


def collectives(model: nn.Module, opt: phisam.PhiSAM, closure: Any) -> list[tuple[str, int]]:
    """(name, numbers sent) of every collective in one step, DDP's own included, as torch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        opt.step(closure)
    calls = [
        (event.name, max(torch.Size(shape).numel() for shape in event.input_shapes))
        for event in profile.events()
        if event.name.startswith("gloo:")
    ]
    assert len(calls) == sum(event.name.startswith("c10d::") for event in profile.events())
    return calls


def on_rank(rank: int) -> dict[str, Any]:
    """Everything that the tests below compare, in one set of processes."""
    world_size = dist.get_world_size()
    results: dict[str, Any] = {}
    for name, make in MEASURES.items():
        alone = train(make(), SampleMesh(), model=make_model(), ddp=False)
        results[f"{name}/alone"] = alone
        for S in sample_sizes(world_size):
            n_points = make().n_points(3)
            for ddp in (True, False):
                mesh = phisam.sample_mesh(n_points, S)
                results[f"{name}/{S}/{ddp}"] = train(make(), mesh, model=make_model(), ddp=ddp)

    for kind in ({"batch_norm": True}, {"dropout": True}):
        key = next(iter(kind))
        whole = phisam.sample_mesh(2, world_size)  # D = 1: statistics and masks are over one and the same batch
        results[f"{key}/alone"] = train(phisam.frobenius(), SampleMesh(), model=make_model(**kind), ddp=False)
        for ddp in (True, False):
            results[f"{key}/{ddp}"] = train(phisam.frobenius(), whole, model=make_model(**kind), ddp=ddp)

    results["different_start"] = train(
        phisam.trace(), phisam.sample_mesh(3), model=_shifted(make_model(), rank), ddp=False, steps=1
    )
    results["more_ranks_than_points"] = train(
        phisam.trace(), phisam.sample_mesh(1, world_size), model=make_model(), ddp=True, n_samples=1
    )
    results["one_sample_alone"] = train(phisam.trace(), SampleMesh(), model=make_model(), ddp=False, n_samples=1)
    results["shard"] = train(phisam.frobenius(), phisam.sample_mesh(3, 1), model=make_model(), ddp=True, scope="shard")
    results["nan_on_one_rank"] = _nan_on_one_rank(rank)
    results["refused"] = _refused(rank)
    results["branching"] = [
        _branching(SampleMesh(), ddp=False),
        *(_branching(phisam.sample_mesh(5, world_size), ddp) for ddp in (True, False)),
    ]
    results["collectives"] = {S: _count(S) for S in sample_sizes(world_size)}
    return results


def _shifted(model: nn.Module, rank: int) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)
    return model


def _nan_on_one_rank(rank: int) -> dict[str, Any]:
    """The last rank's second batch is NaN; what the replicas are before and after, and what they count."""
    mesh = phisam.sample_mesh(3, 1)
    model = make_model(batch_norm=True)
    ddp = DistributedDataParallel(model)
    opt = phisam.PhiSAM(ddp, torch.optim.Adam(model.parameters()), phisam.frobenius(), n_samples=3, mesh=mesh)
    x, y = (part.chunk(mesh.data_size)[mesh.data_rank] for part in examples())
    opt.step(lambda: nn.functional.cross_entropy(ddp(x), y))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = x * float("nan") if rank == dist.get_world_size() - 1 else x
    opt.step(lambda: nn.functional.cross_entropy(ddp(bad), y))
    after = {k: v.clone() for k, v in model.state_dict().items()}
    return {"before": before, "after": after, "skipped": opt.skipped_steps}


class Branching(nn.Module):
    """A parameter that only some points use: which one depends on the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.left(x)
        return logits + self.right(x) if self.left.weight.sum() > -0.25 else logits


def _refused(rank: int) -> list[str]:
    """What DDP set-ups that would let replicas diverge are answered."""
    x, y = examples()
    mesh = phisam.sample_mesh(1, dist.get_world_size())
    told = []
    inner = make_model()
    opt = phisam.PhiSAM(
        DistributedDataParallel(inner),
        torch.optim.SGD(inner.parameters(), lr=0.1),
        phisam.trace(),
        n_samples=1,
        mesh=mesh,
    )
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    alone = DistributedDataParallel(make_model(), process_group=groups[rank])
    for attempt in (
        lambda: opt.step(lambda: nn.functional.cross_entropy(inner(x), y)),
        lambda: phisam.PhiSAM(alone, torch.optim.SGD(alone.parameters(), lr=0.1), phisam.trace(), mesh=mesh),
    ):
        try:
            attempt()
        except ValueError as error:
            told.append(str(error))
    return told


def _branching(mesh: SampleMesh, ddp: bool) -> Tensor:
    model = Branching()
    x, y = examples()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ddp else model
    opt = phisam.PhiSAM(
        wrapped, torch.optim.SGD(model.parameters(), lr=0.05), phisam.trace(), rho=2.0, lam=0.5, n_samples=5, mesh=mesh
    )
    for _ in range(5):
        opt.step(lambda: nn.functional.cross_entropy(wrapped(x), y))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _count(S: int) -> dict[str, list[tuple[str, int]]]:
    counts = {}
    x, y = examples()
    for name, ddp, n in (("ddp", True, 5), ("plain", False, 5), ("one_round", True, S - 1)):
        mesh = phisam.sample_mesh(n, S)
        model = make_model(batch_norm=True)
        wrapped = DistributedDataParallel(model) if ddp else model
        measure = phisam.frobenius(unbiased=False) if n else phisam.sgd()
        opt = phisam.PhiSAM(
            wrapped, torch.optim.SGD(model.parameters(), lr=0.1), measure, n_samples=max(n, 1), mesh=mesh
        )
        shard_x, shard_y = x.chunk(mesh.data_size)[mesh.data_rank], y.chunk(mesh.data_size)[mesh.data_rank]
        closure = lambda: nn.functional.cross_entropy(wrapped(shard_x), shard_y)  # noqa: B023, E731
        opt.step(closure)  # DDP arranges its buckets in the first two steps
        opt.step(closure)
        counts[name] = collectives(wrapped, opt, closure)
    return counts


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda W: f"W={W}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return gloo.run(request.param, on_rank)


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "plain"])
@pytest.mark.parametrize("name", MEASURES)
def test_gradient_and_training_equal_one_process(ranks: list[dict[str, Any]], name: str, ddp: bool) -> None:
    alone = ranks[0][f"{name}/alone"]
    for S in sample_sizes(len(ranks)):
        sharded = ranks[0][f"{name}/{S}/{ddp}"]
        torch.testing.assert_close(sharded["losses"], alone["losses"], rtol=0, atol=1e-12)
        torch.testing.assert_close(sharded["weights"], alone["weights"], rtol=0, atol=1e-10)
        torch.testing.assert_close(sharded["gradient"], alone["gradient"], rtol=0, atol=1e-10)
        torch.testing.assert_close(sharded["parameters"], alone["parameters"], rtol=0, atol=1e-8)


def test_replicas_are_bit_equal_after_20_steps(ranks: list[dict[str, Any]]) -> None:
    cases = [key for key, value in ranks[0].items() if isinstance(value, dict) and "parameters" in value]
    assert len(cases) > 2 * len(MEASURES)
    for case in cases:
        for rank in ranks[1:]:
            assert torch.equal(rank[case]["parameters"], ranks[0][case]["parameters"]), case
            assert torch.equal(rank[case]["buffers"], ranks[0][case]["buffers"]), case


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "plain"])
@pytest.mark.parametrize("layer", ["batch_norm", "dropout"])
def test_buffers_and_dropout_masks_do_not_depend_on_the_sharding(
    ranks: list[dict[str, Any]], layer: str, ddp: bool
) -> None:
    alone, sharded = ranks[0][f"{layer}/alone"], ranks[0][f"{layer}/{ddp}"]
    torch.testing.assert_close(sharded["parameters"], alone["parameters"], rtol=0, atol=1e-8)
    torch.testing.assert_close(sharded["buffers"], alone["buffers"], rtol=0, atol=1e-8)


def test_plain_models_start_from_rank_0(ranks: list[dict[str, Any]]) -> None:
    one_step = ranks[0]["different_start"]["parameters"]
    assert all(torch.equal(rank["different_start"]["parameters"], one_step) for rank in ranks)


def test_ranks_without_a_point_change_nothing(ranks: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(
        ranks[0]["more_ranks_than_points"]["parameters"], ranks[0]["one_sample_alone"]["parameters"], rtol=0, atol=1e-8
    )


def test_scope_shard_weighs_each_data_ranks_own_losses(ranks: list[dict[str, Any]]) -> None:
    """m-sharpness: the mean over shards of the step that a shard alone would take."""
    x, y = examples()
    gradients = []
    for shard_x, shard_y in zip(x.chunk(len(ranks)), y.chunk(len(ranks)), strict=True):
        model = make_model()
        opt = phisam.PhiSAM(
            model,
            torch.optim.SGD(model.parameters(), lr=0.05),
            phisam.frobenius(),
            rho=0.3,
            lam=0.2,
            n_samples=3,
            seed=7,
        )
        opt.step(lambda: nn.functional.cross_entropy(model(shard_x), shard_y))  # noqa: B023
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(ranks[0]["shard"]["gradient"], torch.stack(gradients).mean(0), rtol=0, atol=1e-10)
    assert not torch.equal(ranks[0]["shard"]["weights"], ranks[1]["shard"]["weights"])


def test_nan_on_one_rank_skips_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["nan_on_one_rank"]
        assert result["skipped"] == 1
        for name, before in result["before"].items():
            assert torch.equal(before, result["after"][name]), name


def test_ddp_that_would_let_replicas_diverge_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        inner, subgroup = rank["refused"]
        assert "the closure calls the module inside it" in inner
        assert f"DDP-wrapped over 1 processes, but the mesh has {len(ranks)}" in subgroup


def test_a_parameter_that_only_some_points_use_is_reduced_all_the_same(ranks: list[dict[str, Any]]) -> None:
    alone, *sharded = ranks[0]["branching"]
    for parameters in sharded:
        torch.testing.assert_close(parameters, alone, rtol=0, atol=1e-10)
    for rank in ranks[1:]:
        for own, first in zip(rank["branching"][1:], sharded, strict=True):
            assert torch.equal(own, first)


def test_collectives_of_a_step(ranks: list[dict[str, Any]]) -> None:
    """One all-reduce of d numbers, and n + 1 scalars in as few exchanges as DESIGN's section 2 allows."""
    model = make_model(batch_norm=True)
    d = sum(p.numel() for p in model.parameters())
    flags = len(list(model.parameters()))
    for rank in ranks:
        for S, counts in rank["collectives"].items():
            data_size = len(ranks) // S
            for name, calls in counts.items():
                reduces = [n for call, n in calls if call == "gloo:all_reduce"]
                gathers = [n for call, n in calls if call == "gloo:all_gather"]
                assert len(reduces) + len(gathers) == len(calls), calls
                assert reduces == [d + flags if name == "plain" else d], (S, name, calls)
                n_points = S if name == "one_round" else 6
                rounds = -(-n_points // S)
                assert len(gathers) == (rounds if data_size > 1 else min(rounds, 2)), (S, name, calls)


@pytest.mark.parametrize(
    ("world_size", "n_samples", "expected"),
    [(1, 4, 1), (2, 1, 2), (2, 3, 2), (2, 2, 1), (3, 2, 3), (4, 3, 4), (4, 1, 2), (8, 2, 1), (8, 7, 8), (6, 5, 6)],
)
def test_auto_wastes_no_evaluation(
    monkeypatch: pytest.MonkeyPatch, world_size: int, n_samples: int, expected: int
) -> None:
    _pretend(monkeypatch, world_size)
    mesh = phisam.sample_mesh(n_samples)
    assert (mesh.data_size, mesh.sample_size) == (world_size // expected, expected)


@pytest.mark.parametrize(
    ("measure", "world_size", "n_samples", "expected"),
    [
        (phisam.sam(), 4, 2, 1),  # its points wait for each other: data ranks waste nothing, sample ranks do
        (phisam.trace().with_noise(phisam.gaussian().symmetric()), 2, 1, 1),  # 1 + 2 evaluations: 3 on one, 4 on two
        (phisam.trace().with_noise(phisam.gaussian().symmetric()), 3, 3, 1),
        (phisam.frobenius(), 4, 3, 4),
        (phisam.sgd(), 4, 3, 1),
    ],
)
def test_auto_knows_what_the_points_of_a_measure_cost(
    monkeypatch: pytest.MonkeyPatch, measure: phisam.Measure, world_size: int, n_samples: int, expected: int
) -> None:
    _pretend(monkeypatch, world_size)
    assert phisam.sample_mesh(n_samples, measure=measure).sample_size == expected


def test_mesh_that_does_not_divide_the_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 4)
    with pytest.raises(
        ValueError, match=r"world size 4 = data x sample, .* sample_parallel = 3 .* use one of \[1, 2, 4\]"
    ):
        phisam.sample_mesh(3, sample_parallel=3)


def _pretend(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


@pytest.mark.parametrize("first_everywhere", [False, True])
@pytest.mark.parametrize("S", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n_points", [1, 2, 5, 6])
def test_every_point_has_exactly_one_owner(S: int, n_points: int, first_everywhere: bool) -> None:
    """But x, which all ranks evaluate where its gradient makes the others; idle ranks stand in the last round alone."""
    deal = Deal(n_points, S, first_everywhere)
    dealt = [[deal.evaluation(r, s) for r in range(deal.rounds)] for s in range(S)]
    points = [e for rank in dealt for e in rank if e is not None]
    assert sorted(set(points)) == list(range(n_points))
    assert len(points) == n_points + (S - 1 if first_everywhere else 0)
    assert all(e is not None for rank in dealt for e in rank[:-1])
    if not first_everywhere:
        assert deal.rounds == -(-n_points // S)


def test_losses_are_ordered_by_point_whatever_the_rounds() -> None:
    """Uneven shards, D = 2, S = 2, n + 1 = 3: the exchange puts each loss at its point's place."""

    class Recorded(ProcessMesh):
        def gather(self, losses: Tensor) -> Tensor:
            r = self.seen
            object.__setattr__(self, "seen", r + len(losses))
            table = [[[100.0 * d + (r + k) * 2 + s for k in range(len(losses))] for s in range(2)] for d in range(2)]
            return torch.tensor(table, dtype=torch.float64)

        seen = 0

    exchange = LossExchange(Recorded(0, 2, 1, 2), Deal(3, 2, False), scope="shard")
    exchange.report(0, torch.tensor(1.0, dtype=torch.float64))
    exchange.report(1, torch.tensor(3.0, dtype=torch.float64))
    assert exchange.losses.tolist() == [0.0, 1.0, 2.0]
    exchange = LossExchange(Recorded(0, 2, 1, 2), Deal(3, 2, False), scope="global")
    exchange.report(0, torch.tensor(1.0, dtype=torch.float64))
    exchange.report(1, torch.tensor(3.0, dtype=torch.float64))
    assert exchange.losses.tolist() == [50.0, 51.0, 52.0]


def test_bare_and_wrapped_models_with_another_process_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 4)
    model = make_model()
    base = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"data x sample = 1 x 2 = 2, but the process group has 4 processes"):
        phisam.PhiSAM(model, base, phisam.trace(), mesh=ProcessMesh(0, 1, 0, 2))
