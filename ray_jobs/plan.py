"""What a step would cost on W GPUs, for every S: `phisam plan`.

Who evaluates what, and which losses are exchanged when, is not modelled: it is asked of the code that a step runs
(`phisam.evaluation.plan`, and `Deal`, `LossExchange` and `sample_size` of `phisam.sharding`). Seconds come from
`plan_workload.py` (an evaluation) and `plan_hardware.py` (collectives, memory); `plan_table.py` prints.

    step = the longest evaluation of each round         more than perfect: idle ranks, small batches
         + noise, perturbation, rows, base optimizer    vectors of d numbers, through memory
         + what of launching all that is not hidden     the host
         + what of the all-reduce is not hidden         behind the last backward
         + exchanges of the losses                      latency

Not in it: reading data, validation, checkpoints, ranks that are slower than others, SSAM's mask (once an epoch).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor

import phisam
from phisam.closures import whole
from phisam.evaluation import Evaluation
from phisam.evaluation import plan as evaluations_of_step
from phisam.noise import BLOCK, FisherMask
from phisam.sharding import Deal, LossExchange, SampleMesh, Scope, sample_size
from ray_jobs.config import RunConfig
from ray_jobs.plan_hardware import Hardware
from ray_jobs.plan_workload import Workload
from ray_jobs.worker import make_measure

BACKWARD = 2 / 3  # of an evaluation's arithmetic
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DDP's defaults
LOSS_BYTES = 8
LOSSES = {
    "small_batches": "small batches",
    "idle_ranks": "idle ranks",
    "vectors": "noise and vectors",
    "host": "host",
    "all_reduce": "all-reduce",
    "latency": "latency",
}
"""What the fields of `Seconds` are called in tables."""


@dataclass(frozen=True)
class Collective:
    """numbers: what this rank brings."""

    kind: Literal["all_gather", "all_reduce"]
    numbers: int
    item_bytes: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.numbers * self.item_bytes

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends, in a ring."""
        share = 2 * (world_size - 1) / world_size if self.kind == "all_reduce" else world_size - 1
        return share * self.size


@dataclass(frozen=True)
class _Counted(SampleMesh):
    """A mesh whose exchange of losses is only counted."""

    gathers: list[int] = field(default_factory=list)

    def gather(self, losses: Tensor) -> Tensor:
        self.gathers.append(len(losses))
        return losses.expand(self.data_size, self.sample_size, len(losses))


@dataclass(frozen=True)
class Layout:
    """One step's evaluations on a mesh (data = D) x (sample = S)."""

    measure: phisam.Measure
    n_samples: int
    data_size: int
    sample_size: int
    scope: Scope = "global"
    perturb_fraction: float = 1.0
    micro_batches: int = 1
    lam: float | None = 1.0  # of a step with the term; None: it changes from step to step

    @property
    def world_size(self) -> int:
        """W."""
        return self.data_size * self.sample_size

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """What a step evaluates, in the order in which it is dealt."""
        return evaluations_of_step(self.measure, self.n_samples, self.perturb_fraction, self.sample_size)[0]

    def passes(self, index: int) -> tuple[int, float]:
        """(passes over the share of a data rank, part of it) of an evaluation; with micro-batches, of each of them."""
        evaluation = self.evaluations[index]
        passes = len(evaluation.draw.noise.signs) if evaluation.draw else 1
        return passes, 1.0 if evaluation.part is whole else self.perturb_fraction

    def share(self, index: int) -> float:
        """Of an evaluation's time: x without its backward takes a third, if no other rank is busy meanwhile."""
        needed = self.x_counts or self.measure.needs_gradient or self.sample_size > 1
        return 1.0 if index > 0 or needed else 1 - BACKWARD

    @cached_property
    def deal(self) -> Deal:
        """Who evaluates what."""
        return Deal(len(self.evaluations), self.sample_size, self.measure.needs_gradient)

    def points(self, sample_rank: int) -> list[int | None]:
        """The points that a sample rank evaluates, by round; None where it waits."""
        dealt = [self.deal.evaluation(round, sample_rank) for round in range(self.deal.rounds)]
        return [None if index is None else self.evaluations[index].point for index in dealt]

    @cached_property
    def rows(self) -> int:
        """m: components of psi, each a row of d numbers on ranks with several points."""
        return len(self.measure.slopes(torch.zeros(()), 1)[0]) if len(self.evaluations) > 1 else 0

    @property
    def x_counts(self) -> bool:
        """Whether g has a part of grad L(x); with lam = 1 trace needs none, and SAM as its direction alone."""
        known = None if self.lam is None else self.measure.weight_at_x(self.lam)
        return self.perturb_fraction < 1 or known != 0

    def rows_held(self, sample_rank: int) -> int:
        """Rows that a sample rank has before its last point: gradients at x, and m sums over perturbed points."""
        earlier = self.points(sample_rank)[:-1]
        if sample_rank > 0 and self.deal.everywhere(0):
            earlier = earlier[1:]  # the gradient at x is rank 0's to keep
        return (earlier.count(0) if self.x_counts else 0) + (self.rows if any(earlier) else 0)

    def collectives(self, d: int, item_bytes: int) -> list[Collective]:
        """Of one step through DDP, in order."""
        mesh = _Counted(0, self.data_size, 0, self.sample_size)
        exchange = LossExchange(mesh, self.deal, self.scope)
        for round in range(self.deal.rounds):
            exchange.report(round, torch.zeros((), dtype=torch.float64))
        gathers = [Collective("all_gather", numbers, LOSS_BYTES) for numbers in mesh.gathers]
        gradient = Collective("all_reduce", d, item_bytes)
        reduced_direction = self.measure.needs_gradient and self.scope == "global" and self.data_size > 1
        direction = [gradient] if reduced_direction else []
        return [*gathers[:1], *direction, *gathers[1:], gradient]


