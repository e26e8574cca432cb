"""What an epoch's losses tell of the optimizer's settings: a metric each, and a warning once a run.

The numbers come from the n + 1 losses that each step has anyway (`phisam.diagnostics`) and are added up on the device.
"""

from __future__ import annotations

import logging
import math

import torch.distributed as dist
from torch import Tensor

import phisam
from phisam.diagnostics import findings, numbers
from ray_jobs.checkpoint import Metrics

logger = logging.getLogger("phisam")

TOLD_BY_PHISAM = "w0_negative"
"""It warns of that in the very step."""


class Remarks:
    """Of a run, whose losses are computed in float32 or not.

    sums: (SUMS,) float64 on the device, of an epoch's steps so far.
    """

    def __init__(self, float32: bool) -> None:
        self._float32 = float32
        self._said: set[str] = set()

    def add(self, sums: Tensor, record: phisam.StepRecord) -> None:
        """After each step; nothing here waits for the device."""
        sums += numbers(record, self._float32)

    def after(self, sums: Tensor) -> Metrics:
        """diagnostics/..., of an epoch; empty for a measure without perturbed points. Collective, waits for the device.

        With scope = "shard" ranks have losses of their own: the mean over ranks is taken.
        """
        dist.all_reduce(sums)
        found = findings(sums / dist.get_world_size())
        for finding in found:
            if finding.text is None or finding.name in self._said or finding.name == TOLD_BY_PHISAM:
                continue
            self._said.add(finding.name)
            if dist.get_rank() == 0:
                logger.warning("%s. This is said once.", finding.text)
        return {f"diagnostics/{finding.name}": finding.value for finding in found if math.isfinite(finding.value)}
