"""Checkpoints of a training loop: where it begins, when it saves, and what that costs. Every method is collective.

Rank 0 copies the state to the host and a thread writes it while training goes on; the next checkpoint, and the end,
wait for the thread. An epoch that has a checkpoint is told once that lies on the disk, and is not trained again. A disk
that is full costs a checkpoint and not the run: the one before stays, and the next is tried when it is due.
"""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

import phisam
from phisam import diagnostics
from ray_jobs import attempts, checkpoint, checkpoints, divergence
from ray_jobs.config import CheckpointConfig
from ray_jobs.divergence import Guard
from ray_jobs.errors import RunError
from ray_jobs.eviction import NOTICE
from ray_jobs.meeting import Agreed, Meeting
from ray_jobs.stopwatch import Stopwatch

SUMS = 4 + diagnostics.SUMS
logger = logging.getLogger("phisam")
clock = time.monotonic  # of `every_minutes`


@dataclass
class Course:
    """How far a run has come: with the state of model and optimizer, all that its next step depends on.

    sums: SUMS float64 on the device, of this rank, of the steps so far of the epoch that is under way.
    """

    sums: Tensor
    history: list[checkpoint.Metrics] = field(default_factory=list)
    best: dict[str, Any] | None = None
    step: int = 0

    @property
    def averaged(self) -> Tensor:
        """(2, 2), a view: what `worker.Averages` adds up."""
        return self.sums[: -diagnostics.SUMS].view(2, 2)

    @property
    def diagnosed(self) -> Tensor:
        """(diagnostics.SUMS,), a view: what `Remarks` adds up."""
        return self.sums[-diagnostics.SUMS :]

    @property
    def epoch(self) -> int:
        """Whole epochs so far."""
        return len(self.history)

    def end_epoch(self, metrics: checkpoint.Metrics, model: nn.Module) -> None:
        """To the next one; the model is kept if it is the first of the highest validation accuracy."""
        self.history.append(metrics)
        self.step = 0
        self.sums.zero_()
        accuracy, loss = metrics["accuracy/validation"], metrics["loss/validation"]
        if self.best is None or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            self.best = {"epoch": self.epoch, "accuracy": accuracy, "loss": loss, "model": _on_host(model.state_dict())}


