"""One network on so many workers: all its rows, measured together.

1. Count: each method is built, takes two steps on a few examples, then one on the whole batch, under the profiler.
2. Time: rounds of turns, SGD before and after every other method, until the time is over (at least MIN_ROUNDS). A
   turn is some steps in a row after an untimed one; where a step alone fills a turn it is that step.
3. Break down: some steps of SGD and PhiSAM under the stopwatch.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ray_jobs.bench.breakdown import parts_of
from ray_jobs.bench.counting import Counts, count
from ray_jobs.bench.methods import Method, ddp_sgd, methods, sgd
from ray_jobs.bench.timing import Clock, Spread, clock_for, ratios, steps_per_turn
from ray_jobs.bench.workloads import Workload

FEW = 2
"""Examples a worker in the first two steps: they make momentum and DDP's buckets, at no cost worth the name."""


@dataclass(frozen=True)
class Cell:
    """What is measured. seconds: how long it may take; rounds stop then, but not before min_rounds."""

    workload: Workload
    workers: int
    n_samples: tuple[int, ...]
    measure: str | None
    device: str
    seconds: float = 60.0
    turn_seconds: float = 0.2
    min_rounds: int = 3
    max_rounds: int = 15

    @property
    def title(self) -> str:
        """For a person."""
        return f"{self.workload.model} on {self.workers} worker{'s' if self.workers > 1 else ''}"


