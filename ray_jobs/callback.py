"""An epoch's way to MLflow: from Ray Train's controller to the board, from there to the driver's writer.

Imports neither torch nor mlflow: the controller imports it while workers are starting.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Any

from ray.train.v2.api.callback import UserCallback

from ray_jobs.errors import RunError, first_line

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


class EpochWriter:
    """Sends epochs to MLflow from a thread of the driver. What it could not send is filled in from the checkpoint.

    Args:
        logged: epochs that MLflow has from before a restart; they are not sent again.
    """

    def __init__(self, uri: str, run_id: str, logged: set[int]) -> None:
        self._uri, self._run_id = uri, run_id
        self._logged = set(logged)
        self._queue: queue.SimpleQueue[Metrics] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def put(self, metrics: Metrics) -> None:
        """An epoch. Returns at once."""
        if metrics["epoch"] not in self._logged:
            self._logged.add(metrics["epoch"])
            self._queue.put(metrics)

    def _send(self) -> None:
        from ray_jobs.tracking import Tracker  # mlflow takes seconds to import: not on the controller's time

        tracker = Tracker(self._uri, self._run_id)
        while True:
            try:
                tracker.log_epoch(self._queue.get())
            except RunError as error:
                logging.getLogger("phisam").warning("%s; it is sent again when the run ends", error)
