"""The collectives of a measurement: a process alone, or the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that measure together; group = None is this process alone, and sends nothing."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group that it was given to measure with")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def least(self, value: float, device: torch.device) -> float:
        """The smallest of the ranks' values: what all of them can go by."""
        if self._group is None:
            return value
        smallest = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self._group)
        return float(smallest)

    def all(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is true on every rank: ranks that decide alike wait for each other nowhere."""
        return self.least(float(flag), device) == 1.0

    def equal(self, fingerprint: Tensor) -> bool:
        """Whether every rank has the same numbers; the same answer on all of them."""
        if self._group is None:
            return True
        low, high = fingerprint.clone(), fingerprint.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self._group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self._group)
        return bool(torch.equal(low, high))
