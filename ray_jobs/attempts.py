"""What faults cost a run: how often it was started again, and how many of its steps were taken twice.

One short line in a file of the run's folder, rewritten in place after each step: it outlasts every process.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

FILE = "attempts"


class Attempts(NamedTuple):
    """restarts: of the training loop; wasted_steps: that were taken again; steps: the furthest that the run has come,
    as far as the line tells (a machine that loses power may lose its last seconds).
    """

    restarts: int = 0
    wasted_steps: int = 0
    steps: int = 0

    def begun_at(self, steps: int) -> Attempts:
        """After a new start from a checkpoint of so many steps."""
        return Attempts(self.restarts + 1, self.wasted_steps + max(0, self.steps - steps), steps)


def read(folder: Path) -> Attempts | None:
    """None: the run never started, or the line is not whole."""
    try:
        numbers = [int(word) for word in (folder / FILE).read_text(encoding="ascii").split()]
        return Attempts(*numbers)
    except (OSError, ValueError, TypeError):
        return None


class Ledger:
    """Keeps the line, in the process that writes checkpoints."""

    def __init__(self, folder: Path, steps: int) -> None:
        """A loop starts at a checkpoint of so many steps."""
        before = read(folder)
        self.attempts = Attempts(steps=steps) if before is None else before.begun_at(steps)
        self._file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        self.at(steps)

    def back_to(self, steps: int) -> None:
        """The run was rolled back, without a new start."""
        again = self.attempts.steps - steps
        self.attempts = self.attempts._replace(wasted_steps=self.attempts.wasted_steps + again)
        self.at(steps)

    def at(self, steps: int) -> None:
        """After each step; microseconds."""
        self.attempts = self.attempts._replace(steps=steps)
        with contextlib.suppress(OSError):  # a full disk shall not end a training
            os.pwrite(self._file, "{:20} {:20} {:20}\n".format(*self.attempts).encode(), 0)
