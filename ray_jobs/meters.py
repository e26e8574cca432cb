"""What Ray's metrics agent shows to Prometheus of a run, beside its own: deploy/observability has the dashboard.

Ray puts `ray_` before each name. Labels: run (its name), run_id (MLflow's), measure.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

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


class Meters:
    """A run's gauges, set once an epoch by Ray Train's controller."""

    def __init__(self, run: str, run_id: str, measure: str) -> None:
        labels = {"run": run, "run_id": run_id, "measure": measure}
        self._gauges = {name: Gauge(name, text, LABELS) for name, (_, text) in GAUGES.items()}
        self._steps = Gauge("phisam_steps_per_second", "optimizer steps a second over the last epoch", LABELS)
        self._failures = Counter("phisam_worker_failures_total", "times that workers failed and started again", LABELS)
        for meter in (*self._gauges.values(), self._steps, self._failures):
            meter.set_default_tags(labels)

    def epoch(self, metrics: Metrics) -> None:
        """The metrics of an epoch, as workers report them."""
        for name, (key, _) in GAUGES.items():
            self._gauges[name].set(metrics[key])
        self._steps.set(1 / metrics["seconds_per_step"])

    def failure(self) -> None:
        """Workers failed."""
        self._failures.inc()
