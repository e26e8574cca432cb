"""What Ray's metrics agent shows to Prometheus of a run, beside its own: deploy/observability has the dashboard.

Ray puts `ray_` before each name. Labels: run (its name), run_id (MLflow's), measure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.train.v2.api.callback import UserCallback
from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.context import TrainRunContext

Metrics = dict[str, Any]

LABELS = ("run", "run_id", "measure")
GAUGES = {
    "phisam_epoch": ("epoch", "epochs trained"),
    "phisam_examples_per_second": ("examples_per_second", "examples a second over the last epoch, all workers"),
    "phisam_gradient_evaluations": ("gradient_evaluations", "gradient evaluations since the run began"),
    "phisam_train_loss": ("loss/train", "mean loss of the last epoch"),
    "phisam_validation_accuracy": ("accuracy/validation", "after the last epoch"),
    "phisam_sharpness": ("sharpness", "mean R_rho of the last epoch"),
    "phisam_skipped_steps": ("skipped_steps", "steps without a finite gradient since the run began"),
}


class Meters(UserCallback):
    """A run's gauges, set once an epoch by Ray Train's controller."""

    def __init__(self, run: str, run_id: str, measure: str) -> None:
        self._labels = {"run": run, "run_id": run_id, "measure": measure}

    def after_report(self, run_context: TrainRunContext, metrics: list[Metrics], checkpoint: Checkpoint | None) -> None:
        """metrics[0] is rank 0's."""
        for name, (key, text) in GAUGES.items():
            self._set(name, text, metrics[0][key])
        self._set("phisam_steps_per_second", "optimizer steps over the last epoch", 1 / metrics[0]["seconds_per_step"])

    def after_exception(self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]) -> None:
        """Workers start again."""
        failures = Counter("phisam_worker_failures_total", "times that workers failed and started again", LABELS)
        failures.inc(tags=self._labels)

    def _set(self, name: str, text: str, value: float) -> None:
        # Made here, since the controller is another process; Ray knows a meter by its name, however often it is made.
        Gauge(name, text, LABELS).set(value, tags=self._labels)
