"""About once a second the ranks of a training agree on what only one of them knows: that minutes have passed, that a
signal came, that a node will be taken away. One reduction of a few numbers; between meetings nothing is exchanged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

SECONDS = 1.0
"""Between meetings; a signal is heeded so fast."""


@dataclass(frozen=True)
class Agreed:
    """save: a checkpoint now; stop: and then no further step; evicted: the rank whose process must end, or -1;
    written: nothing is being written.
    """

    save: bool = False
    stop: bool = False
    evicted: int = -1
    written: bool = False


class Meeting:
    """When the ranks meet: at steps that they agreed on at the meeting before, SECONDS apart by rank 0's clock."""

    def __init__(self, device: torch.device, steps: int) -> None:
        """steps: of the run, that were taken before this loop began."""
        self._device = device
        self._next = steps + 1
        self._last = (steps, time.perf_counter())  # steps and time of the last meeting

    def due(self, steps: int) -> bool:
        """Whether all ranks meet after so many steps of the run."""
        return steps >= self._next

    def hold(self, steps: int, save: bool, stop: bool, evicted: bool, written: bool) -> Agreed:
        """What any rank wants, all do. Collective; waits for the device."""
        rank = dist.get_rank()
        interval = self._interval(steps) if rank == 0 else 0
        votes = [save, stop or evicted, rank + 1 if evicted else 0, written, interval]
        agreed = torch.tensor([int(vote) for vote in votes], device=self._device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        saves, stops, leaver, writes, interval = agreed.tolist()
        self._next, self._last = steps + interval, (steps, time.perf_counter())
        return Agreed(bool(saves), bool(stops), leaver - 1, bool(writes))

    def _interval(self, steps: int) -> int:
        """Steps to the next meeting; more than twice as many as the last time only if that was far too often."""
        before, then = self._last
        taken, passed = max(1, steps - before), time.perf_counter() - then
        return max(1, min(2 * taken, round(taken * SECONDS / max(passed, 1e-9))))
