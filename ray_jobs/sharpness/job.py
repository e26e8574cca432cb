"""One measurement as a value: what a worker, or this process alone, needs to do it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from phisam.sharpness import Unmeasurable
from ray_jobs.config import OptimizerConfig
from ray_jobs.errors import RunError
from ray_jobs.sharpness.config import SharpnessConfig
from ray_jobs.sharpness.measuring import Batches, Measured, Tell, measured
from ray_jobs.worker import make_measure


@dataclass(frozen=True)
class Job:
    """A model and examples on the CPU, what to measure of them, and with whose (phi, psi, mu).

    budget: seconds; None: as many probes as `wanted` has.
    """

    model: nn.Module
    batches: Batches
    wanted: SharpnessConfig
    optimizer: OptimizerConfig
    seed: int
    budget: float | None

    def measured(self, device: torch.device, group: dist.ProcessGroup | None, tell: Tell) -> Measured:
        """Measures on a device. Collective over the group.

        Raises:
            RunError: the model cannot be measured.
        """
        measure = make_measure(self.optimizer)
        batches = [(images.to(device), labels.to(device)) for images, labels in self.batches]
        model = self.model.to(device)
        try:
            return measured(model, batches, self.wanted, measure, self.seed, group=group, budget=self.budget, tell=tell)
        except Unmeasurable as error:
            raise RunError(f"the model cannot be measured: {error}") from error
