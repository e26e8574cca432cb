"""Where a job's driver leaves word of its place, and a client that reaches the dashboard alone can read it.

It is a file of Ray's log folder on the driver's node, written anew every two seconds: the dashboard gives out files of
that folder, to those who have the token. Ray's metadata of a job would be the other place, but Ray writes its status
there too, and two writers would undo each other's words.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_jobs.redaction import redacted

SECONDS = 2.0
VERSION = 1
_METRICS = ("loss/train", "accuracy/validation", "accuracy/test")

Word = dict[str, Any]


def file_name(job_id: str) -> str:
    """In Ray's log folder."""
    return f"phisam-{job_id}.json"


class Heart:
    """Writes the newest word from a thread, as soon as Ray is there."""

    def __init__(self, job_id: str, kind: str) -> None:
        self._job_id = job_id
        self._word: Word = {"version": VERSION, "job": job_id, "kind": kind, "pid": os.getpid(), "moved": time.time()}
        self._path: Path | None = None
        self._ask: Callable[[], Word] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def told(self, key: str, default: Any) -> Any:
        """What it says of a key now."""
        return self._word.get(key, default)

    def tell(self, word: Word) -> None:
        """What is new of the job. Returns at once."""
        if any(self._word.get(key) != value for key, value in word.items()):
            self._word = {**self._word, **word, "moved": time.time()}

    def watch(self, ask: Callable[[], Word]) -> None:
        """Asks for what is new before every beat."""
        self._ask = ask

    def close(self) -> None:
        """The last beat."""
        self._stop.set()
        self._thread.join(timeout=5)
        self._write()

    def _beat(self) -> None:
        while not self._stop.wait(SECONDS if self._path else 0.2):
            self._write()

    def _write(self) -> None:
        self._path = self._path or self._found()
        if self._path is None:
            return
        if self._ask is not None:
            with contextlib.suppress(RuntimeError):  # trials were begun while they were counted; the next beat has them
                self.tell(self._ask())
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk shall not end a training
            new.write_text(json.dumps({**self._word, "time": time.time()}), encoding="utf-8")
            os.replace(new, self._path)

    def _found(self) -> Path | None:
        ray = sys.modules.get("ray")  # the command imports it when it needs it
        if ray is None or not getattr(ray, "is_initialized", bool)():
            return None
        context = ray.get_runtime_context()
        logs = Path(context.get_temp_dir(), context.get_session_name(), "logs")
        return logs / file_name(self._job_id) if logs.is_dir() else None


_heart: Heart | None = None


@contextlib.contextmanager
def kept(job_id: str, kind: str) -> Iterator[None]:
    """A heartbeat for what runs inside."""
    global _heart
    _heart = Heart(job_id, kind)
    try:
        yield
    finally:
        _heart.close()
        _heart = None


def tell_run(run_id: str, name: str, epochs: int, place: Mapping[str, Any], events: Sequence[Any]) -> None:
    """A run's place: `epoch` counts whole ones, `at` is inside the next. Does nothing outside of a job."""
    if _heart is None:
        return
    word: Word = {"run_id": run_id, "name": name, "epochs": epochs}
    if _heart.told("run_id", run_id) != run_id:  # the next of several: nothing is left of the one before
        word |= {"epoch": 0, "at": None, "metrics": {}, "said": ""}
    if place and place["epoch"] >= word.get("epoch", _heart.told("epoch", 0)):
        word["at"] = {"epoch": place["epoch"] + 1, "step": place["step"], "steps": place["steps"]}
    for event in events:
        if isinstance(event, str):
            word["said"] = redacted(event)  # here, where the secrets of the cluster are known
        else:
            word |= {"epoch": event["epoch"], "at": None}
            word["metrics"] = {key: event[key] for key in _METRICS if math.isfinite(event.get(key, math.nan))}
    _heart.tell(word)


def watch_sweep(run_id: str, name: str, states: Callable[[], Sequence[str]], trials: int) -> None:
    """A sweep's place at every beat, the last too: states of the trials that have begun, and how many there will be.

    Does nothing outside of a job.
    """

    def word() -> Word:
        begun = states()
        counts = {state: begun.count(state) for state in sorted(set(begun))}
        return {"run_id": run_id, "name": name, "trials": {**counts, "of": trials}}

    if _heart is not None:
        _heart.watch(word)


def tell_findings(findings: Sequence[Mapping[str, str]]) -> None:
    """What `phisam doctor` found; nothing outside of a job."""
    if _heart is not None:
        _heart.tell({"findings": list(findings)})
