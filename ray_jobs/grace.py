"""SIGTERM to the driver of a run: the workers save and end; if they need too long, it ends without."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_jobs.errors import Terminated


@contextmanager
def saved_on_sigterm(ask: Callable[[], None], seconds: float) -> Iterator[None]:
    """Around what waits for the workers; in the main thread.

    Args:
        ask: has the workers save and end; it is called in a signal's handler and returns at once.
        seconds: the grace.

    Raises:
        Terminated: SIGTERM came; its words say whether the workers were done in time. A second SIGTERM ends the wait.
    """
    asked = False

    def heed(*_: object) -> None:
        nonlocal asked
        if asked:
            raise Terminated("told to end (SIGTERM) twice, and not waited for a last checkpoint")
        asked = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        ask()

    def give_up(*_: object) -> None:
        raise Terminated(f"told to end (SIGTERM), and not saved within the grace of {seconds:g} s")

    before = [signal.signal(signal.SIGTERM, heed), signal.signal(signal.SIGALRM, give_up)]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGTERM, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    if asked:
        raise Terminated("told to end (SIGTERM), and saved")
