"""Ranks that are much slower than the others, named: all ranks of a step wait for the slowest, and none says for whom.

What is compared is the time of a rank's own forward passes, in which it waits for nobody, by the example: ranks that
evaluate other numbers of points, or parts of the batch, are measured by the same yard. Once an epoch each rank brings
two numbers; on CUDA the times are events that are read when the device is done anyway.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
import torch.distributed as dist

FACTOR = 1.5  # of the other ranks' median
LEAST_SECONDS = 1.0  # more than the others, in an epoch: below that it is noise, or nobody's trouble
MOST_EVENTS = 1000  # pairs in an epoch on CUDA: the rest of it is as they are

logger = logging.getLogger("phisam")


class Pace:
    """How fast this rank's forward passes are, beside the others'."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._said: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._seconds = 0.0
        self._examples = 0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def forward(self, examples: int) -> Iterator[None]:
        """Around a forward pass on so many examples; nothing here waits for the device."""
        if self._device.type == "cuda":
            if len(self._events) == MOST_EVENTS:
                yield
                return
            start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
        self._examples += examples

    def end_epoch(self) -> None:
        """Rank 0 warns of each rank that is slower than the others, once. Collective, where the device is done."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        own = torch.tensor([seconds, self._examples], dtype=torch.float64, device=self._device)
        self._begin()
        everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, own)
        found = laggards([(float(each[0]), int(each[1])) for each in everyones])
        if not found.keys() - self._said:  # the same on all ranks
            return
        nodes: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(nodes, socket.gethostname())
        if dist.get_rank() == 0:
            for rank in sorted(found.keys() - self._said):
                logger.warning(
                    "worker %d on node %s is a straggler: its forward passes take %.1f times as long as the others' "
                    "and all wait for it. Look at what else runs there, or leave the node out. This is said once.",
                    rank,
                    nodes[rank],
                    found[rank],
                )
        self._said |= found.keys()


def laggards(measured: Sequence[tuple[float, int]]) -> dict[int, float]:
    """Rank -> how many times as long an example takes it as the median of the others.

    measured: seconds and examples of each rank in an epoch. Those of ranks whose slowness cost a second or more.
    """
    found = {}
    paces = {rank: seconds / examples for rank, (seconds, examples) in enumerate(measured) if examples}
    for rank, pace in paces.items():
        others = [other for each, other in paces.items() if each != rank]
        usual = median(others) if others else 0.0
        lost = (pace - usual) * measured[rank][1]
        if others and pace >= FACTOR * usual and lost >= LEAST_SECONDS:
            found[rank] = pace / usual if usual else float("inf")
    return found
