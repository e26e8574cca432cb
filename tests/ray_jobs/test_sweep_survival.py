"""A whole sweep, as a user starts it: interrupted, killed, resumed. Real Ray, real processes, real signals."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ray_jobs.journal import Event, read_journal
from tests.ray_jobs.test_train import _wait_until_ended

EPOCHS = 4
# Small batches and eight points a step: an epoch must last long enough that what happens in its middle happens there.
SWEEP = f"""
name: rho
run: digits-frob
set: {{training.epochs: {EPOCHS}, training.batch_size: 16, optimizer.n_samples: 7, scaling.num_workers: 2}}
space: {{optimizer.rho: {{grid: [0.03, 0.3]}}}}
search: {{name: grid}}
stopping: {{name: asha, eta: 2, first_rung: 1}}
"""

# Settings that hang on results, rungs that hang on other trials, and two trials of two workers at a time.
TWELVE = """
name: twelve
run: digits-frob
set: {training.epochs: 9, training.batch_size: 32, scaling.num_workers: 2}
space: {optimizer.rho: {log_uniform: [0.003, 0.1]}, optimizer.lam: {log_uniform: [1.0e-4, 1.0e-3]}}
search: {name: tpe, trials: 12, startup: 4}
stopping: {name: asha, eta: 2, first_rung: 1}
metric: loss/validation
max_concurrent: 2
"""


def command(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """`phisam sweep` in a session of its own."""
    for name, text in (("rho", SWEEP), ("twelve", TWELVE)):
        (home / f"{name}.yaml").write_text(text)
    environment = {**os.environ, "PHISAM_HOME": str(home / "runs"), "PYTHONUNBUFFERED": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", "sweep", *arguments],
        cwd=home,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return output


def journal(home: Path) -> list[Event]:
    (path,) = home.glob("runs/*/journal.jsonl")
    return read_journal(path)


def wait_until(home: Path, process: subprocess.Popen[str], happened: Callable[[list[Event]], bool], what: str) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        if list(home.glob("runs/*/journal.jsonl")) and happened(journal(home)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


def wait_for_epoch(home: Path, process: subprocess.Popen[str], trial: int, epoch: int) -> None:
    def there(events: list[Event]) -> bool:
        epochs = [(event["trial"], event["epoch"]) for event in events if event["event"] == "epoch"]
        return (trial, epoch) in epochs

    wait_until(home, process, there, f"epoch {epoch} of trial {trial}")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the driver; returns when what it started is gone too."""
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    _wait_until_ended(process.pid)


def runs(home: Path) -> dict[str, Run]:
    client = MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = [run.data.tags["mlflow.runName"] for run in found]
    assert len(names) == len(set(names)), names
    return dict(zip(names, found, strict=True))


def measured(home: Path) -> dict[str, Any]:
    """What must not depend on how often a driver died: each trial's end and its curve."""
    client = MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    found = {}
    for name, run in runs(home).items():
        curve = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "accuracy/validation")]
        counted = float(run.data.tags.get("phisam.stopped_epoch", math.inf))
        own = {key: run.data.tags.get(key) for key in ("phisam.stopped", "phisam.stopped_epoch", "phisam.winner.trial")}
        found[name] = (run.info.status, sorted(point for point in curve if point[0] <= counted), own)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("undisturbed")
    process = command(home, "rho.yaml", "--register", "digits")
    return home, finished(process)


