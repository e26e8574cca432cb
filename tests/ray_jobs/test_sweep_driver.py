"""A sweep's driver against a cluster that is made up: killed anywhere, in any order, it ends as the undisturbed one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs import checkpoint, checkpoints
from ray_jobs.journal import Journal
from ray_jobs.sweep import driver as drivers
from ray_jobs.sweep import outcome
from ray_jobs.sweep.config import SweepConfig, load_sweep
from ray_jobs.sweep.driver import Driver
from ray_jobs.sweep.ledger import Ledger
from ray_jobs.sweep.prepare import Checks
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.stopping import make_stopping

LAG = 3
SWEEPS = {
    "tpe-asha": "search: {name: tpe, trials: 12, seed: 1}\nstopping: {name: asha, eta: 2, first_rung: 1}",
    "random-median": "search: {name: random, trials: 9, seed: 2}\nstopping: {name: median, first_rung: 2}",
    "seeds": "search: {name: random, trials: 4}\nseeds: [0, 1, 2]\nstopping: {name: asha, eta: 3, first_rung: 2}",
    "pbt": "search: {name: random, trials: 5, seed: 4}\nstopping: {name: pbt, every: 3, seed: 5}",
}


def sweep_of(folder: Path, name: str) -> SweepConfig:
    path = folder / f"{name}.yaml"
    space = "space:\n  optimizer.rho: {log_uniform: [1.0e-3, 1.0e-1]}\n"
    path.write_text(f"name: {name}\nrun: digits-frob\nset: {{training.epochs: 8}}\n{space}{SWEEPS[name]}\n")
    return load_sweep(str(path))


class Killed(BaseException):
    """SIGKILL: nothing of the driver runs after it."""


class Cluster:
    """Trains by a formula; what it checkpoints outlasts the drivers. Reports of a killed driver are lost."""

    def __init__(self, rng: random.Random, kill_within: int | None) -> None:
        self._rng, self._kill_within = rng, kill_within
        self.histories: dict[Path, list[dict[str, Any]]] = {}
        self.trained: list[tuple[str, int]] = []

    def history(self, folder: Path) -> list[dict[str, Any]]:
        return self.histories.get(folder, [])

    def run(self, driver: Driver) -> None:
        legs: list[dict[str, Any]] = []
        steps = None if self._kill_within is None else self._rng.randrange(self._kill_within)
        while not driver.over:
            if steps is not None:
                if steps == 0:
                    raise Killed
                steps -= 1
            if (leg := driver.next_leg()) is not None:
                legs.append(leg)
                history = self.histories.setdefault(Path(leg["folder"]), [])
                if not history and leg["start"] is not None:
                    history += self.histories[Path(leg["start"])]
                continue
            leg = self._rng.choice(legs)
            if not driver.told(leg["trial"], self._event(leg, last_words=steps == 0)):
                legs.remove(leg)

    def _event(self, leg: dict[str, Any], last_words: bool) -> dict[str, Any]:
        history = self.histories[Path(leg["folder"])]
        until = leg["until"] or ["epoch", leg["config"]["training"]["epochs"]]
        if history and history[-1][until[0]] >= until[1]:
            return {"kind": "trained"}
        epoch, rho = len(history) + 1, leg["config"]["optimizer"]["rho"]
        seed = leg["config"]["training"]["seed"]
        value = 1 - abs(math.log10(rho) + 1.7) / 4 - 0.3 / epoch + 0.01 * math.sin(97 * rho * epoch + seed)
        before = history[-1]["accuracy/validation"] if history else 0.0
        metrics = {"epoch": epoch, "accuracy/validation": value + before / 100, "gradient_evaluations": 80 * epoch}
        history.append(metrics)
        self.trained.append((leg["folder"], epoch))
        if last_words:
            raise Killed  # the checkpoint is there, the report never comes
        return {"kind": "epoch", "metrics": metrics}


class Told:
    """MLflow and its writer, as far as the driver knows them. kills: now and then, when it has made a run and nobody
    knows yet.
    """

    def __init__(self, kills: random.Random | None = None) -> None:
        self._kills = kills
        self.run_id, self.uri = "sweep", ""
        self.runs: dict[str, SimpleNamespace] = {}
        self._made = 0

    def children(self) -> list[Any]:
        return list(self.runs.values())

    def child(self, index: int, told: Any) -> str:
        self._made += 1
        run_id = f"run-{self._made}"
        self.runs[run_id] = SimpleNamespace(
            trial=index,
            info=SimpleNamespace(run_id=run_id, status="RUNNING"),
            data=SimpleNamespace(tags={}, metrics={}),
        )
        if self._kills is not None and self._kills.random() < 0.2:
            raise Killed
        return run_id

    def discard(self, run_id: str) -> None:
        del self.runs[run_id]

    # the writer's part

    def ask(self, run_id: str | None, task: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(task())
        return done

    def reopen(self, run_id: str) -> None:
        self.runs[run_id].info.status = "RUNNING"

    def tag(self, run_id: str, tags: Any) -> None:
        pass

    def epoch(self, run_id: str, metrics: Any) -> None:
        pass

    def end(self, run_id: str, status: str, tags: dict[str, str], history: Any) -> None:
        run = self.runs[run_id]
        run.info.status, run.data.tags = status, tags


class NoChecks(Checks):
    def tags(self, described: Any) -> dict[str, str]:
        return {}

    def use_gpu(self, described: Any) -> bool:
        return False


def driver_of(sweep: SweepConfig, home: Path, told: Any, at_once: int, checks: Checks | None = None) -> Driver:
    search, journal = make_search(sweep, LAG), Journal(home / "journal.jsonl")
    ledger = Ledger(search, make_stopping(sweep))
    checks = checks or NoChecks()
    return Driver(sweep, home, home, journal, ledger, search, told, told, checks, print, at_once)


def to_the_end(sweep: SweepConfig, home: Path, cluster: Cluster, told: Told, at_once: int = LAG) -> tuple[Driver, int]:
    """Drives a sweep, again and again after each kill; the last driver and how many were killed."""
    killed = 0
    while True:
        driver = driver_of(sweep, home, told, at_once)
        try:
            driver.replay()
            cluster.run(driver)
        except Killed:
            killed += 1
            continue
        return driver, killed


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """The cluster that checkpoints are read from."""
    now: list[Cluster] = []
    monkeypatch.setattr(drivers, "saved_history", lambda folder: now[-1].history(folder))
    monkeypatch.setattr(drivers, "usable", lambda folder: folder)
    monkeypatch.setattr(drivers, "only_loopback", lambda: True)
    return now


def result(driver: Driver, told: Told) -> dict[str, Any]:
    trials = {i: (t.values, t.status, t.stopped, t.value) for i, t in driver.ledger.trials.items()}
    best = outcome.winner(
        outcome.settings(list(driver.ledger.trials.values()), driver.search.setting), driver.sweep.better
    )
    statuses = {run.trial: run.info.status for run in told.runs.values()}
    return {"trials": trials, "winner": best and best.trial.index, "mlflow": statuses}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_driver_killed_anywhere_ends_with_the_same_trials_rungs_and_winner(
    tmp_path: Path, made_up: list[Cluster], name: str
) -> None:
    sweep = sweep_of(tmp_path, name)
    expected = None
    kills = 0
    for seed in range(8):
        home = tmp_path / str(seed)
        home.mkdir()
        cluster = Cluster(random.Random(seed), 40 if seed else None)
        told = Told(random.Random(seed) if seed else None)
        made_up.append(cluster)
        driver, killed = to_the_end(sweep, home, cluster, told, at_once=1 + seed % LAG)
        kills += killed
        ended = result(driver, told)
        expected = expected or ended
        assert ended == expected, f"seed {seed}, {killed} kills"
        assert len(told.runs) == driver.ledger.n_trials  # one run a trial, however often the driver was killed
        assert len(cluster.trained) == len(set(cluster.trained))  # no epoch is trained twice
    assert kills > 8
    assert expected is not None
    ends = {"finished": "FINISHED", "cut": "KILLED", "failed": "FAILED"}
    assert expected["mlflow"] == {trial: ends[status] for trial, (_, status, *_) in expected["trials"].items()}
    if "asha" in SWEEPS[name]:
        assert "cut" in {status for _, status, *_ in expected["trials"].values()}


def test_a_trial_that_fails_too_often_ends_failed_and_the_sweep_goes_on(tmp_path: Path, made_up: list[Cluster]) -> None:
    sweep = sweep_of(tmp_path, "random-median")
    told = Told()
    made_up.append(Cluster(random.Random(0), None))
    driver = driver_of(sweep, tmp_path, told, 1)
    leg = driver.next_leg()
    assert leg is not None
    assert leg["retries"] == sweep.retries == 2
    assert driver.next_leg() is None  # one at a time
    assert driver.told(0, {"kind": "restart", "cause": "worker 0: killed"})
    driver.died(0, "its process died")
    leg = driver.next_leg()
    assert leg is not None
    assert (leg["trial"], leg["retries"]) == (0, 0)
    assert not driver.told(0, {"kind": "failed", "cause": "ValueError: no"})
    assert told.runs["run-1"].info.status == "FAILED"
    assert told.runs["run-1"].data.tags == {"phisam.restarts": "2", "phisam.failure": "ValueError: no"}
    leg = driver.next_leg()
    assert leg is not None
    assert leg["trial"] == 1


def test_a_trial_whose_process_dies_too_often_has_failed(tmp_path: Path, made_up: list[Cluster]) -> None:
    told = Told()
    made_up.append(Cluster(random.Random(0), None))
    driver = driver_of(sweep_of(tmp_path, "random-median"), tmp_path, told, 1)
    for _ in range(3):  # once, and two retries
        leg = driver.next_leg()
        assert leg is not None
        assert leg["trial"] == 0
        driver.died(0, "its process died")
    assert told.runs["run-1"].info.status == "FAILED"
    assert told.runs["run-1"].data.tags["phisam.failure"] == "its process died"


def test_a_trial_waits_for_an_mlflow_that_is_away_and_those_that_run_go_on(
    tmp_path: Path, made_up: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "ANSWER_SECONDS", 0.0)
    made_up.append(Cluster(random.Random(0), None))
    told = Told()
    driver = driver_of(sweep_of(tmp_path, "random-median"), tmp_path, told, 2)
    assert driver.next_leg() is not None
    away: list[Future[Any]] = []

    def ask(run_id: str | None, task: Callable[[], Any]) -> Future[Any]:
        away.append(Future())
        return away[-1]

    monkeypatch.setattr(told, "ask", ask)
    assert driver.next_leg() is None
    assert driver.told(0, {"kind": "epoch", "metrics": {"epoch": 1, "accuracy/validation": 0.5}})
    assert driver.next_leg() is None
    (asked,) = away  # once
    asked.set_result(told.child(1, None))
    leg = driver.next_leg()
    assert leg is not None
    assert leg["trial"] == 1


def test_values_that_make_no_run_fail_their_trial_and_the_sweep_goes_on(
    tmp_path: Path, made_up: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, told = sweep_of(tmp_path, "tpe-asha"), Told()
    made_up.append(Cluster(random.Random(0), None))
    driver = driver_of(sweep, tmp_path, told, 1)
    suggest = driver.search.suggest
    bad = {"optimizer.rho": 0.1, "optimizer.n_samples": 1}
    monkeypatch.setattr(driver.search, "suggest", lambda i, results: bad if i == 0 else suggest(i, results))
    assert driver.next_leg() is None
    assert told.runs["run-1"].info.status == "FAILED"
    assert "optimizer.n_samples: must be 2 or more" in told.runs["run-1"].data.tags["phisam.failure"]
    leg = driver.next_leg()
    assert leg is not None
    assert leg["trial"] == 1
    driver_of(sweep, tmp_path, told, 1).replay()  # such a trial has no description to read again


def test_a_trial_whose_newest_checkpoint_is_torn_goes_on_from_an_older_one_and_says_so(
    tmp_path: Path, made_up: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.append(Cluster(random.Random(0), None))
    sweep, told = sweep_of(tmp_path, "random-median"), Told()
    driver = driver_of(sweep, tmp_path, told, 2)
    first, second = driver.next_leg(), driver.next_leg()
    assert first is not None
    assert second is not None
    history = [{"epoch": epoch, "accuracy/validation": 0.5 + epoch / 100} for epoch in (1, 2)]
    for epoch in (1, 2):
        checkpoint.save(Path(first["folder"]) / f"checkpoint_{epoch}", {"epoch": epoch}, history[:epoch])
    torn = Path(first["folder"]) / "checkpoint_2" / "state.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    (Path(second["folder"]) / "checkpoint_1").mkdir()  # trial 1 has one that is empty, and no other

    said: list[str] = []
    again = driver_of(sweep, tmp_path, told, 2)
    again.say = said.append
    monkeypatch.setattr(drivers, "usable", checkpoints.usable)
    again.replay()
    assert [line.partition(",")[0] for line in said] == [
        "trial 0 goes on from epoch 1",
        "trial 1 goes on from its beginning",
    ]
    first, second = again.next_leg(), again.next_leg()
    assert first is not None
    assert second is not None
    assert (first["trial"], first["start"]) == (0, str(torn.parent.parent / "checkpoint_1"))
    assert (second["trial"], second["start"]) == (1, None)
    assert not torn.exists()  # the leg would go on from there
    assert [path.name for path in checkpoints.damaged(Path(first["folder"]))] == ["damaged_checkpoint_2"]
    assert (first["retries"], [point.epoch for point in again.ledger.trials[0].points]) == (sweep.retries, [1])


def test_a_member_without_a_checkpoint_fails_and_is_nobodys_donor(
    tmp_path: Path, made_up: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    made_up.append(Cluster(random.Random(0), None))
    driver = driver_of(sweep_of(tmp_path, "pbt"), tmp_path, told, 5)
    legs = [driver.next_leg() for _ in range(5)]
    folders = [Path(leg["folder"]) for leg in legs if leg is not None]
    monkeypatch.setattr(drivers, "usable", lambda folder: None if folder == folders[0] else folder)
    for member in range(5):  # the best is member 0, whose checkpoint is gone
        for epoch in (1, 2, 3):
            driver.told(member, {"kind": "epoch", "metrics": {"epoch": epoch, "accuracy/validation": 1 - member / 9}})
        driver.told(member, {"kind": "trained"})
    members = driver.ledger.trials
    assert [member.status for member in members.values()] == ["failed", *["running"] * 4]
    assert members[0].reason == "no checkpoint of generation 1 can be read"
    assert [member.start for member in members.values()][1:] == [str(folders[donor]) for donor in (1, 2, 3, 1)]
