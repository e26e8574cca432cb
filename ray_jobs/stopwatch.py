"""What an epoch's seconds are made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds of an epoch's steps, and apart from them the seconds that training waited for checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.waited = 0.0
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Steps are taken from now on."""
        self._since = time.perf_counter()

    def stop(self) -> float:
        """The steps of an epoch are over; how long they took. The next start is of another epoch."""
        self._take()
        seconds, self.seconds, self._since = self.seconds, 0.0, None
        return seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What training waits for here is no training."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # steps that were begun are training
        self._take()
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started
        if self._since is not None:
            self._since = time.perf_counter()

    def _take(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
