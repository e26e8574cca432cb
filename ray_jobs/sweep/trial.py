"""A trial inside Ray Tune: a trainable that runs one Ray Train run and hands its events on. Lives in a process of Tune.

Ray's own pattern (a trial function that calls `TorchTrainer.fit` with a TuneReportCallback) starts a controller, a
placement group cleaner, a data set manager and a queue, each a process, for every trial, and what Tune stops by killing
leaks its placement group where Ray has no dashboard. Here the controller runs in a thread of the trial's process: Tune
can use the process for the next trial (`reuse_actors`), and stopping a trial takes down its workers and their placement
group in order.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.train.v2.api.callback import UserCallback

from ray_jobs.errors import ConfigError, RunError, first_line

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.train.v2._internal.execution.controller import TrainController

TICK_SECONDS = 1.0  # a trial says that it is alive so often: only then can Tune stop it
STOP_SECONDS = 30.0
MAX_CAUSE = 300
HANDED_ON = ("start", "until", "own", "fingerprint")  # of a leg's settings, to its workers

Event = dict[str, Any]


class Told:
    """A Ray actor's handle as one trial's workers see it: what they tell carries the trial's number."""

    def __init__(self, board: Any, trial: int) -> None:
        self._board, self._trial = board, trial

    @property
    def tell(self) -> _Method:
        """The place inside an epoch."""
        return _Method(self._board.tell, self._trial)

    @property
    def tell_event(self) -> _Method:
        """A line that a person must see."""
        return _Method(self._board.tell_event, self._trial)


@dataclass(frozen=True)
class _Method:
    method: Any
    trial: int

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.method.remote(self.trial, *arguments, **named)