def test_a_sweep_in_mlflow_is_complete(undisturbed: tuple[Path, str]) -> None:
    home, output = undisturbed
    found = runs(home)
    parent = found.pop("rho")
    assert parent.info.status == "FINISHED"
    assert sorted(found) == ["rho/0", "rho/1"]
    for index, run in enumerate(found[name] for name in sorted(found)):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.data.tags["phisam.kind"], run.data.tags["phisam.trial"]) == ("trial", str(index))
        assert run.info.status == ("KILLED" if "phisam.stopped" in run.data.tags else "FINISHED")
    assert {run.info.status for run in found.values()} == {"FINISHED", "KILLED"}

    client = MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    winner = found[f"rho/{parent.data.tags['phisam.winner.trial']}"]
    assert parent.data.tags["phisam.winner"] == winner.info.run_id
    champion = client.get_model_version_by_alias("digits", "champion")
    assert (champion.run_id, champion.tags["sweep.id"]) == (winner.info.run_id, parent.info.run_id)
    assert {"sweep.yaml", "settings.csv"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert parent.data.metrics["cost/gradient_evaluations"] > 0
    lines = output.splitlines()
    assert lines[0] == f"rho: sweep {parent.info.run_id}: 2 trials, 1 at once"
    assert sum("starts" in line for line in lines) == 2
    assert "Traceback" not in output


def test_a_driver_that_is_interrupted_and_killed_ends_with_the_same_trials_rungs_and_winner(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    process = command(tmp_path, "rho.yaml")
    wait_for_epoch(tmp_path, process, 0, 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    sweep_id = runs(tmp_path)["rho"].info.run_id
    assert process.returncode == 130, output
    assert output.splitlines()[-2:] == ["phisam: interrupted", f"  to go on with it: phisam sweep --resume {sweep_id}"]
    assert {run.info.status for run in runs(tmp_path).values()} == {"KILLED"}

    process = command(tmp_path, "--resume", sweep_id)
    wait_for_epoch(tmp_path, process, 0, 3)
    kill(process)
    begun = [event["trial"] for event in journal(tmp_path) if event["event"] == "start"]

    finished(command(tmp_path, "--resume", "rho", "--register", "digits"))
    events = journal(tmp_path)
    assert [event["trial"] for event in events if event["event"] == "start"][: len(begun)] == begun
    reported = [(event["trial"], event["epoch"]) for event in events if event["event"] == "epoch"]
    assert len(reported) == len(set(reported))
    assert measured(tmp_path) == measured(undisturbed[0])


def decided(home: Path) -> dict[str, Any]:
    """The journal's side: the settings of all trials, who stood where on each rung, and who was cut there and why."""
    trials: dict[str, Any] = {}
    last: dict[int, float] = {}
    for event in journal(home):
        match event["event"]:
            case "start":
                trials[f"trial {event['trial']}"] = event["values"]
            case "cut" | "finished" | "failed" as end:
                trials[f"end of {event['trial']}"] = end, event.get("epoch"), event.get("reason")
                last[event["trial"]] = event.get("epoch", 0)
    rungs = {
        rung: {
            event["trial"]: event["value"]
            for event in journal(home)
            if event["event"] == "epoch" and event["epoch"] == rung <= last[event["trial"]]
        }
        for rung in (1, 2, 4, 8)
    }
    return {**trials, "rungs": rungs}


def _as_far_as(n_events: float, events: list[Event]) -> bool:
    return len(events) >= n_events


@pytest.mark.slow
def test_twelve_trials_of_two_workers_whose_driver_is_killed_twice_at_random(tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for home in homes.values():
        home.mkdir()
    finished(command(homes["undisturbed"], "twelve.yaml"))
    expected = decided(homes["undisturbed"])
    assert sum("trial" in key for key in expected) == 12
    assert len(expected["rungs"][1]) == 12 > len(expected["rungs"][2]) > len(expected["rungs"][8]) > 0

    n_events = len(journal(homes["undisturbed"]))
    moments = [(random.uniform(*part), random.uniform(0, 2)) for part in ((0.02, 0.5), (0.5, 0.9))]
    arguments = ["twelve.yaml"]
    for part, seconds in moments:
        process = command(homes["killed"], *arguments)
        wait_until(homes["killed"], process, partial(_as_far_as, part * n_events), f"{part:.0%} of it")
        time.sleep(seconds)
        assert process.poll() is None, f"it was over before it was killed, at {moments}"
        kill(process)
        arguments = ["--resume", "twelve"]
    finished(command(homes["killed"], *arguments))
    assert decided(homes["killed"]) == expected, moments
    assert measured(homes["killed"]) == measured(homes["undisturbed"]), moments
