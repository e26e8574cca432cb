"""How a sweep ends: a winner on each data set, the model that was judged, and what MLflow and the journal say last."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ray_jobs import checkpoint
from ray_jobs.errors import RunError
from ray_jobs.journal import Journal
from ray_jobs.sweep import conclusion, outcome
from ray_jobs.sweep import run as sweeps
from ray_jobs.sweep.begun import Found
from ray_jobs.sweep.conclusion import conclude
from ray_jobs.sweep.config import SweepConfig, load_sweep
from ray_jobs.sweep.driver import Driver
from ray_jobs.sweep.ledger import Ledger
from ray_jobs.sweep.prepare import Checks
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.stopping import make_stopping
from ray_jobs.tracking.sweep import SweepTracker

SPACE = "optimizer.rho: {grid: [0.03, 0.3]}"


class Parent:
    """A sweep's tracker that keeps what it is told."""

    uri, run_id = "", "sweep"

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.calls: list[str] = []

    def attach(self, files: Any, texts: Mapping[str, str]) -> None:
        self.said |= texts

    def describe(self, *told: Any) -> None:
        self.calls.append("describe")

    def summarize(self, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        self.said |= {**tags, **metrics}

    def finish(self, status: str) -> None:
        self.calls.append(status)

    def tags_of(self, run_id: str) -> Mapping[str, str]:
        return self.said

    def register(self, name: str, run_id: str, model: str, tags: Mapping[str, str]) -> int:
        self.calls.append(f"{name} {model} of epoch {tags['epoch']}")
        return 1


def sweep_of(folder: Path, space: str, more: str = "") -> SweepConfig:
    (folder / "s.yaml").write_text(f"name: s\nrun: digits-frob\nspace: {{{space}}}\n{more}")
    return load_sweep(str(folder / "s.yaml"))


def ended(folder: Path, sweep: SweepConfig, values: list[list[float]], last: int | None = None) -> Driver:
    """A driver whose trials have all reported these values, an epoch each. last: the epoch that counts."""
    search = make_search(sweep, 1)
    journal = Journal(folder / "journal.jsonl")
    ledger = Ledger(search, make_stopping(sweep))
    parent: Any = Parent()
    driver = Driver(sweep, folder, folder, journal, ledger, search, parent, parent, Checks(), print, 1)
    for trial, reported in enumerate(values):
        ledger.apply({"event": "start", "trial": trial, "values": search.suggest(trial, {}), "run": f"run{trial}"})
        for epoch, value in enumerate(reported, start=1):
            ledger.apply({"event": "epoch", "trial": trial, "epoch": epoch, "resource": float(epoch), "value": value})
        ledger.apply({"event": "finished", "trial": trial, "epoch": last or len(reported)})
    return driver


def told(driver: Driver) -> Any:
    return driver.tracker


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The trials whose models were kept."""
    trials: list[int] = []
    monkeypatch.setattr(conclusion, "_keep_models", lambda driver, trial, console: trials.append(trial.index))
    monkeypatch.setattr(conclusion, "_report", lambda driver: None)
    return trials


def test_there_is_a_winner_on_each_data_set_and_none_over_all(
    tmp_path: Path, kept: list[int], console: Console
) -> None:
    sweep = sweep_of(tmp_path, f"data.name: {{grid: [digits, mnist5k]}}, {SPACE}")
    driver = ended(tmp_path, sweep, [[0.99], [0.98], [0.7], [0.8]])
    assert conclude(driver, console) == ("FINISHED", None)
    said = told(driver).said
    assert kept == [0, 3]
    assert (said["phisam.winner"], said["phisam.winner.trial"]) == ("run0,run3", "0,3")
    assert (said["phisam.winner.digits.optimizer.rho"], said["phisam.winner.mnist5k.optimizer.rho"]) == ("0.03", "0.3")
    assert (said["winner/digits/mean"], said["winner/mnist5k/mean"]) == (0.99, 0.8)
    assert "winner/mean" not in said
    text = printed(console)
    assert "winner on digits: trial 0, run run0" in text
    assert "winner on mnist5k: trial 3, run run3" in text
    assert text.index("digits:") < text.index("99.00%") < text.index("mnist5k:") < text.index("80.00%")
    assert [line.split(",")[0] for line in said["settings.csv"].splitlines()] == [
        "data",
        *["digits"] * 2,
        *["mnist5k"] * 2,
    ]


def test_one_data_set_has_one_winner_and_no_finished_trial_none(
    tmp_path: Path, kept: list[int], console: Console
) -> None:
    driver = ended(tmp_path, sweep_of(tmp_path, SPACE), [[0.7], [0.8]])
    assert conclude(driver, console) == ("FINISHED", None)
    assert told(driver).said["winner/mean"] == 0.8
    assert told(driver).said["phisam.winner.optimizer.rho"] == "0.3"
    for trial in driver.ledger.trials.values():
        trial.status, trial.reason = "failed", "too large"
    assert conclude(driver, console) == ("FAILED", "sweep s: no trial came to its end (too large)")


@pytest.mark.parametrize(
    ("there", "best", "model", "epoch", "words"),
    [
        ([2, 3, 4], 2, "last", 3, ""),  # the checkpoint of the epoch that was judged is there
        (
            [4],
            2,
            "best",
            2,
            "was judged at epoch 3, of which there is no checkpoint any more: its best model, of epoch 2, stands",
        ),
        (
            [4],
            4,
            "last",
            4,
            "was judged at epoch 3, of which there is no checkpoint any more: its last model, of epoch 4, stands",
        ),
    ],
)
def test_the_model_is_that_of_the_epoch_at_which_the_trial_was_judged(
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    there: list[int],
    best: int,
    model: str,
    epoch: int,
    words: str,
) -> None:
    driver = ended(tmp_path, sweep_of(tmp_path, SPACE), [[0.1] * 4, [0.5, 0.9, 0.8, 0.99]], last=3)
    driver.journal.events.append({"event": "begin", "register": "digits"})
    folder = driver.leg_folder(driver.ledger.trials[1])
    for n in there:
        state = {"epoch": n, "best": {"epoch": min(best, n)}}
        checkpoint.save(folder / f"checkpoint_{n}", state, [{"epoch": float(i)} for i in range(n)])
    parent, logged = told(driver), []
    child = SimpleNamespace(uri="", models=dict, set_tags=parent.said.update, finish=lambda status: None)
    monkeypatch.setattr(conclusion, "Tracker", lambda uri, run_id: child)
    monkeypatch.setattr(conclusion, "is_deleted", lambda uri, run_id: False)
    monkeypatch.setattr(conclusion, "log_models", lambda config, dataset, tracker, state: logged.append(state["epoch"]))
    monkeypatch.setattr(conclusion, "provenance", lambda fingerprint: {})
    monkeypatch.setattr(Checks, "dataset", lambda self, config: SimpleNamespace(fingerprint="f"))
    monkeypatch.setattr(conclusion, "_report", lambda driver: None)
    assert conclude(driver, console) == ("FINISHED", None)
    assert parent.calls == [f"digits {model} of epoch {epoch}"]
    assert logged == [3 if 3 in there else 4]
    assert words in " ".join(printed(console).split())
    assert words or "was judged" not in printed(console)


def test_a_winner_whose_run_or_checkpoint_is_gone_is_said_and_ends_the_sweep(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ended(tmp_path, sweep_of(tmp_path, SPACE), [[0.1], [0.5]])
    monkeypatch.setattr(conclusion, "Tracker", lambda uri, run_id: SimpleNamespace(uri="", models=dict))
    monkeypatch.setattr(conclusion, "is_deleted", lambda uri, run_id: True)
    monkeypatch.setattr(conclusion, "_report", lambda driver: None)
    assert conclude(driver, console) == ("FINISHED", None)
    assert "the model of trial 1 is not kept: run run1 was deleted in MLflow" in " ".join(printed(console).split())
    monkeypatch.setattr(conclusion, "is_deleted", lambda uri, run_id: False)
    driver.journal.events.append({"event": "register", "register": "digits"})
    status, trouble = conclude(driver, console)
    assert (status, "the winner's model is gone (there is no checkpoint" in str(trouble)) == ("FINISHED", True)


def test_the_journal_says_the_end_only_when_mlflow_has_it(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, a sweep is not over, and `--resume` brings MLflow its end."""
    sweep = sweep_of(tmp_path, SPACE)
    driver = SimpleNamespace(over=True, replay=lambda: None)
    monkeypatch.setattr(sweeps, "beside_driver", lambda board: None)
    monkeypatch.setattr(sweeps, "Driver", lambda *a, **k: driver)
    monkeypatch.setattr(sweeps, "Writer", lambda *a: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(sweeps, "conclude", lambda *a: ("FINISHED", None))
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"event": "begin", "max_concurrent": 1})
    found, parent = Found(sweep, tmp_path), Parent()
    away = [True]

    def finish(status: str) -> None:
        if away:
            away.clear()
            raise RunError("nobody answers")
        parent.calls.append(f"{status}, {found.over}")

    monkeypatch.setattr(parent, "finish", finish)
    with pytest.raises(RunError, match="nobody answers"):
        sweeps._go(found, journal, parent, Checks(), console, 1)  # type: ignore[arg-type]
    assert not found.over
    assert sweeps._go(found, journal, parent, Checks(), console, 1) is None  # type: ignore[arg-type]
    assert parent.calls[-1] == "FINISHED, False"
    assert found.over


