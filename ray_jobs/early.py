"""What early stopping by validation loss would have kept of a run, as metrics of every epoch.

A method whose best length nobody knows beforehand is read there: by `metric: loss/early_validation` in a sweep, and
`phisam compare --metric accuracy/early_test`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

EARLY = {
    "epoch": "early_epoch",
    "loss/train": "loss/early_train",
    "loss/validation": "loss/early_validation",
    "loss/test": "loss/early_test",
    "accuracy/validation": "accuracy/early_validation",
    "accuracy/test": "accuracy/early_test",
    "ece/test": "ece/early_test",
}
"""A metric -> what it was where early stopping would have stopped."""


def early_stopped(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of the first epoch of the lowest validation loss so far, which early stopping would keep; see EARLY.

    The epoch is chosen on validation data alone.
    """
    best = min(history, key=lambda epoch: _number(epoch["loss/validation"]))
    return {early: best[name] for name, early in EARLY.items()}


def _number(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
