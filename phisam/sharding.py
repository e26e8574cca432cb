"""Who evaluates which point, and every collective of the library.

W ranks form a mesh (data = D) x (sample = S), D S = W. Ranks of one data coordinate see the same examples; the
points e = 0..n are dealt to the sample ranks in rounds. D = 2, S = 3, n = 4:

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

A mesh of one process is `SampleMesh()`: the same calls, and nothing to send.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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

    def rounds(self, n_points: int) -> int:
        """Rounds in which n + 1 points are evaluated: ceil((n + 1) / S)."""
        return -(-n_points // self.sample_size)

    def point(self, round: int) -> int:
        """The point of this rank in a round; it has none there if the result is not below n + 1."""
        return round * self.sample_size + self.sample_rank

    def gather(self, losses: Tensor) -> Tensor:
        """Every rank's losses of some rounds, (rounds,) -> (D, S, rounds)."""
        return losses[None, None]

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """.grad becomes its mean over the ranks; None where it is None on all of them."""

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

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sample_mesh(n_samples: int, sample_parallel: int | Literal["auto"] = "auto") -> SampleMesh:
    """The mesh (data = D) x (sample = S) over the default process group, D S = W.

    Args:
        n_samples: perturbed points of a step, `measure.n_points(n)`; a step evaluates n_samples + 1 points.
        sample_parallel: S, or "auto" as `sample_size` has it.

    Without an initialised process group the result is a mesh of one process.

    Raises:
        ValueError: sample_parallel is no divisor of the world size.
    """
    initialised = dist.is_available() and dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    size = sample_size(world_size, n_samples, sample_parallel)
    mesh = ProcessMesh if initialised else SampleMesh
    return mesh(rank // size, world_size // size, rank % size, size)


def sample_size(world_size: int, n_samples: int, sample_parallel: int | Literal["auto"] = "auto") -> int:
    """S for W processes and n_samples + 1 points.

    "auto" takes the divisor of W, at most n_samples + 1, that wastes the least work (a mesh costs ceil((n + 1) / S) S
    evaluations of a data rank's batch); of equals the largest, since one point a rank overlaps its all-reduce with
    its backward and keeps per-rank batches large.

    Raises:
        ValueError: sample_parallel is no divisor of the world size.
    """
    if n_samples < 0:
        raise ValueError(f"n_samples must be >= 0, got {n_samples}")
    divisors = [s for s in range(1, world_size + 1) if world_size % s == 0]
    if sample_parallel == "auto":
        n_points = n_samples + 1
        return min((s for s in divisors if s <= n_points), key=lambda s: (-(-n_points // s) * s, -s))
    if sample_parallel not in divisors:
        raise ValueError(
            f"world size {world_size} = data x sample, but sample = sample_parallel = {sample_parallel!r} leaves "
            f'data = {world_size} / {sample_parallel!r}, no whole number; use one of {divisors} or "auto"'
        )
    return sample_parallel


class LossExchange:
    """The losses of one step, as the ranks come to know them.

    scope = "global": L_e is the mean over the data ranks, the paper's algorithm on the global batch.
    scope = "shard": each data rank uses its own (m-sharpness).
    """

    def __init__(self, mesh: SampleMesh, n_points: int, scope: Scope) -> None:
        self._mesh = mesh
        self._n_points = n_points
        self._scope = scope
        self._last_round = mesh.rounds(n_points) - 1
        self._each_round = scope == "global" and mesh.data_size > 1
        self._waiting: list[Tensor] = []
        self._known: list[Tensor] = []
        self._finite: list[Tensor] = []

    def report(self, round: int, loss: Tensor) -> Tensor:
        """Takes this rank's loss of a round (scalar, float64); returns L_e as the measure must see it.

        Collective in round 0, in the last round, and in each round where the scope needs it.
        """
        self._waiting.append(loss)
        if not (round in (0, self._last_round) or self._each_round):
            return loss
        first = round + 1 - len(self._waiting)
        by_rank = self._mesh.gather(torch.stack(self._waiting))
        by_point = by_rank.transpose(1, 2).flatten(1)[:, : self._n_points - first * self._mesh.sample_size]
        self._finite.append(torch.isfinite(by_point).all())
        self._known.append(by_point.mean(0) if self._scope == "global" else by_point[self._mesh.data_rank])
        self._waiting = []
        point = self._mesh.point(round)
        return self.losses[point] if point < self._n_points else loss

    @property
    def losses(self) -> Tensor:
        """L_0, ..., L_e as far as they were exchanged; all n + 1 after the last round. Float64."""
        return torch.cat(self._known)

    @property
    def finite(self) -> Tensor:
        """Whether every exchanged loss of every rank is finite; the same answer on all ranks. Bool scalar tensor."""
        return torch.stack(self._finite).all()


def reduces_in_backward(model: nn.Module) -> bool:
    """Whether the last backward all-reduces by itself: DDP's does.

    Not with find_unused_parameters: DDP would leave a parameter out that only earlier points of the step have used.
    """
    return isinstance(model, DistributedDataParallel) and not model.find_unused_parameters


@contextmanager
def reducing_forward(model: nn.Module) -> Iterator[None]:
    """The forward goes through DDP and arms its all-reduce; its broadcast of buffers, one more collective, is left out.

    Raises:
        ValueError: DDP's forward was not called.
    """
    if not reduces_in_backward(model):
        with local_forward(model):
            yield
        return
    assert isinstance(model, DistributedDataParallel)
    called: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: called.append(True))
    broadcast_buffers, model.broadcast_buffers = model.broadcast_buffers, False
    try:
        yield
    finally:
        hook.remove()
        model.broadcast_buffers = broadcast_buffers
    if not called:
        raise ValueError(
            "PhiSAM got the DDP-wrapped model, but the closure calls the module inside it, so that gradients would not "
            "be reduced and the replicas would diverge: call the wrapper in the closure"
        )


@contextmanager
def local_forward(model: nn.Module) -> Iterator[None]:
    """Forwards pass DDP by: a point whose gradient goes to a row must not touch the reducer.

    `no_sync` would not do: a forward inside it may still rebuild buckets, a collective that ranks with another
    number of points would not join.
    """
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    model.forward = model.module.__call__  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward  # the class's own method is seen again