@dataclass(frozen=True)
class Seconds:
    """Of a step, by what they are spent on; without the first, all of them are losses.

    evaluations: of the step's passes over the batch, shared perfectly by W GPUs at the speed of the whole batch.
    small_batches: a GPU's share is slower an example than the whole batch.
    idle_ranks: sample ranks that wait, or evaluate x a second time.
    vectors: noise, perturbation, rows, base optimizer.
    host: launching operations, as far as the device waits for it.
    all_reduce: what the last backward does not hide.
    latency: exchanges of losses.
    """

    evaluations: float
    small_batches: float
    idle_ranks: float
    vectors: float
    host: float
    all_reduce: float
    latency: float

    @property
    def total(self) -> float:
        """Of the step."""
        return float(sum(getattr(self, each.name) for each in fields(self)))

    @property
    def efficiency(self) -> float:
        """Against W GPUs that share the evaluations perfectly and do nothing else."""
        return self.evaluations / self.total

    def limit(self) -> str:
        """What the step is limited by: the largest loss with its part of the step, or compute if losses are small."""
        if self.efficiency >= 0.9:
            return "compute"
        losses = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "evaluations"}
        largest = max(losses, key=lambda name: losses[name])
        return f"{LOSSES[largest]} {losses[largest] / self.total:.0%}"

    def mixed(self, other: Seconds, share: float) -> Seconds:
        """The mean step where `share` of them are these and the rest are others."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return Seconds(**{name: share * a + (1 - share) * b for name, (a, b) in pairs.items()})


@dataclass(frozen=True)
class Option:
    """One S on W GPUs. examples: of one pass on one GPU. sent: bytes that a GPU sends in a step."""

    layout: Layout
    examples: float
    seconds: Seconds
    memory: float
    activations_known: bool
    sent: float
    all_reduces: int
    gathers: int
    fits: bool
    chosen: bool
    """What sample_parallel of the description gives."""


@dataclass(frozen=True)
class Plan:
    """All S for one W and one n. sgd: seconds of the base optimizer's step on the same GPUs and batch, if they can."""

    world_size: int
    n_samples: int
    options: list[Option]
    refused: list[int]
    """S whose data ranks and micro-batches cannot share the batch equally, as `phisam train` wants it."""
    sgd: float | None

    @property
    def best(self) -> Option | None:
        """The fastest that fits."""
        return min((o for o in self.options if o.fits), key=lambda option: option.seconds.total, default=None)


