"""Where a step's time goes: a stopwatch around the functions that do the parts of it.

The functions are wrapped from here, for the time of some steps that do not count in the table of ratios; nothing of it
is in phisam. Autograd on n + 1 scalars is part of "weights", DDP's all-reduce of "backward".
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from phisam import base, gradient, guards, measures, noise, sharding
from ray_jobs.bench import workloads
from ray_jobs.bench.timing import Clock


def _defining(base_class: type, names: Sequence[str]) -> list[tuple[Any, str]]:
    """A class and those derived from it, each with the methods that it defines itself."""
    return [(owner, name) for name in names for owner in _family(base_class) if name in vars(owner)]


def _family(base_class: type) -> list[type]:
    heirs = [base_class]
    children: list[type] = base_class.__subclasses__()
    for child in children:
        heirs += _family(child)
    return heirs


PARTS: dict[str, list[tuple[Any, str]]] = {
    "noise": [(noise.Noise, "start_")],
    "move": [(gradient.Perturbation, name) for name in ("draw", "move", "undo", "release")],  # draw: but for its noise
    "forward": [(workloads, "loss_of")],
    "backward": [(torch.autograd, "grad"), (torch.Tensor, "backward")],
    "rows": [(gradient.Rows, name) for name in ("add", "add_unperturbed", "combine")],
    "weights": _defining(measures.Measure, ("weights", "slopes", "factors")),
    "exchange": [
        (sharding.LossExchange, "report"),
        (sharding.ProcessMesh, "reduce_gradients"),
        (sharding.ProcessMesh, "sum"),
    ],
    "guards": [(guards.Buffers, name) for name in ("__init__", "rewind", "keep", "settle")],
    "base": [(base.BaseStep, "finish_gradient"), (base.BaseStep, "take"), (torch.optim.SGD, "step")],
}


OTHER = "other"
OPEN = (OTHER, "move")  # parts inside which another part may begin; what the rest call is theirs


class Stopwatch:
    """Seconds by part, from the moment it is made. Only the thread that made it is timed."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = dict.fromkeys([*PARTS, OTHER], 0.0)
        self._now = clock.now
        self._thread = threading.get_ident()
        self._part, self._since = OTHER, self._now()

    def switch(self, part: str) -> str:
        """From here on time is the part's. Returns whose it was."""
        now = self._now()
        self.seconds[self._part] += now - self._since
        previous, self._part, self._since = self._part, part, now
        return previous

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time given to the part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._part not in OPEN or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            outer = self.switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(outer)

        return timed


@contextmanager
def watched(clock: Clock) -> Iterator[Stopwatch]:
    """A stopwatch that is around all parts inside the with block."""
    functions = [(part, owner, name, getattr(owner, name)) for part, owned in PARTS.items() for owner, name in owned]
    stopwatch = Stopwatch(clock)
    try:
        for part, owner, name, function in functions:
            setattr(owner, name, stopwatch.around(part, function))
        yield stopwatch
    finally:
        for _, owner, name, function in functions:
            setattr(owner, name, function)


def parts_of(step: Callable[[], object], steps: int, clock: Clock) -> dict[str, float]:
    """Seconds of one step by part, mean over some steps; "other" is what no part has."""
    with watched(clock) as stopwatch:
        for _ in range(steps):
            step()
        stopwatch.switch(OTHER)
    return {part: seconds / steps for part, seconds in stopwatch.seconds.items()}
