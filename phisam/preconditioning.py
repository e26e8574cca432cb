"""The diagonal of `Noise.preconditioned`: what the base optimizer scales its own steps by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from phisam.measures import Measure
from phisam.noise import Preconditioning
from phisam.wrapping import Wrapping

SecondMoments = Callable[[], Sequence[Tensor | None]]

SLOTS = ("exp_avg_sq", "square_avg", "sum")
"""Where torch's optimizers keep a running mean, or sum, of g^2: Adam and its kin, RMSprop and Adadelta, Adagrad."""


def check_preconditioner(measure: Measure, base: Optimizer) -> None:
    """Raises ValueError where a noise is preconditioned by a base optimizer that has no second moment for it."""
    if not any(noise.preconditioning is not None for noise in measure.noises):
        return
    if isinstance(base, ZeroRedundancyOptimizer):
        raise ValueError(
            "preconditioned noise needs the second moment of every parameter on every rank, and "
            "ZeroRedundancyOptimizer keeps each on one: use the optimizer itself, or fully_shard"
        )
    if isinstance(base, torch.optim.SGD):
        raise _no_second_moment(base)


def second_moments(base: Optimizer, parameters: Sequence[nn.Parameter], wrapping: Wrapping) -> list[Tensor | None]:
    """m2 of what this rank holds, one a parameter; None where the base optimizer has none yet.

    Raises:
        ValueError: it has taken steps and keeps none.
    """
    found: list[Tensor | None] = []
    for p in parameters:
        state = base.state.get(p, {})
        slot = next((slot for slot in SLOTS if slot in state), None)
        if state and slot is None:
            raise _no_second_moment(base)
        found.append(None if slot is None else wrapping.held([state[slot]])[0])
    return found


def diagonal(
    m2: Sequence[Tensor | None],
    held: Sequence[Tensor],
    preconditioning: Preconditioning,
    norm: Callable[[Tensor], Tensor],
    d: int,
) -> Tensor | None:
    """D = c (sqrt(m2) / rms + damping)^-power, flat, of what this rank holds; None, for 1, without any second moment.

    norm: over all parameters of a flat vector of which this rank holds its pieces. Collective where they are spread.
    """
    if all(part is None for part in m2):  # the same on every rank: they take the same steps
        return None
    parts = [torch.zeros_like(x) if part is None else part.to(x.dtype) for part, x in zip(m2, held, strict=True)]
    root = torch.cat([part.reshape(-1) for part in parts]).sqrt_()
    tiny = torch.finfo(root.dtype).tiny ** 0.5
    rms = norm(root) / math.sqrt(d)
    D = root.div_(rms.clamp_min(tiny)).add_(preconditioning.damping).pow_(-preconditioning.power)
    return D.div_(norm(D) / math.sqrt(d))


def _no_second_moment(base: Optimizer) -> ValueError:
    return ValueError(
        f"preconditioned noise is scaled by the base optimizer's second moment, and {type(base).__name__} keeps none "
        f"({', '.join(SLOTS)}): use Adam, AdamW, RMSprop or Adagrad, or adaptive() in its place"
    )