@dataclass(frozen=True)
class State:
    """What training changes."""

    model: nn.Module
    optimizer: phisam.PhiSAM
    scaler: torch.amp.GradScaler | None
    guard: Guard

    def saved(self) -> dict[str, Any]:
        """A copy on the host."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": scaler}
        return {name: _on_host(part) for name, part in parts.items()} | {"divergence": self.guard.saved()}

    def load(self, saved: dict[str, Any], where: str) -> None:
        """Goes back to it.

        Raises:
            RunError: it is of another model.
        """
        checkpoint.load_model(self.model, saved["model"], where)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self.guard.load(saved.get("divergence"))


class Asked(Protocol):
    """Where rank 0 learns that somebody wants the run to save and end."""

    stop_asked: bool


class Saver:
    """See the module; the loop calls `begin`, then `after_step` and `after_epoch`."""

    def __init__(
        self, config: CheckpointConfig, folder: Path, state: State, steps_per_epoch: int, asked: Asked
    ) -> None:
        self._config, self._folder, self._steps_per_epoch = config, folder, steps_per_epoch
        self._state, self._asked = state, asked
        self._device = next(state.model.parameters()).device
        self.watch = Stopwatch(self._device)
        self._writer = _Writer(folder, config.keep, steps_per_epoch) if dist.get_rank() == 0 else None
        self._ledger: attempts.Ledger | None = None
        self._untold: list[checkpoint.Metrics] = []
        self._told_steps = 0  # of the epochs that were told, or lie in the checkpoint that the loop began from
        self._saved = clock()
        self._preemption = _Preemption()

    def begin(self, start: str | None) -> Course:
        """The newest checkpoint that is whole, else `start`, else a fresh run; a damaged one is set aside, and said."""
        chosen: list[str | None] = [None]
        if dist.get_rank() == 0:
            chosen[0] = self._choose() or start
        dist.broadcast_object_list(chosen)
        course = Course(torch.zeros(SUMS, dtype=torch.float64, device=self._device))
        if chosen[0] is not None:
            self._load(Path(chosen[0]), course)
        self._meeting = Meeting(self._device, self._steps(course))
        if dist.get_rank() == 0:
            self._ledger = attempts.Ledger(self._folder, self._steps(course))
            (self._folder / divergence.FILE).unlink(missing_ok=True)
        NOTICE.heeded = True
        if chosen[0] is None and self._state.guard.rolls_back:
            self._save(course)  # else there is nothing to roll back to in the first epoch
        return course

    def after_divergence(self, course: Course, skipped: int) -> bool:
        """So many steps in a row were skipped: rolls back if that is the policy; whether the loop is to end here."""
        guard, steps = self._state.guard, self._steps(course)
        if self._ledger is not None:
            self._ledger.at(steps)
        told = divergence.diagnosis(guard.situation(skipped, steps, self._steps_per_epoch))
        back = guard.rolls_back and guard.roll_backs < guard.config.at_most
        chosen: list[str | None] = [None]
        if self._writer is not None:
            self._writer.wait()
            chosen[0] = self._before(steps - skipped) if back else None
        dist.broadcast_object_list(chosen)
        if chosen[0] is None:
            if dist.get_rank() == 0:
                (self._folder / divergence.FILE).write_text(told, encoding="utf-8")
            self._finish()
            return True
        roll_backs, lr_factor = guard.roll_backs, guard.lr_factor
        self._load(Path(chosen[0]), course)
        guard.roll_backs, guard.lr_factor = roll_backs, lr_factor  # the checkpoint may be of before an earlier one
        guard.roll_back()
        self._untold.clear()
        self._meeting = Meeting(self._device, self._steps(course))
        if self._ledger is not None:
            self._ledger.back_to(self._steps(course))
            logger.warning(
                "%s. Rolled back to the checkpoint after step %d; from there the rate is %g of what was set "
                "(roll-back %d of %d)",
                told,
                self._steps(course),
                guard.lr_factor,
                guard.roll_backs,
                guard.config.at_most,
            )
        return False

    def _before(self, steps: int) -> str | None:
        """The newest whole checkpoint before a step whose outcome was bad, of what is not told yet; no newer one stays.

        The one after that step has the weights that came out of it: it serves if there is no other.
        """
        told = self._told_steps
        candidates = [path for path in checkpoints.present(self._folder) if told <= checkpoints.steps_of(path) <= steps]
        whole = [path for path in candidates if checkpoints.is_whole(path)]
        before = [path for path in whole if checkpoints.steps_of(path) < steps] or whole
        if not before:
            return None
        for path in checkpoints.present(self._folder):
            if checkpoints.steps_of(path) > checkpoints.steps_of(before[-1]):
                shutil.rmtree(path)
        return str(before[-1])

    def after_step(self, course: Course) -> bool:
        """Saves if it is time; whether the loop is to end here."""
        steps = self._steps(course)
        if self._ledger is not None:
            self._ledger.at(steps)
        if course.step == self._steps_per_epoch:
            return False  # the epoch's end follows
        agreed = self._agreed(steps)
        every = self._config.every_steps
        if agreed.save or agreed.stop or (every is not None and steps % every == 0):
            self._save(course)
        return self._ends(agreed)

    def after_epoch(self, course: Course, last: bool) -> bool:
        """Saves if it is time, and tells the epoch's metrics; whether the loop is to end here.

        Raises:
            RunError: the last checkpoint cannot be written.
        """
        steps, every = self._steps(course), self._config.every_steps
        agreed = self._agreed(steps)
        due = course.epoch % self._config.every_epochs == 0 or (every is not None and steps % every == 0)
        if saved := due or last or agreed.save or agreed.stop:
            self._save(course)
        self._untold.append(course.history[-1])
        if not saved and len(self._untold) == 1:  # it waits for no checkpoint, nor behind one that does
            self._tell()
        if last:
            self._finish()
            if self._writer is not None and self._writer.trouble is not None:
                raise RunError(f"the last checkpoint cannot be written: {self._writer.trouble}")
        return self._ends(agreed) or last

    def costs(self) -> checkpoint.Metrics:
        """For an epoch's metrics; rank 0 knows them."""
        so_far = attempts.Attempts() if self._ledger is None else self._ledger.attempts
        return {
            "checkpoint_seconds": self.watch.waited,
            "restarts": so_far.restarts,
            "wasted_steps": so_far.wasted_steps,
        }

    def _steps(self, course: Course) -> int:
        return course.epoch * self._steps_per_epoch + course.step

    def _choose(self) -> str | None:
        checkpoints.sweep_up(self._folder)
        found, damaged = checkpoints.look(self._folder)
        for path, cause in damaged.items():
            aside = checkpoints.set_aside(path)
            since = "the beginning" if found is None else found.name
            logger.warning("%s; it is kept as %s, and the run goes on from %s", cause, aside.name, since)
        return None if found is None else str(found)

    def _load(self, path: Path, course: Course) -> None:
        state = checkpoint.load(path)
        course.history[:] = checkpoint.load_history(path)  # the loop holds the list
        self._state.load(state, str(path))
        course.best, course.step = state["best"], state["step"]
        self._told_steps = state.get("told", course.epoch * self._steps_per_epoch)
        self.watch.seconds, self.watch.waited = state["seconds"], state["waited"]
        sums = state["sums"]  # a rank's own, for the same bits; as many ranks as another day share their mean
        course.sums.copy_(sums[dist.get_rank()] if len(sums) == dist.get_world_size() else sums.mean(0))

    def _agreed(self, steps: int) -> Agreed:
        if not self._meeting.due(steps):
            return Agreed()
        preempted = self._preemption.due()
        minutes, writer = self._config.every_minutes, self._writer
        late = writer is not None and minutes is not None and clock() - self._saved >= 60 * minutes
        agreed = self._meeting.hold(
            steps,
            save=late or preempted,
            stop=writer is not None and self._asked.stop_asked,
            evicted=NOTICE.given,
            written=writer is not None and writer.idle,
        )
        if agreed.written:
            self._tell()
        return agreed

    def _ends(self, agreed: Agreed) -> bool:
        if not agreed.stop:
            return False
        self._finish()
        if agreed.evicted == dist.get_rank():
            raise RunError("its process was told to end (SIGTERM), and has saved what it did")
        return True

    def _save(self, course: Course) -> None:
        in_doubt = self._state.guard.in_doubt
        told = self._told_steps if in_doubt else course.epoch * self._steps_per_epoch
        with self.watch.waiting():
            sums = [torch.empty_like(course.sums) for _ in range(dist.get_world_size())]
            dist.all_gather(sums, course.sums)
            if self._writer is not None:
                self._writer.wait()
                state = {
                    "epoch": course.epoch,
                    "step": course.step,
                    **self._state.saved(),
                    "sums": torch.stack(sums).cpu(),
                    "seconds": self.watch.seconds,
                    "waited": self.watch.waited,
                    "told": told,
                    "best": course.best,  # copied to the host when it was found
                }
                self._writer.write(self._steps(course), state, list(course.history), prune=not in_doubt)
        self._tell()
        self._saved = clock()

    def _finish(self) -> None:
        """All that was to be saved lies on the disk, for every rank."""
        with self.watch.waiting():
            if self._writer is not None:
                self._writer.wait()
            dist.barrier()
        self._tell(last=True)
        NOTICE.heeded = False  # from now on SIGTERM ends this process

    def _tell(self, last: bool = False) -> None:
        if not last and self._untold and self._state.guard.in_doubt:
            return
        for metrics in self._untold:
            ray.train.report(metrics)
            self._told_steps = int(metrics["epoch"]) * self._steps_per_epoch
        self._untold.clear()


