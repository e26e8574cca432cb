"""What a run says of its optimizer's settings: metrics of every epoch, and each warning once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import phisam
from phisam.diagnostics import SUMS
from ray_jobs import checkpoint, checkpoints
from ray_jobs.config import load
from ray_jobs.remarks import Remarks
from ray_jobs.sweep.cost import evaluations
from tests.ray_jobs import loop

SMALL = [
    "training.epochs=4",
    "training.batch_size=256",
    "model={name: mlp, width: 16, depth: 1}",
    "scaling.use_gpu=false",
]


def history(folder: Path) -> list[dict[str, float]]:
    newest = checkpoints.newest(folder)
    assert newest is not None
    return checkpoint.load_history(newest)


def record(*losses: float, rho: float = 0.1) -> phisam.StepRecord:
    return phisam.StepRecord(torch.tensor(losses, dtype=torch.float64), torch.ones(len(losses)), rho, phisam.trace())


def test_a_drowned_term_is_a_metric_of_every_epoch_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    remarks = Remarks(float32=True)
    with loop.alone(), caplog.at_level(logging.WARNING, "phisam"):
        for _ in range(2):
            sums = torch.zeros(SUMS, dtype=torch.float64)
            for sign in (1, -1) * 10:  # R averages to 0
                remarks.add(sums, record(1.0, 1.0 + sign))
            told = remarks.after(sums)
            assert told["diagnostics/signal"] == pytest.approx(0, abs=1e-9)
            assert told["diagnostics/w0_negative"] == 0
    assert [line.message[:28] for line in caplog.records] == ["the sharpness term is drowne"]
    assert "raise n_samples" in caplog.text


def test_a_sound_term_is_not_remarked_and_the_base_optimizer_has_none(caplog: pytest.LogCaptureFixture) -> None:
    remarks, sums = Remarks(float32=True), torch.zeros(SUMS, dtype=torch.float64)
    with loop.alone(), caplog.at_level(logging.WARNING, "phisam"):
        for extra in (0.0, 0.1, 0.0, 0.1):
            remarks.add(sums, record(1.0, 2.0 + extra))
        assert remarks.after(sums)["diagnostics/signal"] > 10
        assert Remarks(float32=True).after(torch.zeros(SUMS, dtype=torch.float64)) == {}
    assert not caplog.records


def test_losses_too_coarse_for_rho_are_told_in_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["optimizer.rho=3.0e-7", "optimizer.measure=trace", "optimizer.noise=gaussian", "optimizer.lam=0.1"]
    with loop.alone(), caplog.at_level(logging.WARNING, "phisam"):
        loop.trained(load("digits-frob", [*SMALL, *overrides]), tmp_path)
    assert sum("rounding of the losses" in line.message for line in caplog.records) == 1
    assert all(epoch["diagnostics/resolution"] > 0.01 for epoch in history(tmp_path))


def test_draws_of_the_first_half_are_counted_as_taken(tmp_path: Path) -> None:
    config = load("digits-frob", [*SMALL, "optimizer.n_early=2", "optimizer.n_samples=5"])
    with loop.alone():
        loop.trained(config, tmp_path)
    told = [epoch["gradient_evaluations"] for epoch in history(tmp_path)]
    assert told == [evaluations(config, epochs) for epochs in (1, 2, 3, 4)]
    steps = evaluations(config, 1) / 3
    assert told == [3 * steps, 6 * steps, 12 * steps, 18 * steps]
