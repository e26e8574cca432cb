"""The driver of a sweep: trials by Ray Tune, decisions by the ledger, everything told to the journal first.

A driver that is killed at any moment is followed by `phisam sweep --resume ID`: the journal is read again, epochs that
only a checkpoint knows are added to it, and the sweep goes on with the same trials, rungs and winner.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray_jobs import checkpoint, checkpoints
from ray_jobs.checkpoints import saved_history, usable
from ray_jobs.cluster import only_loopback
from ray_jobs.config import RunConfig, dump_yaml
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.journal import Event, Journal
from ray_jobs.progress import Metrics
from ray_jobs.sweep import executor
from ray_jobs.sweep.config import SweepConfig
from ray_jobs.sweep.ledger import Ledger, Trial
from ray_jobs.sweep.prepare import Checks
from ray_jobs.sweep.progress import SweepView
from ray_jobs.sweep.search import Search
from ray_jobs.sweep.space import RUN
from ray_jobs.tracking.sweep import Child, SweepTracker
from ray_jobs.tracking.writer import Writer
from ray_jobs.trainer import made
from ray_jobs.user_code import CODE_TAG, OwnCode

TRIAL_DESCRIPTION = "run.yaml"
ENDS = {"finished": "FINISHED", "cut": "KILLED", "failed": "FAILED"}
ANSWER_SECONDS = 2.0  # so long Tune's loop waits for MLflow at once; trials that run go on meanwhile


@dataclass
class Driver:
    """One driver's hold on a sweep; `executor.Conductor` for Tune.

    Attributes:
        writer: whom MLflow is told by.
        say: takes a line for the person at the terminal. view: what shows turns of trials, once they are news.
        max_concurrent: legs at once, for this driver; the number that the search was made with is the journal's.
        epochs: trial -> how many it has.
    """

    sweep: SweepConfig
    folder: Path
    runs: Path
    journal: Journal
    ledger: Ledger
    search: Search
    tracker: SweepTracker
    writer: Writer
    checks: Checks
    say: Callable[[str], None]
    max_concurrent: int
    board: Any = None
    view: SweepView | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    _live: set[int] = field(default_factory=set)
    _places: dict[int, str] = field(default_factory=dict)
    _configs: dict[int, tuple[dict[str, Any], RunConfig]] = field(default_factory=dict)
    _asked: tuple[int, Future[str]] | None = None  # the run of the trial that is about to start

    # what the journal says

    def replay(self) -> None:
        """The state that an earlier driver left: its journal, then what only checkpoints and MLflow know."""
        for event in self.journal.events:
            self.ledger.apply(event)
        trials = list(self.ledger.trials.values())
        ours = {trial.run_id for trial in trials}
        children = {run.info.run_id: run for run in self.tracker.children()}
        for run_id, run in children.items():
            if run_id not in ours and not run.data.metrics:  # made, and the driver was killed before it noted that
                self.writer.ask(run_id, partial(self.tracker.discard, run_id))
        for trial in trials:
            self.epochs[trial.index] = self._planned(trial)
            if not trial.over:
                self._reopen(trial)
                continue
            found = children.get(trial.run_id)
            if found is None or found.info.status != ENDS[trial.status] or "phisam.restarts" not in found.data.tags:
                self._end(trial)
        self._decide()

    def _reopen(self, trial: Trial) -> None:
        """A trial that goes on. Where its newest checkpoint cannot be read, it goes on from an older one, or anew."""
        folder = self.leg_folder(trial)
        self.writer.reopen(trial.run_id)
        found, damaged = checkpoints.look(folder)
        if damaged:
            history = [] if found is None else checkpoint.load_history(found)
        else:
            history = saved_history(folder)
        if damaged and trial.status == "running":
            start, cause = trial.start if found is None else str(found), next(iter(damaged.values()))
            self._record({"event": "rewound", "trial": trial.index, "start": start, "cause": cause})
            for path in damaged:
                checkpoints.set_aside(path)
            where = "its beginning" if start is None else f"epoch {len(history)}" if history else start
            self.say(f"trial {trial.index} goes on from {where}, as its newest checkpoint is of no use ({cause})")
        for metrics in history:
            self._epoch(trial, metrics)
        if history and history[-1]["epoch"] == self.epochs[trial.index] and trial.status == "running":
            self._record({"event": "trained", "trial": trial.index})

    def _record(self, event: Event) -> None:
        self.journal.append(event)
        self.ledger.apply(event)

    # what Tune asks and tells

    @property
    def over(self) -> bool:
        """Every trial is."""
        return self.ledger.over

    def next_leg(self) -> dict[str, Any] | None:
        """A trial that is to go on, else a new one; None while all places are taken, or others must be over first."""
        if len(self._live) >= self.max_concurrent:
            return None
        for trial in self.ledger.trials.values():
            if trial.status == "running" and trial.index not in self._live:
                return self._leg(trial)
        following = self.ledger.next_start()
        if following is None:
            return None
        return self._start(*following)

    def told(self, index: int, event: dict[str, Any]) -> bool:
        """An event of a leg; whether the leg goes on."""
        trial = self.ledger.trials[index]
        match event["kind"]:
            case "place":
                self._places[index] = event["placement_group"]
            case "epoch" if trial.status == "running":
                self._epoch(trial, event["metrics"])
                self._decide()
            case "restart" if trial.restarts < self.sweep.retries:
                self._restart(trial, event["cause"])
            case "trained" if trial.status == "running":
                self._record({"event": "trained", "trial": index})
                self._decide()
            case "failed" if trial.status == "running":
                self._fail(trial, event["cause"])
                self._decide()
        goes_on = trial.status == "running" and event["kind"] not in ("trained", "failed")
        if not goes_on:
            self._live.discard(index)
            self._places.pop(index, None)
        return goes_on

    def died(self, index: int, cause: str) -> None:
        """A leg's own process is gone; the trial goes on in another, unless that was its last try."""
        self._live.discard(index)
        if index in self._places:
            executor.free(self._places.pop(index))
        trial = self.ledger.trials[index]
        if trial.status != "running":
            return
        if trial.restarts < self.sweep.retries:
            self._restart(trial, cause)
        else:
            self._fail(trial, cause)
            self._decide()

    # what follows

    def _start(self, index: int, values: dict[str, Any]) -> dict[str, Any] | None:
        """A new trial's leg; None: MLflow has not made its run yet, or the trial cannot be run, and failed."""
        refused = None
        told = Child(f"{self.sweep.name}/{index}", {key: str(value) for key, value in values.items()}, {}, None)
        try:
            config = self.sweep.trial(values, index)
            told = Child.of(config, self.checks.tags(config), values.get(RUN))
        except ConfigError as error:
            refused = str(error)
        run_id = self._child(index, told)
        if run_id is None:
            return None
        event = {"event": "start", "trial": index, "values": values, "run": run_id, "time": time.time()}
        self._record({**event, "data": told.tags.get("data.fingerprint"), "code": told.tags.get(CODE_TAG)})
        trial = self.ledger.trials[index]
        self.epochs[index] = self._planned(trial)
        if refused is not None:
            self._fail(trial, refused)
            self._decide()
            return None
        self._turn(trial)
        return self._leg(trial)

    def _child(self, index: int, told: Child) -> str | None:
        """The trial's run in MLflow; None while MLflow does not answer: the trial waits for it.

        Raises:
            RunError: MLflow refuses.
        """
        if self._asked is None or self._asked[0] != index:
            self._asked = index, self.writer.ask(None, lambda: self.tracker.child(index, told))
        answer = self._asked[1]
        wait([answer], timeout=ANSWER_SECONDS)
        if not answer.done():
            return None
        self._asked = None
        return answer.result()

    def _leg(self, trial: Trial) -> dict[str, Any]:
        config = self.config(trial)
        folder = made(self.leg_folder(trial))
        (folder / TRIAL_DESCRIPTION).write_text(dump_yaml(config), encoding="utf-8")
        self.writer.tag(trial.run_id, {"phisam.folder": str(folder)})
        self._live.add(trial.index)
        until = None
        if trial.generation < len(self.ledger.boundaries):
            metric = "epoch" if self.sweep.resource == "epochs" else self.sweep.resource
            until = [metric, self.ledger.boundaries[trial.generation]]
        return {
            "trial": trial.index,
            "config": config.model_dump(mode="json"),
            "folder": str(folder),
            "use_gpu": self.checks.use_gpu(config),
            "loopback": only_loopback(),
            "retries": self.sweep.retries - trial.restarts,
            "start": trial.start,
            "known": trial.points[-1].epoch if trial.points else 0,
            "until": until,
            "own": OwnCode.of(config).settings(),
            "fingerprint": self.checks.dataset(config).fingerprint,
            "in_process": self.sweep.in_process,
            "environment": executor.train_environment(),
        }

    def config(self, trial: Trial) -> RunConfig:
        """A trial as a run.

        Raises:
            ConfigError: its values make none; such a trial has failed.
        """
        known = self._configs.get(trial.index)
        if known is None or known[0] != trial.values:  # a generation gives a member other values
            known = self._configs[trial.index] = (trial.values, self.sweep.trial(trial.values, trial.index))
        return known[1]

    def _planned(self, trial: Trial) -> int:
        """Epochs of a trial; 0 if its values make no run."""
        try:
            return self.config(trial).training.epochs
        except ConfigError:
            return 0

    def leg_folder(self, trial: Trial, generation: int | None = None) -> Path:
        """Where Ray Train keeps the checkpoints of a trial, in its present generation or an earlier one."""
        folder = (self.config(trial).checkpoint.storage or self.runs) / trial.run_id
        generation = trial.generation if generation is None else generation
        return folder / f"generation-{generation}" if generation else folder

    def _epoch(self, trial: Trial, metrics: Metrics) -> None:
        if self.sweep.metric not in metrics:
            raise RunError(
                f"trial {trial.index} reports no {self.sweep.metric}; it reports {', '.join(sorted(metrics))}"
            )
        event = self.ledger.news(trial, metrics, self.sweep.metric, self.sweep.resource)
        if event is not None:
            self._record(event)
        self.writer.epoch(trial.run_id, metrics)  # no news to the sweep may be to MLflow, after a kill between the two

    def _decide(self) -> None:
        while events := self.ledger.decisions():
            for event in events:
                self._record(event)
                trial = self.ledger.trials[event["trial"]]
                if trial.over:
                    self._end(trial)
        if self.ledger.generation_over() is not None:
            self._next_generation()

    def _next_generation(self) -> None:
        """Members go on. One that left no checkpoint to go on from has failed, and is nobody's donor."""
        found: dict[int, Path] = {}
        for trial in self.ledger.trials.values():
            if trial.status == "waiting":
                path = usable(self.leg_folder(trial))
                if path is None:
                    self._fail(trial, f"no checkpoint of generation {trial.generation + 1} can be read")
                else:
                    found[trial.index] = path
        exploits = self.ledger.generation_over() or {}
        starts = {}
        for index, own in found.items():
            starts[index] = {"checkpoint": str(own), "values": self.ledger.trials[index].values, "reason": None}
            if (exploit := exploits.get(index)) is not None:
                path = found[exploit.donor]
                starts[index] = {"checkpoint": str(path), "values": exploit.values, "reason": exploit.reason}
        self._record({"event": "generation", "generation": self.ledger.generation, "starts": starts})
        for index in found:
            if (reason := self.ledger.trials[index].reason) and self.view:
                self.view.say(f"trial {index}: {reason}")

    def _restart(self, trial: Trial, cause: str) -> None:
        self._record({"event": "restart", "trial": trial.index, "cause": cause})
        if self.view:
            self.view.say(f"trial {trial.index} failed and goes on from its newest checkpoint ({cause})")

    def _fail(self, trial: Trial, cause: str) -> None:
        self._record({"event": "failed", "trial": trial.index, "cause": cause})
        self._end(trial)

    def _end(self, trial: Trial) -> None:
        """Tells MLflow; it may be told again."""
        self._turn(trial)
        tags: dict[str, str] = {"phisam.restarts": str(trial.restarts)}
        if trial.stopped is not None:
            tags["phisam.stopped_epoch"] = str(trial.stopped)
        if trial.status == "cut":
            tags["phisam.stopped"] = trial.reason or "cut"
        if trial.status == "failed":
            tags["phisam.failure"] = (trial.reason or "failed")[:5000]
        self.writer.end(trial.run_id, ENDS[trial.status], tags, self.history(trial))

    def history(self, trial: Trial) -> list[Metrics]:
        """Metrics of all epochs behind its checkpoints; without those of a checkpoint that cannot be read.

        After an exploit a checkpoint begins with the donor's epochs: the trial's own are in the generation before.
        """
        epochs: dict[float, Metrics] = {}
        for generation in range(trial.generation + 1):
            with contextlib.suppress(ConfigError, RunError):  # ConfigError: it never ran
                for metrics in saved_history(self.leg_folder(trial, generation)):
                    epochs.setdefault(metrics["epoch"], metrics)
        return list(epochs.values())

    def _turn(self, trial: Trial) -> None:
        if self.view:
            self.view.turn(trial)

    def interrupted(self) -> None:
        """MLflow shall not say that trials run which do not."""
        for trial in self.ledger.trials.values():
            if not trial.over:
                self.writer.end(trial.run_id, "KILLED", {}, self.history(trial))
        if self._asked is not None:  # the run of a trial that will not start now; it is made before this is come to
            made_run = self._asked[1]
            self.writer.ask(None, lambda: self.tracker.discard(made_run.result()))


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
