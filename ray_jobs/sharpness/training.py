"""Sharpness in an epoch of a run, on all its workers, beside accuracy. Nothing that training reads is touched.

The Hessian is of a copy of the model in evaluation mode, its random vectors have generators of their own, and the time
is told apart. The same examples and vectors come in every epoch: a curve shows how H changed, not how draws did.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist
from torch import nn

import phisam
from phisam import sharpness
from ray_jobs.config import RunConfig
from ray_jobs.data import Dataset
from ray_jobs.sharpness.measuring import measured, measuring_batches

logger = logging.getLogger("phisam")


class EpochMeasures:
    """What a run description's `sharpness` asks for; nothing if it has none."""

    def __init__(self, config: RunConfig, dataset: Dataset, measure: phisam.Measure, dtype: torch.dtype) -> None:
        """measure: the run's own; dtype: of the images as the run's model sees them."""
        self._wanted, self._seed, self._last = config.sharpness, config.training.seed, config.training.epochs
        self._measure = measure
        if self._wanted is not None:
            self._batches = measuring_batches(dataset, self._wanted.examples, self._seed, dtype)

    def after(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """hessian/..., each with its standard error, and sharpness_seconds, if they are due after epoch 1, 2, ...

        Collective. A model that cannot be measured any more is said on rank 0, and the run goes on without.
        """
        wanted = self._wanted
        if wanted is None or (epoch % wanted.every and epoch != self._last):
            return {}
        started = time.perf_counter()
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            self._warn(f"epoch {epoch}: sharpness is not measured, since weights are not finite")
            return {}
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        try:
            found = measured(model, self._batches, wanted, self._measure, self._seed, group=group)
        except sharpness.Unmeasurable as error:
            self._warn(f"epoch {epoch}: sharpness is not measured: {error}")
            return {}
        for remark in found.remarks:
            self._warn(f"epoch {epoch}: {remark}")
        return {**found.metrics(), "sharpness_seconds": time.perf_counter() - started}

    def _warn(self, text: str) -> None:
        if dist.get_rank() == 0:
            logger.warning(text)