def test_a_sweep_that_is_stopped_before_its_first_trial_ends_in_mlflow_too(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    sweep = sweep_of(tmp_path, SPACE)
    parent = Parent()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "concurrency", lambda *a: 1)
    monkeypatch.setattr(Checks, "data", lambda self, sweep: ["f"])
    monkeypatch.setattr(Checks, "known_trials", lambda self, sweep, search: None)
    monkeypatch.setattr(SweepTracker, "start", lambda *a: parent)
    monkeypatch.setattr(parent, "describe", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        sweeps.start(sweep, console, None, None)
    assert parent.calls == ["KILLED"]
    assert caught.value.__notes__ == ["to go on with it: phisam sweep --resume sweep"]
    assert load_sweep(str(tmp_path / "sweep" / "sweep.yaml")) == sweep  # and it can go on
    assert (tmp_path / "sweep" / "journal.jsonl").read_text().startswith('{"seq": 0, "event": "begin"')


def test_the_best_settings_are_told_by_what_differs_between_them(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, f"data.name: {{grid: [digits, mnist5k]}}, {SPACE}", "seeds: [0, 1, 2]\n")
    driver = ended(tmp_path, sweep, [[0.5 + trial / 100] for trial in range(12)])
    found = outcome.settings(list(driver.ledger.trials.values())[:6], driver.search.setting)
    table = outcome.best_table(found, sweep.metric, sweep.better)
    assert [str(column.header) for column in table.columns] == [
        "rho",
        "accuracy/validation",
        "95 % interval",
        "seeds",
        "trials",
    ]
    assert list(table.columns[-1].cells) == ["3-5", "0-2"]
