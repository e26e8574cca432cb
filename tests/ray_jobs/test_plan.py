"""The plan against what really runs: one rank at a time of 64, in torch's fake process group; and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import phisam
from phisam import sharding
from phisam.closures import Part
from phisam.gradient import Perturbation, Rows
from ray_jobs import cli, config
from ray_jobs.errors import ConfigError
from ray_jobs.plan import Collective, Layout, Model
from ray_jobs.plan_hardware import PROFILES, Hardware, Link, profile
from ray_jobs.plan_workload import SHAPES, Operation, Workload, configured, described, traced
from ray_jobs.sources import read

W = 64
BATCH = 8


@dataclass(frozen=True)
class Case:
    """A step to plan and to run."""

    measure: phisam.Measure
    n: int
    S: int
    scope: Any = "global"
    perturb_fraction: float = 1.0
    micro_batches: int = 1
    lam: float = 1.0

    @property
    def layout(self) -> Layout:
        data_size, lam = W // self.S, self.lam
        return Layout(
            self.measure, self.n, data_size, self.S, self.scope, self.perturb_fraction, self.micro_batches, lam
        )


SYMMETRIC = phisam.frobenius().with_noise(phisam.gaussian().symmetric())
CASES = {
    "one point a rank": Case(phisam.frobenius(), 3, 4),
    "streaming": Case(phisam.frobenius(), 7, 4),
    "no data ranks": Case(phisam.trace(), 63, 64),
    "no sample ranks": Case(phisam.frobenius(), 4, 1),
    "idle ranks": Case(phisam.frobenius(), 5, 4),
    "more ranks than points": Case(phisam.trace(), 2, 8),
    "shard": Case(phisam.frobenius(), 7, 2, "shard"),
    "one noise a component": Case(phisam.frobenius().with_noise([phisam.gaussian(), phisam.rademacher()]), 3, 2),
    "sgd": Case(phisam.sgd(), 1, 2),
    "sam": Case(phisam.sam(), 1, 1),
    "sam with a part at x": Case(phisam.sam(), 1, 1, lam=0.5),
    "sam on sample ranks": Case(phisam.sam(), 1, 4),
    "sam of a shard": Case(phisam.asam(), 1, 1, "shard"),
    "symmetric": Case(SYMMETRIC, 3, 2),
    "symmetric, idle": Case(SYMMETRIC, 2, 4),
    "part of the batch": Case(phisam.trace(), 3, 2, perturb_fraction=0.5),
    "part of the batch, no sample ranks": Case(phisam.frobenius(), 2, 1, perturb_fraction=0.5),
    "part of the batch, sam": Case(phisam.sam(), 1, 2, perturb_fraction=0.5),
    "micro-batches": Case(phisam.trace(), 2, 2, micro_batches=2),
}


@dataclass
class Seen:
    """What one rank did in one step."""

    collectives: list[Collective]
    draws: list[int]
    forwards: int
    examples: int
    rows: int


@contextmanager
def one_of_64(rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=W)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(
    case: Case, monkeypatch: pytest.MonkeyPatch, last: AbstractContextManager[Any] | None = None
) -> tuple[Seen, phisam.PhiSAM]:
    """The third step on one rank, inside `last`; nobody answers, so its losses are made up."""
    seen = Seen([], [], 0, 0, 0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)

    def reduced(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and wants none that are strings
        """In place of DDP's own, which fails on the fake group: its work has no result."""
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        dist.all_reduce(bucket.buffer())
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, reduced)
    all_reduce, all_gather, draw, combine = dist.all_reduce, sharding._all_gather, Perturbation.draw, Rows.combine

    def spied_reduce(tensor: Tensor) -> None:
        seen.collectives.append(Collective("all_reduce", tensor.numel(), tensor.element_size()))
        all_reduce(tensor)

    def spied_gather(into: Tensor, tensor: Tensor) -> None:
        assert into.numel() == W * tensor.numel()
        seen.collectives.append(Collective("all_gather", tensor.numel(), tensor.element_size()))
        all_gather(into, tensor)

    def spied_draw(self: Perturbation, made: Any, *rest: Any) -> None:
        seen.draws.append(made.point)
        draw(self, made, *rest)

    def spied_combine(self: Rows, *rest: Any) -> list[Tensor | None]:
        seen.rows = len(self._at_x) + len(self._rows)
        return combine(self, *rest)

    def forward(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.forwards += 1
        seen.examples += len(inputs[0])

    network.register_forward_pre_hook(forward)
    with monkeypatch.context() as patched:
        patched.setattr(dist, "all_reduce", spied_reduce)
        patched.setattr(sharding, "_all_gather", spied_gather)
        patched.setattr(Perturbation, "draw", spied_draw)
        patched.setattr(Rows, "combine", spied_combine)
        opt = phisam.PhiSAM(
            model,
            torch.optim.SGD(network.parameters(), lr=0.1),
            case.measure,
            lam=case.lam,
            n_samples=case.n,
            mesh=phisam.sample_mesh(case.n, case.S, measure=case.measure),
            scope=case.scope,
            perturb_fraction=case.perturb_fraction,
        )
        inputs, targets = torch.randn(BATCH, 4), torch.randint(0, 3, (BATCH,))

        def closure(x: Tensor, y: Tensor) -> Any:
            def loss(part: Part) -> Tensor:
                return nn.functional.cross_entropy(model(part(x)), part(y))

            return loss

        M = case.micro_batches
        closures = [closure(inputs[m::M], targets[m::M]) for m in range(M)]
        for _ in range(2):  # the ranks compare their settings, and DDP arranges its buckets
            opt.step(closures)
        seen.collectives, seen.draws, seen.forwards, seen.examples, seen.rows = [], [], 0, 0, 0
        with last or nullcontext():
            opt.step(closures)
    return seen, opt


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_rank_of_64_does_what_the_plan_says(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = case.layout
    for rank in sorted({0, 1, case.S - 1, case.S % W, W - 1}):
        with one_of_64(rank):
            seen, opt = run(case, monkeypatch)
        d = sum(p.numel() for p in opt.model.parameters())
        assert seen.collectives == layout.collectives(d, 4)
        sample_rank = rank % case.S
        points = layout.points(sample_rank)
        assert seen.draws == [layout.measure.draw_of(point).point for point in points if point]
        dealt = [layout.deal.evaluation(round, sample_rank) for round in range(layout.deal.rounds)]
        evaluations = [layout.passes(index or 0) for index in dealt]  # who would wait evaluates x
        assert seen.forwards == sum(passes for passes, _ in evaluations) * case.micro_batches
        assert seen.examples == sum(passes * part for passes, part in evaluations) * BATCH
        assert seen.rows == layout.rows_held(sample_rank)
        assert opt.skipped_steps == 0


def test_all_points_are_evaluated_once_over_the_sample_ranks() -> None:
    for name, case in CASES.items():
        points = [point for rank in range(case.S) for point in case.layout.points(rank) if point]
        expected = case.measure.n_points(case.n) if name != "sgd" else 0
        assert sorted(points) == list(range(1, expected + 1)), name


@pytest.mark.parametrize("name", ["sam", "streaming"])
def test_no_collective_escapes_the_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_of_step = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with one_of_64(0):
        seen, _ = run(CASES[name], monkeypatch, last=profile_of_step)
    assert len([e for e in profile_of_step.events() if e.name.startswith("c10d::")]) == len(seen.collectives)


def test_losses_that_nobody_sent_skip_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def unanswered() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(sharding, "_all_gather", lambda into, tensor: into.fill_(float("nan")))
            yield

    with one_of_64(5):
        _, opt = run(CASES["streaming"], monkeypatch, last=unanswered())
    assert opt.skipped_steps == 1


def test_the_plan_chooses_as_phisam_does() -> None:
    described_run = load("optimizer.n_samples=3")
    plan = Model(described_run, described(1000, 1e9), PROFILES["nvlink"]).plan()
    assert [o.layout.sample_size for o in plan.options if o.chosen] == [optimizer_choice(described_run)]


def optimizer_choice(described_run: config.RunConfig) -> int:
    return sharding.sample_size(W, described_run.optimizer.n_samples)


# time


FREE = Hardware(
    name="free",
    about="nothing costs but arithmetic",
    gpus_per_node=8,
    inside=Link(float("inf"), 0, 0),
    between=Link(float("inf"), 0, 0),
    flops=dict.fromkeys(("float32", "float64", "bf16", "fp16"), 1e12),
    utilisation=1.0,
    memory_bandwidth=float("inf"),
    memory=float("inf"),
    seconds_per_operation=0,
    seconds_per_step=0,
    seconds_per_point=0,
    asynchronous=True,
    seconds_per_random=0,
    seconds_per_block=0,
    start=0,
    tree=True,
    overlap=1.0,
)


def load(*overrides: str) -> config.RunConfig:
    return config.load("digits-frob", [f"scaling.num_workers={W}", "training.batch_size=1024", *overrides])


@pytest.mark.parametrize(
    ("overrides", "S", "efficiency"),
    [
        (["optimizer.n_samples=3"], 4, 1.0),
        (["optimizer.n_samples=3"], 1, 1.0),
        (["optimizer.n_samples=2"], 2, 3 / 4),  # the second round has one point for two ranks
        (["optimizer.measure=sam"], 1, 1.0),
        (["optimizer.measure=sam"], 2, 2 / 4),  # x on both, then one point for two ranks
        (
            ["optimizer.measure=trace", "optimizer.noise={name: gaussian, symmetric: true}", "optimizer.n_samples=1"],
            2,
            3 / 4,
        ),
        (["optimizer.measure=trace", "optimizer.n_samples=3", "optimizer.perturb_fraction=0.5"], 1, 1.0),
        (
            ["optimizer.measure=trace", "optimizer.n_samples=1", "optimizer.every=2"],
            2,
            1.5 / 2,
        ),  # every other step is SGD's
        # x on all of the batch and 5 evaluations of half of it, in 2 rounds; who has none in the second does x on all
        (["optimizer.measure=trace", "optimizer.n_samples=4", "optimizer.perturb_fraction=0.5"], 4, 3.5 / 8),
        (["optimizer.n_samples=3", "training.micro_batches=2"], 4, 1.0),
    ],
)
def test_what_is_lost_where_only_arithmetic_costs(overrides: list[str], S: int, efficiency: float) -> None:
    option = Model(load(*overrides), described(1000, 1e9), FREE).option(S)
    assert option.seconds.efficiency == pytest.approx(efficiency)


def test_a_step_takes_what_its_evaluations_take() -> None:
    seconds = Model(load("optimizer.n_samples=3"), described(1000, 1e9), FREE).option(4).seconds
    assert seconds.total == pytest.approx(4 * 1024 * 1e9 / 1e12 / W)
    measured = described(1000, 1e9).timed(0.5, 0.25)  # of an example, and of a pass
    seconds = Model(load("optimizer.n_samples=3", "training.micro_batches=2"), measured, FREE).option(4).seconds
    assert seconds.total == pytest.approx(2 * (0.25 + 1024 / (W // 4) / 2 * 0.5))


def test_the_backward_hides_the_all_reduce_but_for_its_last_bucket() -> None:
    d = 100 * 2**20 // 4
    slow = replace(FREE, inside=Link(1e9, 0, 0), tree=False)
    model = Model(
        load("optimizer.n_samples=3", "training.batch_size=64"),
        described(d, 1e9),
        replace(slow, between=Link(1e9, 0, 0)),
    )
    last = 2 * 63 / 64 * 24 * 2**20 / 1e9  # buckets of 1, 25, 25, 25 and 24 MiB
    assert model.exposed(d * 4, W, 1e9) == pytest.approx(last)
    assert model.exposed(d * 4, W, 0) == pytest.approx(2 * 63 / 64 * d * 4 / 1e9)
    assert model.exposed(d * 4, 1, 0) == 0


def test_collectives_by_hand() -> None:
    link, net = Link(100e9, 1e-6, 3e-6), Link(10e9, 5e-6, 20e-6)
    hardware = replace(FREE, inside=link, between=net, start=7e-6, tree=False)
    assert hardware.all_reduce(8e6, 8) == pytest.approx(7e-6 + 14 * 3e-6 + 2 * 7 / 8 * 8e6 / 100e9)
    assert hardware.all_reduce(8e6, 16) == pytest.approx(7e-6 + 28 * 3e-6 + 2 * 20e-6 + 2 * 15 / 16 * 8e6 / 10e9)
    assert hardware.all_gather(8, 16) == pytest.approx(7e-6 + 14 * 1e-6 + 1 * 5e-6 + 15 * 8 / 10e9)
    tree = replace(hardware, tree=True)
    assert tree.all_reduce(8, 1024) == pytest.approx(7e-6 + 14 * 3e-6 + 14 * 20e-6 + 2 * 8 / 0.92 / 10e9)
    assert tree.all_reduce(1e12, 1024) == hardware.all_reduce(1e12, 1024)  # bandwidth is the ring's
    assert Collective("all_reduce", 100, 4).sent(8) == 700
    assert Collective("all_gather", 2, 8).sent(8) == 112


# networks


def test_the_trace_counts_what_torch_counts() -> None:
    run_config = config.load("cifar10-frob")
    workload, assumed = configured(run_config.model, run_config.data)
    from ray_jobs.models import make_model

    model = make_model(run_config.model, *SHAPES["cifar10"], seed=0)
    assert (workload.parameters, assumed) == (sum(p.numel() for p in model.parameters()), "")
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(torch.zeros(3, 3, 32, 32)), torch.zeros(3, dtype=torch.long)).backward()
    flops = sum(op.flops_at_0 + 3 * op.flops_each for op in workload.operations)
    assert flops == counter.get_total_flops()


def test_activations_are_what_autograd_saves() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 3)).to("meta")
    workload = traced(model, (20,))
    # The images, tanh's output (once, for tanh and the second layer), log-softmax's, the labels, the loss's weight.
    at_0, each = workload.saved or (0.0, 0.0)
    assert each == 20 + 50 + 3 + 1
    assert at_0 == 1
    assert workload.saved_bytes(10, "bf16") == 2 * (1 + 10 * 74)


def test_an_operation_is_bound_by_arithmetic_or_memory_and_all_by_the_host() -> None:
    workload = Workload(10, 1, (Operation(0, 1e9, 0, 1), Operation(0, 0, 0, 1e9)), None)
    hardware = replace(FREE, memory_bandwidth=4e9, seconds_per_operation=0.1)
    assert workload.device_seconds(2, hardware, "float32") == pytest.approx(2e-3 + 2)
    assert workload.device_seconds(2, hardware, "bf16") == pytest.approx(2e-3 + 1)
    assert workload.host_seconds(hardware) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_shapes_are_those_of_the_data(name: Any) -> None:
    source = read(config.DataConfig(name=name))
    assert (tuple(source.train.images.shape[1:]), source.num_classes) == SHAPES[name]


# the command


def test_the_command_prints_every_S_and_marks_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "cifar10-frob", "--gpus", "16", "--n", "7"]) == 0
    printed = capsys.readouterr().out
    rows = [row for line in printed.splitlines() if (row := line.split())[:2] == ["16", "7"]]
    assert [row[2] for row in rows] == ["1", "2", "4", "8"]
    assert sum("best" in row for row in rows) == 1
    assert "sample rank 3" in printed


