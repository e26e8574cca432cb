"""A job's output as it comes, however often the stream breaks: nothing twice, nothing lost; the job never notices."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import requests

from ray_jobs.errors import RunError
from ray_jobs.jobs.client import JobsClient, Json, UnreachableError
from ray_jobs.jobs.status import OVER, state

ASK_SECONDS = 2.0  # between two looks at whether the job is over
RETRY_SECONDS = 1.0
PATIENCE = 300.0  # that a head may be away
END_SECONDS = 10.0  # that the node of a job that is over may be away


def follow(client: JobsClient, job_id: str, write: Callable[[bytes], object], say: Callable[[str], object]) -> str:
    """Writes all that a job prints, until it is over; how it ended.

    A stream begins with the file's first byte; what was written already is left out. At the end the whole file is read
    once more, so that nothing can be missing.

    Args:
        say: takes a line about the stream itself.

    Raises:
        RunError: the cluster has been away for minutes.
    """
    seen, failures, answered = 0, 0, time.monotonic()
    stream: _Stream | None = None
    while True:
        try:
            job = client.job(job_id)
            if state(job) in OVER:  # asked before the output is read: none comes later
                write(_whole(client, job, say)[seen:])
                return state(job)
            answered = time.monotonic()
            if stream is None and job["driver_node_id"]:
                stream = _Stream(client, job, seen)
            if stream is None:
                time.sleep(ASK_SECONDS)
            while stream is not None and time.monotonic() < answered + ASK_SECONDS:
                chunk = stream.next(ASK_SECONDS)
                if chunk is not None:
                    write(chunk)
                    seen, failures = seen + len(chunk), 0
        except (_BrokenError, UnreachableError) as error:
            failures += 1
            if stream is not None:
                stream.close()
                stream = None
            if failures == 2:  # one is mended at once, or comes of a driver that has not printed yet
                say(f"the output cannot be read ({error}); trying again, the job is not touched")
            if time.monotonic() - answered > PATIENCE:
                raise RunError(f"{error}; the job goes on unread: phisam logs {job_id} -f reads on") from None
            time.sleep(RETRY_SECONDS)


def unread(job: Json) -> str:
    """What there is to say where a job's output is None."""
    return f"the output of {job['submission_id']} cannot be read to its end: its node is gone, or it printed nothing"


def _whole(client: JobsClient, job: Json, say: Callable[[str], object]) -> bytes:
    """All that a job that is over has printed; where it cannot be read for some seconds, says so."""
    deadline = time.monotonic() + END_SECONDS
    while (output := client.output(job)) is None and job["driver_node_id"]:
        if time.monotonic() > deadline:
            say(unread(job))
            break
        time.sleep(RETRY_SECONDS)
    return output or b""


class _BrokenError(Exception):
    """The stream ended before the job did."""


class _Stream:
    """One connection, read in a thread: the job's state is asked for while nothing comes."""

    def __init__(self, client: JobsClient, job: Json, skip: int) -> None:
        self._chunks: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._read, args=(client, job, skip), daemon=True).start()

    def next(self, seconds: float) -> bytes | None:
        """What came next; None: nothing in that time."""
        try:
            chunk = self._chunks.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(chunk, Exception):
            raise _BrokenError(str(chunk)) from None
        return chunk

    def close(self) -> None:
        """What still comes is of no use. The thread ends with the next byte, or with the process."""
        self._closed = True

    def _read(self, client: JobsClient, job: Json, skip: int) -> None:
        try:
            for chunk in client.follow(job):
                if self._closed:
                    return
                if len(chunk) > skip:
                    self._chunks.put(chunk[skip:])
                skip = max(0, skip - len(chunk))
            self._chunks.put(RunError("it ended"))
        except (requests.RequestException, RunError) as error:
            self._chunks.put(error if isinstance(error, RunError) else RunError(type(error).__name__))
