"""A sweep's driver against a cluster that is made up: killed anywhere, in any order, it ends as the undisturbed one."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_jobs import config
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.sweep import driver as drivers
from ray_jobs.sweep import outcome, prepare
from ray_jobs.sweep import run as sweeps
from ray_jobs.sweep.config import SweepConfig, dump_sweep, load_sweep
from ray_jobs.sweep.driver import Driver
from ray_jobs.sweep.journal import Journal
from ray_jobs.sweep.ledger import Ledger
from ray_jobs.sweep.prepare import Checks, concurrency
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.stopping import make_stopping
from ray_jobs.trainer import alone

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
    """MLflow, as far as the driver knows it. kills: now and then, when it has made a run and nobody knows yet."""

    def __init__(self, kills: random.Random | None = None) -> None:
        self._kills = kills
        self.run_id, self.uri = "sweep", ""
        self.runs: dict[int, SimpleNamespace] = {}
        self.made = 0

    def children(self) -> dict[int, Any]:
        return self.runs

    def child(self, runs: Path, index: int, described: Any, tags: Any) -> str:
        self.made += 1
        run_id = f"run-{index}"
        self.runs[index] = SimpleNamespace(
            info=SimpleNamespace(run_id=run_id, status="RUNNING"), data=SimpleNamespace(tags={})
        )
        if self._kills is not None and self._kills.random() < 0.2:
            raise Killed
        return run_id

    def reopen(self, run_id: str) -> None:
        self.runs[int(run_id.removeprefix("run-"))].info.status = "RUNNING"

    def tag(self, run_id: str, tags: Any) -> None:
        pass

    # the writer's part

    def epoch(self, run_id: str, metrics: Any) -> None:
        pass

    def end(self, run_id: str, status: str, tags: dict[str, str], history: Any) -> None:
        run = self.runs[int(run_id.removeprefix("run-"))]
        run.info.status, run.data.tags = status, tags


class NoChecks(Checks):
    def tags(self, described: Any) -> dict[str, str]:
        return {}

    def use_gpu(self, described: Any) -> bool:
        return False


def to_the_end(sweep: SweepConfig, home: Path, cluster: Cluster, told: Told, at_once: int = LAG) -> tuple[Driver, int]:
    """Drives a sweep, again and again after each kill; the last driver and how many were killed."""
    killed = 0
    while True:
        search = make_search(sweep, LAG)
        journal = Journal(home / "journal.jsonl")
        ledger = Ledger(search, make_stopping(sweep))
        driver = Driver(sweep, home, home, journal, ledger, search, told, NoChecks(), at_once)  # type: ignore[arg-type]
        driver.writer = told  # type: ignore[assignment]
        try:
            driver.replay()
            cluster.run(driver)
        except Killed:
            killed += 1
            continue
        finally:
            journal.close()
        return driver, killed


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """The cluster that checkpoints are read from."""
    now: list[Cluster] = []
    monkeypatch.setattr(drivers, "saved_history", lambda folder: now[-1].history(folder))
    monkeypatch.setattr(drivers, "newest_checkpoint", lambda folder: folder)
    monkeypatch.setattr(drivers, "only_loopback", lambda: True)
    return now


def result(driver: Driver, told: Told) -> dict[str, Any]:
    trials = {i: (t.values, t.status, t.stopped, t.value) for i, t in driver.ledger.trials.items()}
    best = outcome.winner(
        outcome.settings(list(driver.ledger.trials.values()), driver.search.setting), driver.sweep.better
    )
    statuses = {index: run.info.status for index, run in told.runs.items()}
    return {"trials": trials, "winner": best and best[1].index, "mlflow": statuses}


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
        assert told.made == driver.ledger.n_trials  # one run a trial, however often the driver was killed
        assert len(cluster.trained) == len(set(cluster.trained))  # no epoch is trained twice
    assert kills > 8
    assert expected is not None
    if "asha" in SWEEPS[name]:
        assert "cut" in {status for _, status, *_ in expected["trials"].values()}


def test_a_trial_that_fails_too_often_ends_failed_and_the_sweep_goes_on(tmp_path: Path, made_up: list[Cluster]) -> None:
    sweep = sweep_of(tmp_path, "random-median")
    told = Told()
    made_up.append(Cluster(random.Random(0), None))
    search = make_search(sweep, LAG)
    ledger = Ledger(search, make_stopping(sweep))
    journal = Journal(tmp_path / "journal.jsonl")
    driver = Driver(sweep, tmp_path, tmp_path, journal, ledger, search, told, NoChecks(), 1)  # type: ignore[arg-type]
    driver.writer = told  # type: ignore[assignment]
    leg = driver.next_leg()
    assert leg is not None
    assert leg["retries"] == sweep.retries == 2
    assert driver.next_leg() is None  # one at a time
    assert driver.told(0, {"kind": "restart", "cause": "worker 0: killed"})
    driver.died(0, "its process died")
    leg = driver.next_leg()
    assert leg is not None
    assert (leg["trial"], leg["retries"]) == (0, 0)
    assert not driver.told(0, {"kind": "failed", "cause": "ValueError: no", "final": False})
    assert told.runs[0].info.status == "FAILED"
    assert told.runs[0].data.tags == {"phisam.restarts": "2", "phisam.failure": "ValueError: no"}
    leg = driver.next_leg()
    assert leg is not None
    assert leg["trial"] == 1


def test_a_place_in_the_cluster_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 5.0})
    described = config.load("digits-frob", ["scaling.num_workers=2"])
    assert concurrency([described], Checks(), None) == 2
    with pytest.raises(ConfigError, match=r"3 trials at once: a trial needs 2 CPUs, and the cluster has 5, .* for 2"):
        concurrency([described], Checks(), 3)
    with pytest.raises(ConfigError, match=r"num_workers = 6 .* needs 6 CPUs, but the cluster has 5"):
        concurrency([config.load("digits-frob", ["scaling.num_workers=6"])], Checks(), None)


def test_trials_of_one_worker_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    shared = config.load("digits-frob", ["scaling.num_workers=1", "scaling.gpus_per_worker=0.5"])
    assert concurrency([shared], Checks(), None) == 4
    with pytest.raises(ConfigError, match=r"gpus_per_worker.*must be 1 with num_workers = 2"):
        config.load("digits-frob", ["scaling.num_workers=2", "scaling.gpus_per_worker=0.5"])


def test_a_trial_that_cannot_run_is_said_before_the_first_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\nrun: digits-frob\nspace: {training.batch_size: {grid: [32, 5000]}}\nsearch: {name: grid}\n"
        "stopping: {name: none}\n"
    )
    sweep = load_sweep(str(path))
    with pytest.raises(ConfigError, match=r"trial 1 of s: training.batch_size = 5000"):
        prepare.Checks().known_trials(sweep, make_search(sweep, 1))


def test_another_space_under_the_same_name_and_a_second_driver_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    sweep = sweep_of(tmp_path, "tpe-asha")
    other = load_sweep(str(tmp_path / "tpe-asha.yaml"), ["search.trials=5"])
    folder = tmp_path / "a1b2c3d4e5"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(dump_sweep(sweep))
    journal = Journal(folder / "journal.jsonl")
    sweeps.check_name(other)  # it had not begun
    journal.append({"event": "begin", "max_concurrent": 1, "register": None, "time": 0.0})
    with pytest.raises(ConfigError, match=r"a1b2c3d4e5\) was begun with other settings: .*trials"):
        sweeps.check_name(other)
    with pytest.raises(RunError, match="phisam sweep --resume a1b2c3d4e5"):
        sweeps.check_name(sweep)
    assert sweeps.begun("tpe-asha").folder == sweeps.begun("a1b2c3d4").folder == folder
    with alone(folder, "sweep"), pytest.raises(RunError, match="sweep a1b2c3d4e5 is being trained by another process"):
        sweeps.resume(sweeps.begun("tpe-asha"), None, None, None)  # type: ignore[arg-type]
    journal.append({"event": "end", "winner": 0, "time": 0.0})
    sweeps.check_name(sweep)  # the same again, once it is over, is a new sweep
