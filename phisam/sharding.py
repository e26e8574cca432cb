"""Who evaluates which point, and every collective of the library.

W ranks form a mesh (data = D) x (sample = S), D S = W. Ranks of one data coordinate see the same examples; a step's
evaluations, the points e = 0..n, are dealt to the sample ranks in rounds. D = 2, S = 3, n = 4:

                      sample rank 0   sample rank 1   sample rank 2
    round 0           e = 0           e = 1           e = 2
    round 1           e = 3           e = 4           -             n + 1 = 5 points, ceil(5 / 3) rounds
    data rank 0       rank 0          rank 1          rank 2
    data rank 1       rank 3          rank 4          rank 5

A step's collectives, whatever n and m are:

    losses      n + 1 scalars, all-gathered: after round 0 (it brings L_0, which every delta needs) and after the
                last round; once if there is one round. With scope = "global" and D > 1 after each round, since
                psi'(delta_e) of a mean over the data ranks must be known before a row takes up the gradient.
    gradient    one all-reduce of d numbers: DDP's, which overlaps the last backward, or `reduce_gradients`.

A noise that is made of grad L (SAM's) has every sample rank evaluate x in round 0; with scope = "global" its direction
costs one more all-reduce of d numbers. FSDP2 reduces in every backward instead (`wrapping.py`).

A mesh of one process is `SampleMesh()`: the same calls, and nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from phisam.measures import Measure

Scope = Literal["global", "shard"]

# torch 2.14 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class SampleMesh:
    """One process: D = S = 1. Feed the data loader with data_rank and data_size."""

    data_rank: int = 0
    data_size: int = 1
    sample_rank: int = 0
    sample_size: int = 1

    @property
    def world_size(self) -> int:
        """W = D S."""
        return self.data_size * self.sample_size

    def gather(self, losses: Tensor) -> Tensor:
        """Every rank's losses of some rounds, (rounds,) -> (D, S, rounds)."""
        return losses[None, None]

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """.grad becomes its mean over the ranks; None where it is None on all of them."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        return tensor

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Every rank gets rank 0's values."""


