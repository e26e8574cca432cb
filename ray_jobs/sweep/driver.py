"""The driver of a sweep: trials by Ray Tune, decisions by the ledger, everything told to the journal first.

A driver that is killed at any moment is followed by `phisam sweep --resume ID`: the journal is read again, epochs that
only a checkpoint knows are added to it, and the sweep goes on with the same trials, rungs and winner.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_jobs.cluster import only_loopback
from ray_jobs.config import RunConfig, dump_yaml
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.progress import Metrics
from ray_jobs.sweep import executor
from ray_jobs.sweep.config import SweepConfig
from ray_jobs.sweep.journal import Event, Journal
from ray_jobs.sweep.ledger import Ledger, Trial
from ray_jobs.sweep.prepare import Checks
from ray_jobs.sweep.progress import SweepView
from ray_jobs.sweep.search import Search
from ray_jobs.tracking.sweep import SweepTracker, Writer
from ray_jobs.trainer import made, newest_checkpoint, saved_history

DESCRIPTION, JOURNAL, TRIAL_DESCRIPTION = "sweep.yaml", "journal.jsonl", "run.yaml"
ENDS = {"finished": "FINISHED", "cut": "KILLED", "failed": "FAILED"}


@dataclass
class Driver:
    """One driver's hold on a sweep; `executor.Conductor` for Tune.

    Attributes:
        max_concurrent: legs at once, for this driver; the number that the search was made with is the journal's.
    """

    sweep: SweepConfig
    folder: Path
    runs: Path
    journal: Journal
    ledger: Ledger
    search: Search
    tracker: SweepTracker
    checks: Checks
    max_concurrent: int
    board: Any = None
    view: SweepView | None = None
    writer: Writer | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    _live: set[int] = field(default_factory=set)
    _orphans: dict[int, str] = field(default_factory=dict)
    _places: dict[int, str] = field(default_factory=dict)

    # what the journal says

    def replay(self) -> None:
        """The state that an earlier driver left: its journal, then what only checkpoints and MLflow know."""
        for event in self.journal.events:
            self.ledger.apply(event)
        children = self.tracker.children()
        known = {trial.run_id for trial in self.ledger.trials.values()}
        self._orphans = {i: run.info.run_id for i, run in children.items() if run.info.run_id not in known}
        for trial in list(self.ledger.trials.values()):
            config = self.config(trial)
            self.epochs[trial.index] = config.training.epochs
            run = children.get(trial.index)
            if trial.over:
                told = run is not None and run.info.status == ENDS[trial.status] and "phisam.restarts" in run.data.tags
                if not told:
                    self._end(trial)
                continue
            self.tracker.reopen(trial.run_id)
            for metrics in saved_history(self.leg_folder(trial, config)):
                self._epoch(trial, metrics)
            if trial.points and trial.points[-1].epoch == config.training.epochs and trial.status == "running":
                self._record({"event": "trained", "trial": trial.index})
        self._decide()

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
        config = self.sweep.trial(values, index)
        try:
            tags = self.checks.tags(config)
            refused = None
        except ConfigError as error:
            tags, refused = {}, str(error)
        run_id = self._orphans.pop(index, None) or self.tracker.child(self.runs, index, config, tags)
        self._record({"event": "start", "trial": index, "values": values, "run": run_id, "time": time.time()})
        trial = self.ledger.trials[index]
        self.epochs[index] = config.training.epochs
        if refused is not None:
            self._fail(trial, refused)
            self._decide()
            return None
        self._turn(trial)
        return self._leg(trial)

    def _leg(self, trial: Trial) -> dict[str, Any]:
        config = self.config(trial)
        folder = made(self.leg_folder(trial, config))
        (folder / TRIAL_DESCRIPTION).write_text(dump_yaml(config), encoding="utf-8")
        self.tracker.tag(trial.run_id, {"phisam.folder": str(folder)})
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
            "environment": executor.train_environment(),
        }

    def config(self, trial: Trial) -> RunConfig:
        """A trial as a run."""
        return self.sweep.trial(trial.values, trial.index)

    def leg_folder(self, trial: Trial, config: RunConfig, generation: int | None = None) -> Path:
        """Where Ray Train keeps the checkpoints of a trial, in its present generation or an earlier one."""
        folder = (config.checkpoint.storage or self.runs) / trial.run_id
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
            if self.writer is not None:
                self.writer.epoch(trial.run_id, metrics)

    def _decide(self) -> None:
        while events := self.ledger.decisions():
            for event in events:
                self._record(event)
                trial = self.ledger.trials[event["trial"]]
                if trial.over:
                    self._end(trial)
        exploits = self.ledger.generation_over()
        if exploits is not None:
            self._next_generation(exploits)

    def _next_generation(self, exploits: dict[int, Any]) -> None:
        waiting = [trial for trial in self.ledger.trials.values() if trial.status == "waiting"]
        checkpoints = {t.index: newest_checkpoint(self.leg_folder(t, self.config(t))) for t in waiting}
        starts = {}
        for trial in waiting:
            exploit = exploits.get(trial.index)
            donor = trial.index if exploit is None else exploit.donor
            values = trial.values if exploit is None else exploit.values
            reason = None if exploit is None else exploit.reason
            starts[trial.index] = {"checkpoint": str(checkpoints[donor]), "values": values, "reason": reason}
        self._record({"event": "generation", "generation": self.ledger.generation, "starts": starts})
        for trial in waiting:
            if trial.reason and self.view:
                self.view.say(f"trial {trial.index}: {trial.reason}")

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
        if self.writer is not None:
            self.writer.end(trial.run_id, ENDS[trial.status], tags, self.history(trial))

    def history(self, trial: Trial) -> list[Metrics]:
        """Metrics of all epochs behind its checkpoints; without those of a checkpoint that cannot be read.

        After an exploit a checkpoint begins with the donor's epochs: the trial's own are in the generation before.
        """
        epochs: dict[float, Metrics] = {}
        config = self.config(trial)
        for generation in range(trial.generation + 1):
            with contextlib.suppress(RunError):
                for metrics in saved_history(self.leg_folder(trial, config, generation)):
                    epochs.setdefault(metrics["epoch"], metrics)
        return list(epochs.values())

    def _turn(self, trial: Trial) -> None:
        if self.view:
            self.view.turn(trial)

    def interrupted(self) -> None:
        """MLflow shall not say that trials run which do not."""
        for trial in self.ledger.trials.values():
            if not trial.over and self.writer is not None:
                self.writer.end(trial.run_id, "KILLED", {}, self.history(trial))


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
