"""A split's numbers, on one rank and on two, and what early stopping keeps of a run."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ray_jobs.data import Split
from ray_jobs.early import EARLY, early_stopped
from ray_jobs.evaluation import BINS, calibration_bins, evaluate
from tests.phisam import gloo


def logits_of(probabilities: list[float]) -> torch.Tensor:
    """Two classes, the first of which has these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


def test_calibration_by_hand() -> None:
    """0.9 twice, once right; 0.6 twice, both right: |1.8 - 1| + |1.2 - 2| over 4."""
    bins = calibration_bins(logits_of([0.9, 0.9, 0.6, 0.6]), torch.tensor([0, 1, 0, 0]))
    assert float((bins[0] - bins[1]).abs().sum() / 4) == pytest.approx(0.4)
    assert bins[2].sum() == 4
    right = calibration_bins(logits_of([1.0, 1.0]), torch.tensor([0, 0]))  # the last bin holds 1 too
    assert right[:, -1].tolist() == [2, 2, 2]
    assert float(right[:, : BINS - 1].abs().sum()) == 0


def test_a_network_that_diverged_has_no_confidence() -> None:
    bins = calibration_bins(torch.full((3, 2), math.nan, dtype=torch.float64), torch.tensor([1, 1, 1]))
    assert torch.isfinite(bins).all()


def evaluated(rank: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(7, 1, 2, 2, generator=generator), torch.randint(0, 3, (7,), generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = evaluate(model, split, lambda images: images, nullcontext)
    logits = model(split.images).double()
    assert found.loss == pytest.approx(float(cross_entropy(logits, split.labels)), abs=1e-6)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == split.labels).double().mean()))
    return [found.loss, found.accuracy, found.ece]


def test_a_split_is_shared_over_ranks() -> None:
    (alone,) = gloo.run(1, evaluated)
    for found in gloo.run(2, evaluated):
        assert found == pytest.approx(alone, abs=1e-12)
    assert alone[2] > 0


def test_early_stopping_keeps_the_first_epoch_of_the_lowest_validation_loss() -> None:
    def epoch(number: int, validation: float) -> dict[str, float]:
        return {**dict.fromkeys(EARLY, float(number)), "epoch": number, "loss/validation": validation}

    history = [epoch(1, math.nan), epoch(2, 0.5), epoch(3, 0.4), epoch(4, 0.4), epoch(5, 0.9)]
    assert [early_stopped(history[:n])["early_epoch"] for n in range(1, 6)] == [1, 2, 3, 3, 3]
    assert early_stopped(history)["accuracy/early_test"] == 3
    assert early_stopped(history)["loss/early_validation"] == 0.4