@dataclass(frozen=True)
class Row:
    """All that is known of one method in one cell. docs/speed.md says what each number means.

    memory: peak beyond SGD's, in multiples of d numbers; None for what has no SGD beside it.
    parts: SGD steps by part of the step; empty where it was not broken down.
    """

    model: str
    batch: int
    d: int
    workers: int
    method: str
    kind: str
    n_samples: int
    evaluations: int
    limit: float
    clock: str
    rounds: int
    seconds: Spread
    ratio: Spread
    all_reduces: int
    all_reduced_bytes: int
    other_collectives: int
    other_bytes: int
    memory: float | None
    parts: dict[str, float]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of dataclasses.asdict."""
        return cls(**{**values, "seconds": Spread(**values["seconds"]), "ratio": Spread(**values["ratio"])})


def measure_cell(cell: Cell, rank: int = 0) -> list[Row]:
    """All rows. Every worker calls it; what rank 0 returns counts."""
    started = time.perf_counter()
    device = torch.device(cell.device, rank) if cell.device == "cuda" else torch.device(cell.device)
    clock = clock_for(device, cell.workers)
    examples = cell.workload.examples(device)
    contestants: list[Contestant] = []
    references: dict[int, int] = {}
    _say(cell, rank, "counting")
    for method in methods(cell.workers, cell.n_samples, cell.measure):
        if not method.alone and method.data_size not in references:
            reference = Contestant(cell, _reference(method.data_size), device, examples)
            references[method.data_size] = reference.counts.peak_bytes
            del reference
        contestants.append(Contestant(cell, method, device, examples))
    first, *others = contestants
    turns = _Turns(clock, rank)
    sgd_seconds = turns.take(first, steps_per_turn(turns.take(first, 1), cell.turn_seconds))
    for contestant in contestants:
        contestant.steps = steps_per_turn(sgd_seconds * contestant.method.limit, cell.turn_seconds)

    deadline = started + cell.seconds
    while len(first.ratios) < cell.max_rounds:
        began = time.perf_counter()
        order = others if len(first.ratios) % 2 == 0 else others[::-1]
        around = [turns.take(first)]
        for contestant in order:
            contestant.turns.append(turns.take(contestant))
            around.append(turns.take(first))
        first.turns += around
        first.ratios.append(Spread.of(ratios(around[:-2], around[1:-1], around[2:])).median)
        for contestant, before, after in zip(order, around[:-1], around[1:], strict=True):
            contestant.ratios += ratios([before], contestant.turns[-1:], [after])
        lasted = time.perf_counter() - began
        _say(cell, rank, f"round {len(first.ratios)} took {lasted:.1f} s")
        over = time.perf_counter() + 1.5 * lasted > deadline  # the breakdown takes half a round
        if turns.agreed(over) and len(first.ratios) >= cell.min_rounds:
            break

    sgd_median = Spread.of(first.turns).median
    _say(cell, rank, "where the time goes")
    for contestant in contestants:
        if contestant.method.kind in ("sgd", "ddp-sgd", "phisam", "lam = 1"):
            parts = turns.break_down(contestant)
            contestant.parts = {part: seconds / sgd_median for part, seconds in parts.items()}
    return [contestant.row(clock, references) for contestant in contestants]


def _reference(data_size: int) -> Method:
    """The SGD whose memory is subtracted: it sees as many examples, through DDP where the method does."""
    build = ddp_sgd if dist.is_initialized() else sgd
    return Method("", "reference", 0, 1, 1.0, data_size, False, build)


class Contestant:
    """A method at work in a cell: built and counted on creation; then it gathers turns, ratios and parts."""

    def __init__(
        self, cell: Cell, method: Method, device: torch.device, examples: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self.cell, self.method = cell, method
        self.turns: list[float] = []
        self.ratios: list[float] = []
        self.parts: dict[str, float] = {}
        self.steps = 1
        model = cell.workload.make_model(device)
        self.d = sum(p.numel() for p in model.parameters())
        few = tuple(tensor[: FEW * cell.workers] for tensor in examples)
        if method.kind == "reference":
            examples = tuple(tensor.chunk(method.data_size)[0] for tensor in examples)  # type: ignore[assignment]

        def prepare() -> None:
            step = method.build(model)
            for _ in range(2):
                step(*few)
                if dist.is_initialized():
                    time.sleep(0.05)  # gloo's threads let go of what they sent: frees of theirs are not seen
            self.step: Callable[[], object] = partial(step, *examples)

        if device.type == "cuda":
            gc.collect()  # what others left must not be freed while this one is counted
        self.counts: Counts = count(prepare, lambda: self.step(), device)

    def row(self, clock: Clock, references: dict[int, int]) -> Row:
        """All that was gathered."""
        cell, method, counts = self.cell, self.method, self.counts
        beyond = counts.peak_bytes - references.get(method.data_size, counts.peak_bytes)
        return Row(
            model=cell.workload.model,
            batch=cell.workload.batch,
            d=self.d,
            workers=cell.workers,
            method=method.name,
            kind=method.kind,
            n_samples=method.n_samples,
            evaluations=method.evaluations,
            limit=method.limit,
            clock=clock.name,
            rounds=len(self.ratios),
            seconds=Spread.of(self.turns),
            ratio=Spread.of(self.ratios),
            all_reduces=counts.all_reduces,
            all_reduced_bytes=counts.all_reduced_bytes,
            other_collectives=counts.other_collectives,
            other_bytes=counts.other_bytes,
            memory=None if method.alone and cell.workers > 1 else beyond / (4 * self.d),
            parts=self.parts,
        )


class _Turns:
    """Turns that all workers take together; with one worker there is nothing to agree on."""

    def __init__(self, clock: Clock, rank: int) -> None:
        self._clock, self._rank = clock, rank
        self._together = dist.is_initialized()

    def take(self, contestant: Contestant, steps: int | None = None) -> float:
        """Seconds a step, of the slowest worker."""
        steps = contestant.steps if steps is None else steps
        if not self._begin(contestant, steps):
            return self._slowest(0.0)
        started = self._clock.now()
        for _ in range(steps):
            contestant.step()
        return self._slowest((self._clock.now() - started) / steps)

    def break_down(self, contestant: Contestant) -> dict[str, float]:
        """Seconds by part, as this rank sees them."""
        steps = contestant.steps if contestant.steps == 1 else 3 * contestant.steps
        if not self._begin(contestant, steps):
            return {}
        return parts_of(contestant.step, steps, self._clock)

    def agreed(self, flag: bool) -> bool:
        """Whether the flag is true for any worker."""
        return self._slowest(float(flag)) > 0

    def _begin(self, contestant: Contestant, steps: int) -> bool:
        """An untimed step first, where a turn is more than one: caches are the method's own then."""
        active = self._rank == 0 or not contestant.method.alone
        if active and steps > 1:
            contestant.step()
        if self._together:
            dist.barrier()
        return active

    def _slowest(self, seconds: float) -> float:
        if not self._together:
            return seconds
        on_cuda = dist.get_backend() == "nccl"
        slowest = torch.tensor(seconds, dtype=torch.float64, device="cuda" if on_cuda else "cpu")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)


def _say(cell: Cell, rank: int, what: str) -> None:
    if rank == 0:
        print(f"{cell.title}: {what}", file=sys.stderr, flush=True)