def test_several_ask_for_the_best_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--parameters", "1e9", "--flops-per-example", "1.2e13", "--activations-gb", "3.4"]
    assert cli.main(["plan", "cifar10-frob", "--gpus", "8,64", "--n", "3,7", *asked]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.endswith("best")]
    assert rows == [["8", "3"], ["8", "7"], ["64", "3"], ["64", "7"]]


def test_batches_that_cannot_be_shared_are_left_out_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "cifar10-frob", "--gpus", "64", "--n", "2", "--set", "training.batch_size=96"]) == 0
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "S = 1 (D = 64); see training.batch_size" in printed


def test_what_does_not_fit_the_memory_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "cifar10-frob", "--gpus", "8", "--parameters", "9e9", "--flops-per-example", "1e12"]) == 0
    printed = capsys.readouterr().out
    assert "no S fits the memory" in printed
    assert "best" not in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "8", "--link", "carrier-pigeon"], "--link 'carrier-pigeon' is not known. Use one of: nvlink"),
        (["--gpus", "12"], "--gpus 12 does not fill nodes of 8"),
        (["--gpus", "128", "--link", "gloo"], "--link gloo is one machine of 64 processes, not 128"),
        (["--gpus", "8", "--utilisation", "30"], "--utilisation 30: it is the part of the peak"),
        (["--gpus", "8", "--parameters", "1e9"], "--parameters and --flops-per-example go together"),
        (["--gpus", "8", "--activations-gb", "1"], "--activations-gb goes with --parameters"),
        (["--gpus", "8", "--n", "1"], "n_samples: must be 2 or more for frobenius"),
        (
            ["--gpus", "8", "--set", "optimizer.sample_parallel=3"],
            "sample_parallel: must divide scaling.num_workers = 8",
        ),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if "--n" in arguments else ["--n", "3"]
    assert cli.main(["plan", "digits-frob", *given, *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--gpus", "0"), ("--tflops", "-1"), ("--memory-gb", "inf")])
def test_numbers_must_be_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "digits-frob", "--gpus", "8", option, value])
    assert caught.value.code == 2
    assert f"argument {option}: {value!r} is not" in capsys.readouterr().err


def test_overrides_of_a_profile() -> None:
    known = profile("ethernet", tflops=500, utilisation=0.5, gbps=200, gpus_per_node=4, memory_gb=141)
    assert known.flops["bf16"] * known.utilisation == 250e12
    assert (known.gpus_per_node, known.memory) == (4, 141e9)
    assert known.between is not None
    assert known.between.bandwidth == 25e9
    with pytest.raises(ConfigError, match="not known"):
        profile("token-ring")
