"""MLflow is told from a thread: what trains never waits for it, and a server that is away is asked until it answers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException

from ray_jobs.errors import RunError, first_line
from ray_jobs.tracking.server import asked
from ray_jobs.tracking.tracker import Metrics, Tracker

T = TypeVar("T")

RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's words for what it will not take however often it is asked; all others may pass."""


@dataclass(frozen=True)
class _Job:
    """run_id: whose run it is about, if it exists."""

    run_id: str | None
    task: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class Writer:
    """Tells MLflow of runs, in order. What cannot be told because MLflow is away is told when it is back.

    A run that somebody deleted is said once, and nothing more is told of it; neither is what MLflow refuses.

    Args:
        say: takes a line for the person at the terminal.
    """

    def __init__(self, uri: str, say: Callable[[str], None]) -> None:
        self._uri, self._say = uri, say
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._deleted: set[str] = set()
        self._said_away = False
        self._given_up: str | None = None  # what MLflow was last heard of
        self._lost: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def epoch(self, run_id: str, metrics: Metrics) -> None:
        """One epoch of a run. Returns at once."""
        self.ask(run_id, lambda: Tracker(self._uri, run_id).log_epoch(metrics))

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Adds tags. Returns at once."""
        self.ask(run_id, lambda: Tracker(self._uri, run_id).set_tags(dict(tags)))

    def reopen(self, run_id: str) -> None:
        """RUNNING again. Returns at once."""
        self.ask(run_id, lambda: Tracker.resume(self._uri, run_id))

    def end(self, run_id: str, status: str, tags: Mapping[str, str], history: Sequence[Metrics]) -> None:
        """A run's end; epochs of its history that MLflow lacks are filled in. Returns at once."""

        def told() -> None:
            tracker = Tracker(self._uri, run_id)
            tracker.reconcile(history)
            tracker.set_tags(dict(tags))
            tracker.finish(status)

        self.ask(run_id, told)

    def ask(self, run_id: str | None, task: Callable[[], T]) -> Future[T]:
        """Anything else, of a run if it exists already. Returns at once; what the task raised in the end is in it."""
        job = _Job(run_id, task)
        self._queue.put(job)
        return job.done

    def close(self, patience: float = PATIENCE_SECONDS) -> None:
        """Waits until all is told; where MLflow is away, for so many seconds.

        Raises:
            RunError: something could not be told.
        """
        self._deadline = time.monotonic() + patience
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        if self._lost:
            more = f" (and {len(self._lost) - 1} more that MLflow was not told)" if len(self._lost) > 1 else ""
            raise RunError(f"{self._lost[0]}{more}")

    # the thread

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job.done.set_result(self._told(job))
            except Exception as error:  # a thread that ends would end the record of all runs
                job.done.set_exception(error)

    def _told(self, job: _Job) -> Any:
        """What the task returns once MLflow has taken it; None for a run that was deleted."""
        while job.run_id not in self._deleted:
            if self._given_up is not None:
                self._lost.append(self._given_up)  # trying each of a long queue once more would take minutes
                raise RunError(self._given_up)
            try:
                return self._once(job)
            except RunError as error:
                if is_refusal(error):
                    self._say(f"{error}; all else goes on")
                    raise
                self._wait(error)
            except Exception as error:
                self._lost.append(f"MLflow could not be told ({type(error).__name__}: {first_line(error)})")
                self._say(self._lost[-1])
                raise
        return None

    def _once(self, job: _Job) -> Any:
        try:
            result = job.task()
        except RunError as error:
            if job.run_id is None or not is_refusal(error) or not is_deleted(self._uri, job.run_id):
                raise
            self._deleted.add(job.run_id)
            self._say(f"run {job.run_id} was deleted in MLflow: nothing more is told of it")
            result = None
        self._said_away = False
        return result

    def _wait(self, error: RunError) -> None:
        """Until MLflow is asked again; not beyond the deadline of one who waits for the end."""
        if not self._said_away:
            self._said_away = True
            self._say(f"{error}; it is asked again until it answers")
        if not self._closing.is_set():
            self._closing.wait(RETRY_SECONDS)
        elif time.monotonic() < self._deadline:
            time.sleep(min(1.0, RETRY_SECONDS))
        else:
            self._given_up = str(error)


def is_refusal(error: RunError) -> bool:
    """Whether MLflow answered, and would answer the same again."""
    return isinstance(error.__cause__, MlflowException) and error.__cause__.error_code in REFUSALS


def is_deleted(uri: str, run_id: str) -> bool:
    """Whether a run is not, or no more, in MLflow.

    Raises:
        RunError: MLflow does not answer.
    """
    try:
        with asked(uri, f"give run {run_id}"):
            stage: str = MlflowClient(uri).get_run(run_id).info.lifecycle_stage
    except RunError as error:
        if is_refusal(error):
            return True
        raise
    return stage == LifecycleStage.DELETED