@dataclass(frozen=True)
class ProcessMesh(SampleMesh):
    """The ranks of the default process group; rank = data_rank * S + sample_rank. Every method is collective."""

    def gather(self, losses: Tensor) -> Tensor:
        everyone = losses.new_empty(self.world_size * len(losses))
        _all_gather(everyone, losses)
        return everyone.view(self.data_size, self.sample_size, len(losses))

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """One all-reduce of d numbers and a flag for each parameter tensor."""
        # d numbers, and one for each parameter tensor that says whether this rank has a gradient for it: base
        # optimizers treat None otherwise than 0 (weight decay), so replicas must agree on which are None.
        used = torch.tensor([float(p.grad is not None) for p in parameters], dtype=parameters[0].dtype)
        parts = [p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
        flat = torch.cat([*parts, used.to(parameters[0].device, non_blocking=True)])
        dist.all_reduce(flat)
        sizes = [*(p.numel() for p in parameters), len(parameters)]
        *means, used_by = torch.split(flat.div_(self.world_size), sizes)
        # Only a rank that lacks a gradient needs to know whether another has one: no host read otherwise.
        absent = [] if all(p.grad is not None for p in parameters) else (used_by == 0).tolist()
        for i, (p, mean) in enumerate(zip(parameters, means, strict=True)):
            p.grad = None if absent and absent[i] else mean.view_as(p)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@dataclass(frozen=True)
class Deal:
    """Which of a step's evaluations a sample rank has in which round.

    Args:
        n_evaluations: counted from 0; evaluation 0 is at x.
        sample_size: S.
        first_everywhere: every sample rank does evaluation 0, in a round of its own: its gradient makes the others.
    """

    n_evaluations: int
    sample_size: int
    first_everywhere: bool

    @property
    def rounds(self) -> int:
        """Rounds of the step."""
        alone = int(self.first_everywhere)
        return alone - (-(self.n_evaluations - alone) // self.sample_size)

    def evaluations(self, round: int) -> range:
        """The evaluations of a round, one for each sample rank in order; the last ones may have none."""
        first = round * self.sample_size
        if self.first_everywhere:
            if round == 0:
                return range(1)
            first -= self.sample_size - 1
        return range(first, min(first + self.sample_size, self.n_evaluations))

    def everywhere(self, round: int) -> bool:
        """Whether all sample ranks do one and the same evaluation."""
        return self.first_everywhere and round == 0

    def evaluation(self, round: int, sample_rank: int) -> int | None:
        """What a sample rank evaluates in a round; None if it would only wait."""
        dealt = self.evaluations(round)
        if self.everywhere(round):
            return 0
        return dealt[sample_rank] if sample_rank < len(dealt) else None


def sample_mesh(
    n_samples: int, sample_parallel: int | Literal["auto"] = "auto", measure: Measure | None = None
) -> SampleMesh:
    """The mesh (data = D) x (sample = S) over the default process group, D S = W.

    Args:
        n_samples: perturbed points of a step, `measure.n_points(n)`; a step evaluates n_samples + 1 points. With
            `measure`: the n_samples that PhiSAM gets.
        sample_parallel: S, or "auto" as `sample_size` has it.
        measure: what the points cost: pairs cost two evaluations, and those of SAM wait for the gradient at x.

    Without an initialised process group the result is a mesh of one process.

    Raises:
        ValueError: sample_parallel is no divisor of the world size.
    """
    initialised = dist.is_available() and dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    size = sample_size(world_size, n_samples, sample_parallel, measure)
    mesh = ProcessMesh if initialised else SampleMesh
    return mesh(rank // size, world_size // size, rank % size, size)


def sample_size(
    world_size: int,
    n_samples: int,
    sample_parallel: int | Literal["auto"] = "auto",
    measure: Measure | None = None,
) -> int:
    """S for W processes; arguments as `sample_mesh` has them.

    "auto" takes the divisor of W, at most n_samples + 1, that wastes the least work (a mesh costs S times the
    evaluations of its busiest rank, on a data rank's batch); of equals the largest, since one point a rank overlaps its
    all-reduce with its backward and keeps per-rank batches large. It knows W and the points, and no times: where a
    rank's batch is so small that launches or the all-reduce take longer than the arithmetic, an S that leaves ranks
    idle can be faster, and `phisam plan` shows it.

    Raises:
        ValueError: sample_parallel is no divisor of the world size.
    """
    if n_samples < 0:
        raise ValueError(f"n_samples must be >= 0, got {n_samples}")
    costs = [1] * (n_samples + 1) if measure is None else measure.evaluations(n_samples)
    first_everywhere = measure is not None and measure.needs_gradient
    divisors = [s for s in range(1, world_size + 1) if world_size % s == 0]

    def work(size: int) -> int:
        deal = Deal(len(costs), size, first_everywhere)
        return size * sum(max(costs[e] for e in deal.evaluations(round)) for round in range(deal.rounds))

    if sample_parallel == "auto":
        return min((s for s in divisors if s <= len(costs)), key=lambda s: (work(s), -s))
    if sample_parallel not in divisors:
        raise ValueError(
            f"world size {world_size} = data x sample, but sample = sample_parallel = {sample_parallel!r} leaves "
            f'data = {world_size} / {sample_parallel!r}, no whole number; use one of {divisors} or "auto"'
        )
    return sample_parallel


class LossExchange:
    """The losses of one step, as the ranks come to know them.

    scope = "global": a loss is the mean over the data ranks, the paper's algorithm on the global batch.
    scope = "shard": each data rank uses its own (m-sharpness).
    """

    def __init__(self, mesh: SampleMesh, deal: Deal, scope: Scope) -> None:
        self._mesh = mesh
        self._deal = deal
        self._scope = scope
        self._means = scope == "global" and mesh.data_size > 1
        self._waiting: list[Tensor] = []
        self._known: list[Tensor] = []  # (D, evaluations) of each exchange

    def report(self, round: int, loss: Tensor) -> Tensor:
        """Takes this rank's loss of a round (scalar, float64); returns it as the measure must see it.

        Collective in round 0, in the last round, and in each round where the scope needs it.
        """
        self._waiting.append(loss)
        if not (round in (0, self._deal.rounds - 1) or self._means):
            return loss
        by_rank = self._mesh.gather(torch.stack(self._waiting))
        rounds = range(round + 1 - len(self._waiting), round + 1)
        dealt = sum(len(self._deal.evaluations(past)) for past in rounds)
        by_evaluation = by_rank.transpose(1, 2).flatten(1)[:, :dealt]
        self._known.append(by_evaluation)
        self._waiting = []
        dealt_here = self._deal.evaluation(round, self._mesh.sample_rank)
        if dealt_here is None or not self._means:
            return loss
        return by_evaluation[:, dealt_here - self._deal.evaluations(rounds[0]).start].mean()

    @cached_property
    def first_losses(self) -> Tensor:
        """The losses of round 0, when it was reported. Float64."""
        return self._in_scope(self._known[0])

    @cached_property
    def everyones(self) -> Tensor:
        """(D, evaluations), after the last round: every data rank's losses, the same on all ranks. Float64."""
        return torch.cat(self._known, dim=1)

    @cached_property
    def losses(self) -> Tensor:
        """The losses of all evaluations, after the last round. Float64."""
        return self._in_scope(self.everyones)

    def _in_scope(self, by_evaluation: Tensor) -> Tensor:
        return by_evaluation.mean(0) if self._means else by_evaluation[self._mesh.data_rank]
