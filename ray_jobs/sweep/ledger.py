"""What a sweep knows, as a function of its journal, and what follows from it. Knows neither Ray nor MLflow.

Every event is appended to the journal, then applied here (`apply`); what must happen next is read off the state
(`decisions`, `next_start`). So a driver that was killed and one that was not cannot differ in what they decide.

    event       fields                                                 a trial is then
    start       trial, values, run (MLflow's id), data (fingerprint)   running
    epoch       trial, epoch, resource, value                          running
    restart     trial, cause                                           running
    rewound     trial, start (a checkpoint, or null), cause            running
    trained     trial                                                  waiting, for a verdict or for its generation
    generation  generation, starts: {trial: checkpoint, values, reason}    running
    cut         trial, epoch, reason                                   cut
    finished    trial, epoch (the last that counts)                    finished
    failed      trial, cause                                           failed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ray_jobs.journal import Event
from ray_jobs.sweep.trajectory import Cut, Pending, Point, Stopping, Trajectory

Status = Literal["running", "waiting", "finished", "cut", "failed"]


class Search(Protocol):
    """See `search.py`."""

    @property
    def n_trials(self) -> int: ...

    def needs(self, index: int) -> range:
        """Trials whose results `suggest` looks at."""

    def suggest(self, index: int, results: Mapping[int, float | None]) -> dict[str, Any]:
        """A trial's values."""


@dataclass
class Trial:
    """One trial.

    stopped: the last epoch that counts, where it is not the last. start: the checkpoint to begin from where the trial's
    own folder has none.
    """

    index: int
    values: dict[str, Any]
    run_id: str
    status: Status = "running"
    points: list[Point] = field(default_factory=list)
    restarts: int = 0
    generation: int = 0
    start: str | None = None
    stopped: int | None = None
    reason: str | None = None

    @property
    def over(self) -> bool:
        """Nothing will change it any more."""
        return self.status in ("finished", "cut", "failed")

    @property
    def value(self) -> float | None:
        """The metric at the last epoch that counts."""
        if self.status == "failed":
            return None
        counted = [point.value for point in self.points if self.stopped is None or point.epoch <= self.stopped]
        return counted[-1] if counted else None


class Ledger:
    """The state of a sweep.

    Args:
        search: proposes the trials' values.
        stopping: says which trials end early.
    """

    def __init__(self, search: Search, stopping: Stopping) -> None:
        self._search, self._stopping = search, stopping
        self.trials: dict[int, Trial] = {}
        self.generation = 0

    @property
    def n_trials(self) -> int:
        """Of the whole sweep, started or not."""
        return self._search.n_trials

    @property
    def over(self) -> bool:
        """Every trial is."""
        return len(self.trials) == self.n_trials and all(trial.over for trial in self.trials.values())

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Where generations end; none without population-based training."""
        return tuple(getattr(self._stopping, "boundaries", ()))

    def next_start(self) -> tuple[int, dict[str, Any]] | None:
        """The next trial that has not started and its values; None: there is none, or others must be over first."""
        index = len(self.trials)
        if index == self.n_trials or not all(
            i in self.trials and self.trials[i].over for i in self._search.needs(index)
        ):
            return None
        return index, self._search.suggest(index, {i: t.value for i, t in self.trials.items() if t.over})

    def apply(self, event: Event) -> None:
        """What a journal's line says happened."""
        kind = event["event"]
        if kind == "start":
            self.trials[event["trial"]] = Trial(event["trial"], event["values"], event["run"])
        elif kind == "generation":
            self.generation = event["generation"] + 1
            for index, start in event["starts"].items():
                trial = self.trials[int(index)]
                trial.status, trial.generation = "running", self.generation
                trial.values, trial.start, trial.reason = start["values"], start["checkpoint"], start["reason"]
        elif "trial" in event:
            self._apply_to(self.trials[event["trial"]], event)

    def _apply_to(self, trial: Trial, event: Event) -> None:
        match event["event"]:
            case "epoch":
                trial.points.append(Point(event["epoch"], event["resource"], event["value"]))
            case "restart":
                trial.restarts += 1
                trial.reason = event["cause"]
            case "rewound":
                trial.start, trial.reason = event["start"], event["cause"]
            case "trained":
                trial.status = "waiting"
            case "cut":
                trial.status, trial.stopped, trial.reason = "cut", event["epoch"], event["reason"]
            case "finished":
                trial.status, trial.reason = "finished", None
                if trial.points and event["epoch"] < trial.points[-1].epoch:
                    trial.stopped = event["epoch"]
            case "failed":
                trial.status, trial.reason = "failed", event["cause"]

    def news(self, trial: Trial, metrics: Mapping[str, Any], metric: str, resource: str) -> Event | None:
        """The event of a reported epoch; None where it was told before, as after a restart."""
        epoch = int(metrics["epoch"])
        if trial.points and epoch <= trial.points[-1].epoch:
            return None
        spent = float(epoch if resource == "epochs" else metrics[resource])
        return {"event": "epoch", "trial": trial.index, "epoch": epoch, "resource": spent, "value": metrics[metric]}

    def decisions(self) -> list[Event]:
        """What follows from all that was reported: trials that are cut, or over. `generation` is asked for apart."""
        trials = {index: self._trajectory(trial) for index, trial in self.trials.items()}
        verdicts = self._stopping.verdicts(trials)
        events: list[Event] = []
        for index, trial in self.trials.items():
            if trial.over or not trial.points:
                continue
            verdict, spent = verdicts[index], self._stopping.spent(trials[index])
            if isinstance(verdict, Cut):
                events.append({"event": "cut", "trial": index, "epoch": verdict.epoch, "reason": verdict.reason})
            elif trial.status == "running":
                if spent is not None:
                    events.append({"event": "trained", "trial": index})
            elif not isinstance(verdict, Pending) and trial.generation == len(self.boundaries):
                last = trial.points[-1].epoch if spent is None else spent
                events.append({"event": "finished", "trial": index, "epoch": last})
        return events

    def generation_over(self) -> dict[int, Any] | None:
        """For PBT: who goes on from whom, once every member waits at the end of the generation; None until then."""
        if self.generation == len(self.boundaries) or len(self.trials) < self.n_trials:
            return None
        if any(trial.status == "running" for trial in self.trials.values()):
            return None
        trials = {index: self._trajectory(trial) for index, trial in self.trials.items()}
        values = {index: trial.values for index, trial in self.trials.items()}
        found: dict[int, Any] | None = self._stopping.exploits(self.generation, trials, values)  # type: ignore[attr-defined]
        return found

    def _trajectory(self, trial: Trial) -> Trajectory:
        if trial.status == "waiting":  # at its end, or at its generation's
            return Trajectory(trial.points, "finished" if trial.generation == len(self.boundaries) else "running")
        return Trajectory(trial.points, trial.status)