class Model:
    """Costs of the steps of one run description on one kind of hardware."""

    def __init__(self, config: RunConfig, workload: Workload, hardware: Hardware) -> None:
        self.config, self.workload, self.hardware = config, workload, hardware
        self.measure = make_measure(config.optimizer)
        self.precision = config.training.precision
        self.item_bytes = 8 if self.precision == "float64" else 4  # parameters are never half precision
        base = config.optimizer.base
        momentum = int(base.name == "sgd" and base.momentum > 0)
        self.states = 2 if base.name in ("adam", "adamw") else momentum

    def plan(self) -> Plan:
        """For scaling.num_workers GPUs, or the most of a range, and optimizer.n_samples.

        Raises:
            ConfigError: that many GPUs do not fit the hardware.
        """
        world_size, settings = self.config.scaling.most_workers, self.config.optimizer
        self.hardware.check(world_size)
        shares = self.config.training.batch_size / self.config.training.micro_batches  # for the data ranks
        sizes = [s for s in range(1, world_size + 1) if world_size % s == 0]
        possible = [s for s in sizes if shares % (world_size // s) == 0]
        chosen = sample_size(world_size, settings.n_samples, settings.sample_parallel, self.measure)
        useful = [s for s in sizes if s < 2 * len(self.layout(s).evaluations) or s == chosen]  # beyond, most ranks idle
        return Plan(
            world_size,
            settings.n_samples,
            [self.option(s, s == chosen) for s in useful if s in possible],
            [s for s in useful if s not in possible],
            self.seconds(self.fitted(self.layout(1, phisam.sgd()))).total if 1 in possible else None,
        )

    def layout(self, sample_size: int, measure: phisam.Measure | None = None) -> Layout:
        """The step on this many sample ranks; of another measure, as in the steps that `every` leaves out."""
        settings = self.config.optimizer
        return Layout(
            measure or self.measure,
            settings.n_samples,
            self.config.scaling.most_workers // sample_size,
            sample_size,
            settings.scope,
            settings.perturb_fraction,
            self.config.training.micro_batches,
            None if settings.lam_schedule else settings.every * settings.lam,
        )

    def fitted(self, layout: Layout) -> Layout:
        """With the fewest micro-batches, from the description's on, that the memory takes; as it is if none does."""
        share = self.config.training.batch_size // layout.data_size
        counts = [count for count in range(layout.micro_batches, share + 1) if share % count == 0]
        tried = (replace(layout, micro_batches=count) for count in counts)
        return next((each for each in tried if self.memory(each) <= self.hardware.memory), layout)

    def option(self, sample_size: int, chosen: bool = False) -> Option:
        """One S."""
        layout, every = self.fitted(self.layout(sample_size)), self.config.optimizer.every
        collectives = layout.collectives(self.workload.parameters, self.item_bytes)
        seconds = self.seconds(layout)
        if every > 1:
            seconds = seconds.mixed(self.seconds(replace(layout, measure=phisam.sgd())), 1 / every)
        return Option(
            layout,
            self._examples(layout),
            seconds,
            self.memory(layout),
            self.workload.saved is not None,
            sum(collective.sent(layout.world_size) for collective in collectives),
            sum(collective.kind == "all_reduce" for collective in collectives),
            sum(collective.kind == "all_gather" for collective in collectives),
            self.memory(layout) <= self.hardware.memory,
            chosen,
        )

    def memory(self, layout: Layout) -> float:
        """Bytes on the GPU that needs most: vectors of d numbers, and the activations of a pass if they are known."""
        activations = self.workload.saved_bytes(self._examples(layout), self.precision)
        return self.vectors_held(layout) * self.workload.parameters * self.item_bytes + (activations or 0.0)

    def seconds(self, layout: Layout) -> Seconds:
        """Of one step."""
        training, hardware = self.config.training, self.hardware
        W, passes_of_share = layout.world_size, layout.micro_batches
        example = self.workload.device_seconds(training.batch_size, hardware, self.precision) / training.batch_size

        def one_pass(part: float) -> float:
            examples = ceil(part * self._examples(layout) - 1e-9)
            return self.workload.device_seconds(examples, hardware, self.precision)

        evaluating = busy = last_pass = 0.0
        host = hardware.seconds_per_step + layout.deal.rounds * hardware.seconds_per_point
        for round in range(layout.deal.rounds):
            indices = list(layout.deal.evaluations(round))
            if len(indices) < layout.sample_size and not layout.deal.everywhere(round):
                indices.append(0)  # who has no point does not wait: DDP needs a backward of it
            dealt = [layout.passes(index) for index in indices]
            work = [layout.share(index) * passes for index, (passes, _) in zip(indices, dealt, strict=True)]
            parts = [part for _, part in dealt]
            evaluating += passes_of_share * max(map(prod, zip(work, map(one_pass, parts), strict=True)))
            busy += max(map(prod, zip(work, parts, strict=True))) * training.batch_size / layout.data_size * example
            host += max(passes for passes, _ in dealt) * passes_of_share * self.workload.host_seconds(hardware)
            last_pass = max(map(one_pass, parts))
        shares = [layout.share(index) * prod(layout.passes(index)) for index in range(len(layout.evaluations))]
        perfect = sum(shares) * training.batch_size * example / W
        vectors, launches = self.vector_seconds(layout)
        host += launches
        *earlier, gradient = layout.collectives(self.workload.parameters, self.item_bytes)
        directions = [hardware.all_reduce(c.size, W) for c in earlier if c.kind == "all_reduce"]
        return Seconds(
            evaluations=perfect,
            small_batches=evaluating - busy,
            idle_ranks=busy - perfect,
            vectors=vectors,
            host=max(0.0, host - evaluating - vectors) if hardware.asynchronous else host,
            all_reduce=self.exposed(gradient.size, W, hardware.overlap * BACKWARD * last_pass) + sum(directions),
            latency=sum(hardware.all_gather(c.size, W) for c in earlier if c.kind == "all_gather"),
        )

    def exposed(self, size: int, world_size: int, hidden: float) -> float:
        """Seconds of DDP's all-reduce that the backward does not hide: of its last bucket, which is full only at the
        end, and of the others what is left after `hidden` seconds.
        """
        buckets = [min(size, FIRST_BUCKET_BYTES)]
        while size - sum(buckets) > 0:
            buckets.append(min(size - sum(buckets), BUCKET_BYTES))
        durations = [self.hardware.all_reduce(bucket, world_size) for bucket in buckets]
        return durations[-1] + max(0.0, sum(durations[:-1]) - hidden)

    def vector_seconds(self, layout: Layout) -> tuple[float, float]:
        """Of what is done with vectors of d numbers on the rank that has most of it: the device's, and the host's."""
        d, hardware = self.workload.parameters, self.hardware
        moved = drawn = 0  # numbers read or written, and drawn, in multiples of d
        host = 0.0
        for round in range(layout.deal.rounds):
            index = layout.deal.evaluations(round)[-1]
            extra_passes = layout.passes(index)[0] * layout.micro_batches - 1
            moved += 3 * extra_passes
            draw = layout.evaluations[index].draw
            last = round == layout.deal.rounds - 1
            if draw is None:
                moved += 0 if last else 2
                continue
            moves = len(draw.noise.signs)
            moved += 3 * moves + (0 if last else 3 * layout.rows)
            moved += 3 * draw.noise.unit + 7 * (draw.noise.scaling is not None) + 3 * (draw.noise.mask is not None)
            moved += 2 * (draw.sign < 0)
            host += moves * self.workload.tensors * hardware.seconds_per_operation
            if draw.noise.of_gradient:
                moved += 4
            else:
                drawn += 1
                host += -(-d // BLOCK) * hardware.seconds_per_block
        moved += 4 if len(layout.evaluations) > 1 else 0  # x is saved and put back
        moved += 3 * layout.rows_held(0)  # they are combined
        moved += 3 + 1  # DDP's buckets; is g finite
        moved += 3 + 2 * self.states  # the base optimizer
        device = drawn * hardware.seconds_per_random + moved * self.item_bytes / hardware.memory_bandwidth
        return d * device, host

    def vectors_held(self, layout: Layout) -> float:
        """Vectors of d numbers on the GPU that has most: parameters, DDP's buckets, optimizer state, x, v, rows, and a
        gradient in the making beside the rows, or beside the sum of a point's earlier passes.
        """
        several = layout.deal.rounds > 1
        passes = max(layout.passes(index)[0] for index in range(len(layout.evaluations))) * layout.micro_batches
        rows = max(layout.rows_held(rank) for rank in range(min(2, layout.sample_size)))
        direction = int(layout.measure.needs_gradient and several)
        masks = sum(isinstance(noise.mask, FisherMask) for noise in layout.measure.noises) / self.item_bytes
        return 2 + self.states + 2 + rows + several + (passes > 1) + direction + masks

    def _examples(self, layout: Layout) -> float:
        """Of one pass on one GPU."""
        return self.config.training.batch_size / (layout.data_size * layout.micro_batches)