class TrainTrial(tune.Trainable):
    """config: board, a handle; leg, a JSON text: trial, config (a run description), folder, use_gpu, loopback, retries,
    start (a checkpoint to begin from, or null), until ([metric, level], or null), environment, in_process.

    A result carries one event as JSON under "event": {kind: epoch, metrics} | {kind: restart, cause} |
    {kind: trained} | {kind: failed, cause} | {kind: place, placement_group}, or {kind: tick}.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begins; `step` tells."""
        self._leg = _leg(config)

    def step(self) -> dict[str, str]:
        """The next event, or a tick."""
        return {"event": json.dumps(self._leg.next_event())}

    def cleanup(self) -> None:
        """Takes the workers down, wherever they are. Called by Tune, or by the scheduler of a trial that ends early."""
        self._leg.stop()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in this process."""
        self._leg.stop()
        self._leg = _leg(new_config)
        return True


def _leg(config: dict[str, Any]) -> Leg:
    return Leg(json.loads(config["leg"]), config["board"])


class Leg:
    """One Ray Train run in a thread: of a trial from its newest checkpoint to its end, or to its generation's."""

    def __init__(self, settings: dict[str, Any], board: Any) -> None:
        self._settings, self._board = settings, board
        self._events: queue.Queue[Event] = queue.Queue()
        self._stopped = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        os.environ.update(settings["environment"])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next_event(self) -> Event:
        """Waits for one, but not for long."""
        with suppress(queue.Empty):
            return self._events.get(timeout=TICK_SECONDS)
        return {"kind": "tick"}

    def stop(self) -> None:
        """Ends the run in order; returns when its workers and their placement group are gone."""
        self._stopped.set()
        with suppress(RuntimeError):  # the loop is closed: the run has ended by itself
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(STOP_SECONDS)
        if self._settings["in_process"] and self._thread.is_alive():  # in the middle of a long epoch
            raise RuntimeError("the trial in this process does not end: the next one needs another")

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            with ExitStack() as held:
                self._hold(held)
                error = self._fit()
        except asyncio.CancelledError:
            return
        except BaseException as raised:
            error = raised
        finally:
            self._loop.close()
        self._events.put({"kind": "trained"} if error is None else {"kind": "failed", "cause": _cause(error)})

    def _hold(self, held: ExitStack) -> None:
        """The trial's folder, once the leg of a driver that was killed is gone: Ray takes seconds to end it."""
        from ray_jobs.trainer import alone, made  # here: it imports torch, and Tune waits for this module

        folder = made(Path(self._settings["folder"]))
        deadline = time.monotonic() + STOP_SECONDS
        while not self._stopped.is_set():
            try:
                held.enter_context(alone(folder, "trial"))
                return
            except RunError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        raise asyncio.CancelledError

    def _fit(self) -> BaseException | None:
        from ray_jobs.checkpoints import saved_history
        from ray_jobs.divergence import why_ended

        settings = self._settings
        for metrics in saved_history(Path(settings["folder"])):  # saved by an earlier leg that died before it told
            if metrics["epoch"] > settings["known"]:
                self._events.put({"kind": "epoch", "metrics": metrics})
        if settings["in_process"]:
            from ray_jobs.sweep.here import train_here

            board = Told(self._board, settings["trial"])
            error: BaseException | None = train_here(settings, board, self._events.put, self._stopped)
        else:
            error = self._fit_on_workers()
        diagnosis = why_ended(Path(settings["folder"]))
        return RunError(diagnosis) if error is None and diagnosis is not None else error

    def _fit_on_workers(self) -> BaseException | None:
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
        from ray.train.v2._internal.execution.callback import WorkerGroupCallback
        from ray.train.v2._internal.execution.controller import TrainController

        from ray_jobs.config import from_dict
        from ray_jobs.trainer import Trainer, make_trainer

        class Place(WorkerGroupCallback):
            """Tells where the workers are, for the driver to free if this process dies."""

            def after_worker_group_start(self, worker_group: Any) -> None:
                group = worker_group.get_worker_group_state().placement_group_handle.placement_group
                leg._events.put({"kind": "place", "placement_group": group.id.hex()})

        leg, place = self, Place()

        class HereTrainer(Trainer):
            """A trainer whose controller runs in this thread."""

            def _create_default_callbacks(self) -> list[Any]:
                callbacks = super()._create_default_callbacks()
                cleaner = PlacementGroupCleanerCallback  # a process; the driver frees the place
                return [*(callback for callback in callbacks if not isinstance(callback, cleaner)), place]

            def _initialize_and_run_controller(self, **controller: Any) -> Any:
                return leg._control(TrainController, controller)

        settings = self._settings
        trainer = make_trainer(
            _train_loop,
            from_dict(settings["config"]),
            {"board": Told(self._board, settings["trial"]), **{k: settings[k] for k in HANDED_ON}},
            Path(settings["folder"]),
            [Reports(self._events)],
            use_gpu=settings["use_gpu"],
            loopback=settings["loopback"],
            max_failures=settings["retries"],
            trainer=HereTrainer,
        )
        try:
            trainer.fit()
        except Exception as error:
            return error
        return None

    def _control(self, controller_class: type[TrainController], arguments: dict[str, Any]) -> Any:
        async def control() -> None:
            self._task = asyncio.current_task()
            if self._stopped.is_set():
                raise asyncio.CancelledError
            await controller.run()  # type: ignore[no-untyped-call]

        controller = controller_class(**arguments)
        with _shut_down(controller):
            self._loop.run_until_complete(control())
        return controller.get_result()


@contextmanager
def _shut_down(controller: TrainController) -> Iterator[None]:
    """Workers end with the controller, also where it is interrupted."""
    try:
        yield
    except BaseException:
        group = controller._worker_group
        if group is not None:
            with suppress(Exception):  # what is left of it ends with this process
                group.abort()  # type: ignore[no-untyped-call]
        raise


class Reports(UserCallback):
    """What Ray Train's controller sees, as events."""

    def __init__(self, events: queue.Queue[Event]) -> None:
        self._events = events

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Train sends its callbacks to the workers, where this one has nothing to do

    def after_report(self, run_context: TrainRunContext, metrics: list[Event], checkpoint: Checkpoint | None) -> None:
        """An epoch; metrics[0] is rank 0's; its checkpoint lies in storage already."""
        self._events.put({"kind": "epoch", "metrics": metrics[0]})

    def after_exception(self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]) -> None:
        """Workers died."""
        causes = "; ".join(
            f"worker {rank}: {first_line(error)[:MAX_CAUSE]}" for rank, error in worker_exceptions.items()
        )
        self._events.put({"kind": "restart", "cause": causes})


def _train_loop(settings: dict[str, Any]) -> None:
    from ray_jobs.worker import train_loop  # imported by the workers alone: the trial's process has no use for it

    train_loop(settings)


def _cause(error: BaseException) -> str:
    """What went wrong, in a line."""
    causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
    cause = next(cause for cause in causes if cause is not None)
    kind = "" if isinstance(cause, ConfigError) else f"{type(cause).__name__}: "
    return f"{kind}{first_line(cause)[:MAX_CAUSE]}"
