"""A model on a split after an epoch: cross-entropy, accuracy, calibration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_jobs.checkpoint import Metrics
from ray_jobs.data import Normalize, Split, evaluation_batches

EVALUATION_BATCH = 512
BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """loss: mean cross-entropy. accuracy: 0 to 1. ece: expected calibration error, 0 to 1."""

    loss: float
    accuracy: float
    ece: float

    def metrics(self, split: str) -> Metrics:
        """Under the names that MLflow has."""
        return {f"accuracy/{split}": self.accuracy, f"loss/{split}": self.loss, f"ece/{split}": self.ece}


def evaluate(
    model: nn.Module, split: Split, normalize: Normalize, autocast: Callable[[], AbstractContextManager[Any]]
) -> Evaluation:
    """A split, its examples shared over all ranks. Collective."""
    model.eval()
    device = split.labels.device
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
    with torch.no_grad():
        for images, labels in evaluation_batches(
            split, EVALUATION_BATCH, dist.get_rank(), dist.get_world_size(), normalize
        ):
            with autocast():
                logits = model(images)
            loss += cross_entropy(logits.double(), labels, reduction="sum")
            bins += calibration_bins(logits.double(), labels)
    sums = torch.cat([loss, bins.flatten()])
    dist.all_reduce(sums)
    sums = sums.cpu() / len(split)
    bins = sums[1:].view(3, BINS)
    return Evaluation(float(sums[0]), float(bins[1].sum()), float((bins[0] - bins[1]).abs().sum()))


def calibration_bins(logits: Tensor, labels: Tensor) -> Tensor:
    """(3, BINS): in bins of equal width of the largest probability, the sum of it, the right answers, the examples.

    The expected calibration error (Guo et al. 2017) of N examples is the sum over bins of |first - second| / N.
    """
    confidence, answer = torch.softmax(logits, 1).max(1)
    finite = confidence.nan_to_num(0.0)  # a network that diverged: its loss says so
    bin = (finite * BINS).long().clamp(0, BINS - 1)
    columns = torch.stack([finite, (answer == labels).double(), torch.ones_like(finite)])
    return torch.zeros(3, BINS, dtype=torch.float64, device=logits.device).index_add_(1, bin, columns)
