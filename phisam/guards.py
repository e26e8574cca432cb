"""What the evaluation of a perturbed point must not disturb: buffers, dropout masks, and the user's trust.

Only point 0 may change buffers (BatchNorm's statistics, counters, any custom buffer), each point must start from
the same buffers, and all points of a step must see the same dropout masks: L_e - L_0 is to come from the
perturbation alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

logger = logging.getLogger("phisam")


class Buffers:
    """The model's buffers as they were before a step, and as point 0 left them."""

    def __init__(self, model: nn.Module) -> None:
        self._owners = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._after_point_0: list[Tensor | None] | None = None

    @torch.no_grad()
    def rewind(self) -> None:
        """The values, and the tensor objects, of before the step."""
        for module, name, buffer, before in self._owners:
            module._buffers[name] = buffer  # a forward may have assigned another tensor to the name
            if buffer is not None and before is not None:
                buffer.copy_(before)

    def keep(self) -> None:
        """Call after the evaluation of point 0: what `settle` is to leave in the model."""
        after = (module._buffers[name] for module, name, _, _ in self._owners)
        self._after_point_0 = [None if value is None else value.clone() for value in after]

    @torch.no_grad()
    def settle(self, taken: Tensor | None) -> None:
        """Ends a step: the values after point 0 if this rank evaluated it and the step was taken, else those before.

        taken: bool scalar tensor on the model's device; it is not read by the host. None: the step was broken off.
        """
        self.rewind()
        if self._after_point_0 is not None and taken is not None:
            for (module, name, buffer, before), after in zip(self._owners, self._after_point_0, strict=True):
                if buffer is None or before is None or after is None or after.shape != before.shape:
                    module._buffers[name] = after  # made, dropped or resized in the forward: no value to go back to
                else:
                    buffer.copy_(torch.where(taken, after, before))


@contextmanager
def same_randomness(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yields `restart(key)`, which puts torch's global generators in a state that depends on the key alone.

    On exit the user's own random streams go on as if nothing had been drawn. A key per (seed, step, data rank)
    gives all points of a step the same dropout masks on whichever rank they are evaluated, and a resumed run the
    masks it would have had, with no generator state to save.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]

    def restart(key: int) -> None:
        for generator in generators:
            generator.manual_seed(key)

    try:
        yield restart
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class Monitor:
    """Counts skipped steps on the device and says once what a user must hear, without the host waiting for a GPU.

    On CUDA the numbers travel to pinned memory behind the step, and are looked at when they have arrived.
    """

    def __init__(self, device: torch.device, overflow_expected: bool) -> None:
        self._overflow_expected = overflow_expected
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._on_host = torch.zeros(2, dtype=torch.float64, pin_memory=device.type == "cuda")  # skipped steps, w_0
        self._arrived = torch.Event(device) if device.type == "cuda" else None
        self._every = 1
        self._said: set[str] = set()

    @property
    def skipped_steps(self) -> int:
        """Waits for the device."""
        return int(self._skipped)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped.fill_(count)

    @property
    def skipped_in_a_row(self) -> int:
        """Waits for the device."""
        return int(self._in_a_row)

    @skipped_in_a_row.setter
    def skipped_in_a_row(self, count: int) -> None:
        self._in_a_row.fill_(count)

    def record(self, taken: Tensor, weight_0: Tensor, every: int) -> None:
        """After a step, one of `every` that has the sharpness term; scalar tensors on the device, w_0 in float64."""
        self._report()
        self._every = every
        self._skipped += ~taken
        self._in_a_row.add_(1).mul_(~taken)
        self._on_host.copy_(torch.stack([self._skipped, weight_0]), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        else:
            self._report()

    def _report(self) -> None:
        if self._arrived is not None and not self._arrived.query():
            return
        skipped, weight_0 = self._on_host.tolist()
        weight_0 = (self._every - 1 + weight_0) / self._every  # mean over the steps: the others have 1
        if skipped > 0:
            self._say_once(
                "skipped",
                f"a loss or a gradient was inf or NaN ({skipped:.0f} step(s) so far): such a step is skipped, "
                "parameters and buffers stay as they were; opt.skipped_steps counts them. "
                + ("A few are expected: the GradScaler lowers its scale. " if self._overflow_expected else "")
                + "This is said once.",
            )
        if weight_0 < 0:
            self._say_once(
                "negative",
                f"the weight of the unperturbed loss is w_0 = {weight_0:.4g} < 0: the step climbs the loss itself, and "
                "the objective may be unbounded below (for trace it is whenever lam > 1); lower lam. "
                "This is said once.",
            )

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message)
