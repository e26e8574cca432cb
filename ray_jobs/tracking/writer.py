"""MLflow is told from a thread: what trains never waits for it, and a server that is away is asked until it answers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ray_jobs.errors import RunError, first_line
from ray_jobs.journal import Event
from ray_jobs.tracking.outbox import Outbox
from ray_jobs.tracking.server import is_deleted, is_refusal
from ray_jobs.tracking.tracker import Metrics, Tracker

T = TypeVar("T")

RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 15.0
INTERRUPTED_PATIENCE = 5.0  # of Ctrl-C


@dataclass(frozen=True)
class _Job:
    """run_id: whose run it is about, if it exists."""

    run_id: str | None
    task: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class Writer:
    """Tells MLflow of runs, in order. What cannot be told because MLflow is away is told when it is back.

    A run that somebody deleted is said once, and nothing more is told of it; neither is what MLflow refuses.

    What is told of a run is in its journal first (`Outbox`): what cannot be told before this process ends is told by
    the next that opens it.

    Args:
        folder: of the run, or of the sweep whose trials are told of; held by this process.
        say: takes a line for the person at the terminal.
        finished: as `Outbox` has it.
    """

    def __init__(
        self,
        uri: str,
        folder: Path,
        say: Callable[[str], None],
        finished: Callable[[Tracker], None] | None = None,
    ) -> None:
        self._uri, self._folder, self._say, self._finished = uri, folder, say, finished
        self._outboxes: dict[str, Outbox] = {}
        self._opening = threading.Lock()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._deleted: set[str] = set()
        self._said_away = self._said_full = False
        self._given_up: str | None = None  # what MLflow was last heard of
        self._lost: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def epoch(self, run_id: str, metrics: Metrics) -> None:
        """One epoch of a run, unless it was told before. Returns when it is in the journal.

        Where the disk is full, that is said once, and `end` tells the epoch from the run's history.
        """
        outbox = self._outbox(run_id)
        try:
            outbox.add_epoch(metrics)
        except RunError as error:
            if not self._said_full:
                self._say(f"{error}; epochs that are missing there are told at the end")
            self._said_full = True
            return
        self._said_full = False
        self.deliver(run_id)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Adds tags. Returns when they are in the journal."""
        self._outbox(run_id).add_tags(tags)
        self.deliver(run_id)

    def reopen(self, run_id: str) -> None:
        """RUNNING, from the beginning or again. Returns when that is in the journal."""
        self._outbox(run_id).add_status("RUNNING")
        self.deliver(run_id)

    def end(
        self,
        run_id: str,
        status: str,
        tags: Mapping[str, str],
        history: Sequence[Metrics],
        time_ms: int | None = None,
    ) -> None:
        """A run's end, with the epochs of its history that were not told. Returns when that is in the journal."""
        outbox = self._outbox(run_id)
        for metrics in history:
            outbox.add_epoch(metrics)
        if tags:
            outbox.add_tags(tags)
        outbox.add_status(status, time_ms)
        self.deliver(run_id)

    def deliver(self, run_id: str) -> None:
        """What is in a run's journal and MLflow was not told. Returns at once."""
        self.ask(run_id, self._outbox(run_id).deliver)

    def status(self, run_id: str) -> str | None:
        """How a run stands, by its journal."""
        return self._outbox(run_id).status

    def newest_ms(self, run_id: str) -> int:
        """When something of a run was journalled last."""
        return self._outbox(run_id).newest_ms

    def untold(self, run_id: str) -> list[Event]:
        """What of a run's journal MLflow was not told."""
        return self._outbox(run_id).untold

    @property
    def is_away(self) -> bool:
        """`close` waited in vain: MLflow does not answer, and nothing else is wrong."""
        return self._given_up is not None and set(self._lost) == {self._given_up}

    def _outbox(self, run_id: str) -> Outbox:
        with self._opening:
            if run_id not in self._outboxes:
                self._outboxes[run_id] = Outbox(self._folder, self._uri, run_id, self._say, self._finished)
            return self._outboxes[run_id]

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
