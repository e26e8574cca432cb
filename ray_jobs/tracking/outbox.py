"""What a run has to tell MLflow: to a journal in the run's folder first, from there in batches to the server.

    event    fields                       MLflow is told
    epoch    metrics                      with others, in one batch
    tags     tags
    status   status, time_ms              RUNNING, FINISHED, FAILED or KILLED; before FINISHED what follows from the end
    told     upto                         nothing: it has taken all events before this one

Telling again is harmless: an epoch that MLflow has is not sent, and tags and a status are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ray_jobs.errors import RunError
from ray_jobs.journal import Event, Journal
from ray_jobs.tracking.server import is_deleted, is_refusal
from ray_jobs.tracking.tracker import Metrics, Tracker

FOLDER = "tracking"
MAX_METRICS = 1000  # of MLflow, in one request


def journals(folder: Path) -> list[Path]:
    """In the folder of a run, its own; in that of a sweep, those of its trials."""
    return sorted((folder / FOLDER).glob("*.jsonl"))


class Outbox:
    """The journal of one run. Appending returns when the event is on disk; `deliver` is for one thread alone.

    Args:
        folder: of the run, or of the trial's sweep; held by this process.
        say: takes a line for the person at the terminal.
        finished: tells MLflow what follows from a run's end, such as its models; it may be called again.

    Raises:
        RunError: the journal is damaged, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        run_id: str,
        say: Callable[[str], None],
        finished: Callable[[Tracker], None] | None,
    ) -> None:
        path = folder / FOLDER / f"{run_id}.jsonl"
        path.parent.mkdir(exist_ok=True)
        self._uri, self._run_id, self._say, self._finished = uri, run_id, say, finished
        self._journal = Journal(path)
        events = self._journal.events
        self._upto = max((event["upto"] for event in events if event["event"] == "told"), default=0)
        self._epochs = {event["metrics"]["epoch"] for event in events if event["event"] == "epoch"}
        self._logged: set[int] | None = None  # epochs that MLflow has, once it was asked

    @property
    def untold(self) -> list[Event]:
        """What MLflow has not taken yet."""
        return [event for event in self._journal.events[self._upto :] if event["event"] != "told"]

    @property
    def status(self) -> str | None:
        """The newest; None: the run has none yet."""
        return next((e["status"] for e in reversed(self._journal.events) if e["event"] == "status"), None)

    @property
    def newest_ms(self) -> int:
        """When the newest dated event was, since 1970."""
        times = (e.get("time_ms") or e.get("metrics", {}).get("timestamp_ms") for e in reversed(self._journal.events))
        return int(next((told for told in times if told), time.time() * 1000))

    def add_epoch(self, metrics: Metrics) -> None:
        """An epoch counts as it was told first: after a restart it may come again, with other times in it."""
        if metrics["epoch"] not in self._epochs:
            self._journal.append({"event": "epoch", "metrics": metrics})
            self._epochs.add(metrics["epoch"])

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Tags."""
        self._journal.append({"event": "tags", "tags": dict(tags)})

    def add_status(self, status: str, time_ms: int | None = None) -> None:
        """RUNNING, or how the run ended, and when; None: now."""
        time_ms = round(time.time() * 1000) if time_ms is None else time_ms
        self._journal.append({"event": "status", "status": status, "time_ms": time_ms})

    def deliver(self) -> None:
        """Tells MLflow all that it was not told yet, in order.

        Raises:
            RunError: it does not answer, or does not know the run.
        """
        upto = len(self._journal.events)
        untold = [event for event in self._journal.events[self._upto : upto] if event["event"] != "told"]
        if not untold:
            return
        tracker = Tracker(self._uri, self._run_id)
        if tags := {k: v for event in untold if event["event"] == "tags" for k, v in event["tags"].items()}:
            tracker.set_tags(tags)
        self._send(tracker, [event["metrics"] for event in untold if event["event"] == "epoch"])
        if statuses := [event for event in untold if event["event"] == "status"]:
            last = statuses[-1]
            if last["status"] == "FINISHED" and self._finished is not None:
                self._finished(tracker)
            tracker.finish(last["status"], last["time_ms"])
        self._upto = upto
        self._journal.append({"event": "told", "upto": upto})

    def _send(self, tracker: Tracker, epochs: list[Metrics]) -> None:
        if epochs and self._logged is None:
            self._logged = tracker.logged_epochs()
        for batch in _batches(metrics for metrics in epochs if metrics["epoch"] not in (self._logged or ())):
            self._send_batch(tracker, batch)

    def _send_batch(self, tracker: Tracker, batch: list[Metrics]) -> None:
        """What MLflow refuses of it is said, and goes no further."""
        try:
            tracker.log_epochs(batch)
        except RunError as error:
            if not is_refusal(error) or is_deleted(self._uri, self._run_id):
                raise
            if len(batch) > 1:
                for metrics in batch:
                    self._send_batch(tracker, [metrics])
                return
            self._say(f"{error}; all else goes on")
        assert self._logged is not None
        self._logged.update(int(metrics["epoch"]) for metrics in batch)


def _batches(epochs: Iterable[Metrics]) -> Iterator[list[Metrics]]:
    """Whole epochs, as many as MLflow takes at once."""
    batch: list[Metrics] = []
    for metrics in epochs:
        if sum(map(len, batch)) + len(metrics) > MAX_METRICS:
            yield batch
            batch = []
        batch.append(metrics)
    if batch:
        yield batch
