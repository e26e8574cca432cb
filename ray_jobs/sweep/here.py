"""A trial of one CPU worker, trained in the process that Ray Tune gave it: `in_process: true` in a sweep file.

Ray 2.60 starts a trial's workers anew, and each imports torch: seconds, where a small trial trains for one. Here
`worker.train_loop` runs as it is, in a thread of the trial's process, which Tune keeps for the next trial. What
`ray.train` is to the loop, a place for reports, is this module's.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

from ray_jobs.errors import first_line
from ray_jobs.loopback import join

Emit = Callable[[dict[str, Any]], None]
GROUP_SECONDS = 60


def train_here(settings: dict[str, Any], board: Any, emit: Emit, stopped: threading.Event) -> Exception | None:
    """A leg, from its newest checkpoint; what it failed with in the end, or None.

    settings: as `TrainTrial` has them. emit: takes what Ray Train's controller would tell. stopped: ends the leg with
    its next epoch.

    Raises:
        CancelledError: it was.
    """
    from ray_jobs.sweep.trial import HANDED_ON
    from ray_jobs.worker import train_loop

    folder = Path(settings["folder"])
    handed_on = {key: settings[key] for key in HANDED_ON}
    loop_settings = {"config": settings["config"], "folder": str(folder), "board": board, **handed_on}
    for tries_left in range(settings["retries"], -1, -1):
        try:
            with _as_worker(Here(folder, emit, stopped)):
                train_loop(loop_settings)
            return None
        except Exception as error:
            if not tries_left:
                return error
            emit({"kind": "restart", "cause": f"{type(error).__name__}: {first_line(error)[:300]}"})
    raise AssertionError


class Here(LocalTrainFnUtils):
    """What `ray.train.report` is in this process."""

    def __init__(self, folder: Path, emit: Emit, stopped: threading.Event) -> None:
        super().__init__(experiment_name=folder.name)
        self._emit, self._stop = emit, stopped

    def report(  # type: ignore[override]
        self, metrics: dict[str, Any], checkpoint: None = None, **options: Any
    ) -> None:
        """An epoch, whose checkpoint lies in the trial's folder."""
        self._emit({"kind": "epoch", "metrics": metrics})
        if self._stop.is_set():
            raise CancelledError


@contextmanager
def _as_worker(utils: Here) -> Iterator[None]:
    """This process is the one worker of a run; afterwards it is as it was before."""
    logger, threads = logging.getLogger("phisam"), torch.get_num_threads()
    handlers = list(logger.handlers)
    store = Path(tempfile.gettempdir()) / f"phisam-store-{uuid.uuid4().hex}"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    join("gloo", f"file://{store}", 0, 1, GROUP_SECONDS)
    set_train_fn_utils(utils)
    try:
        yield
    finally:
        set_train_fn_utils(None)
        dist.destroy_process_group()
        store.unlink(missing_ok=True)
        torch.set_num_threads(threads)
        logger.handlers = handlers  # the loop's own tells the board of this trial
