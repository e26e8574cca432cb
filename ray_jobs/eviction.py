"""SIGTERM to a worker: it is not ended at once, but asked to save and go.

Imported by Ray Train's controller, so without torch.
"""

from __future__ import annotations

import signal
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback


class Notice:
    """Whether this process was sent SIGTERM while its training loop heeded it."""

    def __init__(self) -> None:
        self.given = False
        self.heeded = False
        self._before: signal.Handlers | None = None

    def listen(self) -> None:
        """Call in the main thread, which alone may."""
        self._before = signal.signal(signal.SIGTERM, self._take)  # type: ignore[assignment]

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.heeded and not self.given:
            self.given = True
        elif callable(self._before):  # Ray's: the process ends
            self._before(number, frame)


NOTICE = Notice()


class HeedSigterm(WorkerCallback):
    """Listens in each of Ray Train's workers, whose loop runs in a thread of its own."""

    def after_init_train_context(self) -> None:
        NOTICE.listen()
