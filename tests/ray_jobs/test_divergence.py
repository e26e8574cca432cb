"""Losses that stay inf or NaN end a run with a diagnosis, or take it back to before with a lower rate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ray_jobs import attempts, checkpoint, checkpoints, config
from ray_jobs.divergence import Situation, diagnosis, tags, why_ended
from ray_jobs.models import make_model
from tests.ray_jobs import loop

STEPS = 12  # an epoch of 1,294 digits by 100
EPOCHS = 8


def fragile(input_shape: tuple[int, int, int], num_classes: int, limit: float | None = None) -> nn.Module:
    """A network of one's own whose logits are NaN once its weights are longer than `limit`."""

    class Fragile(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            broken = self.weight.norm() > (math.inf if limit is None else limit)
            return super().forward(images.flatten(1)) + torch.where(broken, math.nan, 0.0)

    return Fragile(math.prod(input_shape), num_classes)


def run(limit: float | None, **policy: Any) -> config.RunConfig:
    return config.load(
        "digits-sgd",
        [
            f"model={{name: tests.ray_jobs.test_divergence:fragile, options: {{limit: {limit or 'null'}}}}}",
            f"training.on_divergence={{{', '.join(f'{key}: {value}' for key, value in policy.items())}}}",
            "optimizer.base={name: sgd, lr: 0.05, momentum: 0.0}",
            f"training.epochs={EPOCHS}",
            "training.batch_size=100",
            "scaling.num_workers=1",
            "checkpoint.every_steps=4",
        ],
    )


def trained(described: config.RunConfig, folder: Path) -> tuple[list[dict[str, float]], list[str]]:
    with loop.alone():
        reported, events = loop.trained(described, folder)
    return reported, [event for event in events if "diverged" in str(event)]


def state(folder: Path) -> dict[str, Any]:
    newest = checkpoints.newest(folder)
    assert newest is not None
    return checkpoint.load(newest)


@pytest.fixture(scope="module")
def limit(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What the weights are as long as after half of the run, and a little more: in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("calm")
    reported, events = trained(run(None), folder)
    assert (len(reported), events) == (EPOCHS, [])
    length = float(checkpoint.load(checkpoints.place(folder, EPOCHS * STEPS))["model"]["weight"].norm())
    weight = make_model(run(None).model, (1, 8, 8), 10, seed=0).get_parameter("weight")
    first = float(weight.detach().norm())
    return first + 0.6 * (length - first)


def test_a_run_ends_with_a_diagnosis_and_keeps_its_checkpoints(limit: float, tmp_path: Path) -> None:
    reported, events = trained(run(limit, after=5), tmp_path)
    told = why_ended(tmp_path)
    assert told is not None
    assert "training diverged: since step " in told
    assert "Lower optimizer.base.lr" in told
    assert events == []
    assert 0 < len(reported) < EPOCHS
    saved = state(tmp_path)
    assert float(saved["model"]["weight"].norm()) < math.inf
    assert tags(saved) == {}
    ended = attempts.read(tmp_path)
    assert ended is not None
    since = int(told.split("since step ")[1].split()[0])
    assert since - 1 + 5 <= ended.steps < since - 1 + 10, "seen when at least 5 and less than 10 were skipped"


def test_a_run_without_trouble_is_bit_equal_whatever_the_policy(tmp_path: Path) -> None:
    trained(run(None), tmp_path / "stop")
    trained(run(None, action="roll_back"), tmp_path / "back")
    left, right = state(tmp_path / "stop"), state(tmp_path / "back")
    assert torch.equal(left["model"]["weight"], right["model"]["weight"])


def test_a_run_goes_back_and_on_with_a_lower_rate_tells_each_epoch_once_and_survives_a_restart(
    limit: float, tmp_path: Path
) -> None:
    policy = run(limit, after=15, action="roll_back", lr_factor=0.001)  # longer than an epoch: one ends in doubt
    straight, events = trained(policy, tmp_path / "straight")
    assert [int(metrics["epoch"]) for metrics in straight] == list(range(1, EPOCHS + 1))
    assert all(math.isfinite(metrics["loss/train"]) for metrics in straight)
    assert len(events) == 1, events
    assert "Rolled back to the checkpoint after step " in events[0]
    assert "the rate is 0.001 of what was set (roll-back 1 of 3)" in events[0]
    saved = state(tmp_path / "straight")
    assert tags(saved) == {"phisam.roll_backs": "1", "phisam.lr_factor": "0.001"}
    assert straight[-1]["lr"] == pytest.approx(0.001 * 0.05)
    assert straight[-1]["wasted_steps"] >= 15
    assert saved["optimizer"]["phisam"]["skipped_steps"] == 0, "what was skipped is undone with the rest"

    back_to = int(events[0].split("after step ")[1].split(";")[0])
    for killed in (back_to // STEPS + 1, EPOCHS - 1):  # in the epoch of the roll-back, and later

        def dies(metrics: dict[str, float], killed: int = killed) -> None:
            if metrics["epoch"] == killed:
                raise InterruptedError

        folder = tmp_path / str(killed)
        with mock.patch.object(loop, "report", dies), pytest.raises(InterruptedError):
            trained(policy, folder)
        trained(policy, folder)
        assert torch.equal(state(folder)["model"]["weight"], saved["model"]["weight"])
        assert tags(state(folder)) == tags(saved)


def test_after_so_many_times_it_ends(tmp_path: Path) -> None:
    """A limit that the weights are beyond from the start: there is only the beginning to go back to."""
    _, events = trained(run(0.1, after=5, action="roll_back", at_most=2), tmp_path)
    assert [event.count("Rolled back to the checkpoint after step 0;") for event in events] == [1, 1]
    assert why_ended(tmp_path) is not None


CALM = Situation(20, 101, 3, 0.5, 0.1, 0.05, 1.0, (0.5, 0.6, 0.7), (1.0, 2.0), (0.2, 0.4, 0.4))


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"losses": (math.nan, 0.6, 0.7)}, "Lower optimizer.base.lr"),
        ({"losses": (0.5, math.inf, 0.7)}, "Lower optimizer.rho"),
        ({"weights": (-2.3, 1.65, 1.65), "losses": (math.nan, 1.0, 1.0)}, "Lower optimizer.lam"),
        ({"weights": (math.nan, 0.4, 0.4)}, "Lower optimizer.rho and optimizer.lam"),
        ({}, "look for a square root"),
    ],
)
def test_a_diagnosis_says_what_to_change(change: dict[str, Any], advice: str) -> None:
    told = diagnosis(replace(CALM, **change))
    assert "since step 101 (epoch 3)" in told
    assert "the last finite loss was 0.5" in told
    assert advice in told
