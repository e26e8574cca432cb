"""The numbers that a step came down to, for logs and for the user."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from phisam.measures import Measure, delta_of


@dataclass(frozen=True)
class StepRecord:
    """The n + 1 numbers that a step came down to: detached float64 tensors on the model's device.

    losses (n + 1,): L_0, L_1, ..., L_n, of the part of the batch that the measure saw.  weights (n + 1,): dF/dL, they
    sum to 1.  delta (n,): (L_i - L_0) / rho^2.  sharpness (): R_rho of Definition 8, of these samples.  The last two
    are computed when they are read.  With every = k, the steps without the sharpness term have n = 0.
    """

    losses: Tensor
    weights: Tensor
    rho: float
    measure: Measure

    @cached_property
    def delta(self) -> Tensor:
        """(L_i - L_0) / rho^2, (n,)."""
        return delta_of(self.losses, self.rho)

    @cached_property
    def sharpness(self) -> Tensor:
        """R_rho."""
        return self.measure.value(self.losses, self.rho)
