"""An epoch's way to MLflow: from Ray Train's controller to the board, from there to the driver, who tells it.

Imports neither torch nor mlflow: the controller imports it while workers are starting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.train.v2.api.callback import UserCallback

from ray_jobs.errors import first_line

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.context import TrainRunContext

Metrics = dict[str, Any]


class EpochCallback(UserCallback):
    """Tells the progress board of each epoch, and does not wait for it. The driver reads there, and tells MLflow."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_report(self, run_context: TrainRunContext, metrics: list[Metrics], checkpoint: Checkpoint | None) -> None:
        """metrics[0] is rank 0's; the checkpoint lies in storage already."""
        self._board.tell_event.remote(metrics[0])

    def after_exception(self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train starts the workers again, from the newest checkpoint, unless they failed too often."""
        causes = "; ".join(f"worker {rank}: {first_line(error)[:200]}" for rank, error in worker_exceptions.items())
        self._board.tell_event.remote(f"workers failed and start again from the newest checkpoint ({causes})")