class _Writer:
    """Writes one checkpoint after the other in a thread."""

    def __init__(self, folder: Path, keep: int, steps_per_epoch: int) -> None:
        self._folder, self._keep, self._steps_per_epoch = folder, keep, steps_per_epoch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.trouble: str | None = None
        """Why the newest checkpoint could not be written."""

    @property
    def idle(self) -> bool:
        """Nothing is being written."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the thread raised, but for a disk's errors: those are said."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def write(self, steps: int, state: dict[str, Any], history: list[checkpoint.Metrics], prune: bool = True) -> None:
        """Begins to; `wait` comes first. prune: whether older ones may go, once it is written."""
        self._pending = self._thread.submit(self._write, steps, state, history, prune)

    def _write(self, steps: int, state: dict[str, Any], history: list[checkpoint.Metrics], prune: bool) -> None:
        try:
            checkpoint.save(checkpoints.place(self._folder, steps), state, history)
        except OSError as error:
            if self.trouble is None:
                logger.warning(
                    "the checkpoint after step %d could not be written (%s): the one before it stays, and the next is "
                    "tried when it is due. This is said once until one is written again",
                    steps,
                    error,
                )
            self.trouble = str(error)
            return
        self.trouble = None
        if prune:
            checkpoints.prune(self._folder, self._keep, self._steps_per_epoch)


class _Preemption:
    """A node that will be taken away, as Ray tells: save at once, and again just before it goes."""

    MARGIN_SECONDS = 10.0

    def __init__(self) -> None:
        self._known: list[str] = []
        self._closing = False

    def due(self) -> bool:
        """Whether to save now. Collective, and the same on every rank but for their clocks."""
        info = ray.train.get_preemption_info()
        if info is None:
            return False
        if info.preempted_node_ids != self._known:
            self._known, self._closing = info.preempted_node_ids, False
            if dist.get_rank() == 0:
                logger.warning("Ray will take %d of the run's nodes away: the run is saved", len(self._known))
            return True
        if self._closing or info.deadline_ms is None:
            return False
        self._closing = info.deadline_ms / 1000 - time.time() < self.MARGIN_SECONDS
        return self._closing


def _on_host(value: Any) -> Any:
    """A copy on the CPU that training on does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(part) for part in value)
    return value
