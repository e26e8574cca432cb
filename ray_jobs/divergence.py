"""A training whose losses or gradients are inf or NaN in many steps in a row: ended with a diagnosis, or rolled back.

PhiSAM skips such a step and counts it on the device. Every `after` steps the host reads the count, so that between
`after` and 2 `after` - 1 skipped steps in a row are seen for what they are, at the same step on every rank and in every
repetition of the run. To roll back is to go on from the newest checkpoint before them with a rate `lr_factor` times as
high; an epoch that is told again, as after every restart, counts as it was told first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import phisam
from ray_jobs.config import DivergenceConfig

FILE = "diverged.txt"
"""In a run's folder: why it was ended."""

FAILURE_TAG, ROLL_BACKS_TAG, FACTOR_TAG = "phisam.failure", "phisam.roll_backs", "phisam.lr_factor"


@dataclass(frozen=True)
class Situation:
    """What is known when a training has diverged. step and epoch count from 1; losses: of the last step, L_0 first."""

    skipped: int
    step: int
    epoch: int
    last_loss: float
    lr: float
    rho: float
    lam: float
    losses: tuple[float, ...]
    delta: tuple[float, ...]
    weights: tuple[float, ...]


class Guard:
    """Looks at a run's steps. lr_factor and roll_backs are part of a checkpoint's state."""

    def __init__(self, config: DivergenceConfig, optimizer: phisam.PhiSAM, device: torch.device) -> None:
        self.config, self._optimizer = config, optimizer
        self.lr_factor, self.roll_backs = 1.0, 0
        self._last_loss = torch.full((), math.nan, dtype=torch.float64, device=device)

    @property
    def rolls_back(self) -> bool:
        """Whether it is a policy that needs a checkpoint from before the first step."""
        return self.config.action == "roll_back"

    @property
    def in_doubt(self) -> bool:
        """Whether what was done last may be rolled back. Waits for the device."""
        return self.rolls_back and self._optimizer.skipped_in_a_row > 0

    def after_step(self, loss: Tensor) -> None:
        """Nothing here waits for the device."""
        self._last_loss = torch.where(torch.isfinite(loss), loss.double(), self._last_loss)

    def diverged(self, steps: int) -> int:
        """After so many steps of the run: how many were skipped in a row, 0 if they are too few to act on."""
        if steps % self.config.after:
            return 0
        skipped = self._optimizer.skipped_in_a_row
        return skipped if skipped >= self.config.after else 0

    def situation(self, skipped: int, steps: int, steps_per_epoch: int) -> Situation:
        """Of now."""
        record, begun = self._optimizer.last_step, steps - skipped
        return Situation(
            skipped,
            begun + 1,
            begun // steps_per_epoch + 1,
            float(self._last_loss),
            self._optimizer.param_groups[0]["lr"],
            self._optimizer.rho,
            self._optimizer.lam,
            tuple(record.losses.tolist()),
            tuple(record.delta.tolist()),
            tuple(record.weights.tolist()),
        )

    def roll_back(self) -> None:
        """From here on the rate is lower."""
        self.roll_backs += 1
        self.lr_factor *= self.config.lr_factor

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"lr_factor": self.lr_factor, "roll_backs": self.roll_backs}

    def load(self, saved: dict[str, Any] | None) -> None:
        """From a checkpoint; None: of a version that had no guard."""
        if saved is not None:
            self.lr_factor, self.roll_backs = saved["lr_factor"], saved["roll_backs"]


def diagnosis(now: Situation) -> str:
    """What happened, and what to change, most likely cause first."""
    last = f"the last finite loss was {now.last_loss:.4g}" if math.isfinite(now.last_loss) else "no loss was finite yet"
    told = (
        f"training diverged: since step {now.step} (epoch {now.epoch}) a loss or a gradient was inf or NaN in "
        f"{now.skipped} steps in a row; {last}. There lr = {now.lr:.4g}, rho = {now.rho:.4g}, lam = {now.lam:.4g}; the "
        f"last step had losses {_numbers(now.losses)}"
    )
    if now.delta:
        told += f", delta {_numbers(now.delta)}, w_0 = {now.weights[0]:.4g}"
    return f"{told}. {_advice(now)}"


def _advice(now: Situation) -> str:
    if now.delta and now.weights[0] < 0:
        return (
            "w_0 < 0: the step climbs the loss itself, and the objective may be unbounded below. Lower optimizer.lam "
            "(for trace to 1 at most)"
        )
    if not math.isfinite(now.losses[0]):
        return (
            "The loss at the weights themselves is not finite: they have grown too large. Lower optimizer.base.lr, or "
            "let it rise over schedule.warmup_epochs, or set optimizer.max_grad_norm"
        )
    if not all(map(math.isfinite, now.losses)):
        return "The loss is finite at the weights, but not at rho from them. Lower optimizer.rho"
    if not all(map(math.isfinite, now.weights)):
        return "All losses are finite, but not what the measure makes of them. Lower optimizer.rho and optimizer.lam"
    return (
        "All losses are finite, but not the gradient: look for a square root or a logarithm of 0 in the network, or "
        "choose training.precision: float32"
    )


def _numbers(values: tuple[float, ...], most: int = 4) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values[:most])}{', ...' if len(values) > most else ''}]"


def why_ended(folder: Path) -> str | None:
    """The diagnosis with which a run was ended; None: it was not."""
    path = folder / FILE
    return path.read_text(encoding="utf-8") if path.exists() else None


def tags(state: dict[str, Any]) -> dict[str, str]:
    """Of a run, by the state of its newest checkpoint."""
    saved = state.get("divergence") or {}
    if not saved.get("roll_backs"):
        return {}
    return {ROLL_BACKS_TAG: str(saved["roll_backs"]), FACTOR_TAG: f"{saved['lr_factor']:g}"}
