"""SIGTERM to a driver and to a worker, in this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from rich.console import Console

from ray_jobs import config, train
from ray_jobs.errors import Terminated
from ray_jobs.eviction import Notice
from ray_jobs.grace import saved_on_sigterm
from ray_jobs.tracking import find_run
from tests.ray_jobs import loop
from tests.ray_jobs.store import put_store


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[str]]:
    """What the process's own handler of SIGTERM was called for; handlers are as before afterwards."""
    called: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append("own"))
    yield called
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def told(
    times: int,
    grace: float,
    ask: Callable[[], None] = lambda: None,
    wait: Callable[[], None] = lambda: time.sleep(60),
) -> None:
    """Waits for workers while it is told to end."""
    with saved_on_sigterm(ask, grace):
        for _ in range(times):
            terminate()
        wait()


def test_a_driver_waits_for_the_workers_and_then_ends(handlers: list[str]) -> None:
    asked: list[str] = []
    with pytest.raises(Terminated, match="and saved"):
        told(1, 60, lambda: asked.append("stop"), lambda: asked.append("the workers end"))
    assert asked == ["stop", "the workers end"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    terminate()
    assert handlers == ["own"]


def test_workers_that_need_longer_than_the_grace_are_not_waited_for() -> None:
    with pytest.raises(Terminated, match=r"not saved within the grace of 0\.05 s"):
        told(1, 0.05)


def test_a_second_signal_is_not_waited_for_either() -> None:
    with pytest.raises(Terminated, match="twice"):
        told(2, 60)


def test_without_a_signal_nothing_happens() -> None:
    told(0, 0.01, wait=lambda: None)
    time.sleep(0.05)


def test_a_worker_heeds_the_first_signal_while_it_trains_and_no_other(handlers: list[str]) -> None:
    notice = Notice()
    notice.listen()
    terminate()
    assert (notice.given, handlers) == (False, ["own"])
    notice.heeded = True
    terminate()
    assert (notice.given, handlers) == (True, ["own"])
    terminate()
    assert handlers == ["own", "own"]


@pytest.fixture
def signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], Any]:
    """A driver of two epochs, without Ray: so many are trained, SIGTERM comes, and the workers need so long to end.

    Returns the run, as MLflow has it, and what ended the driver.
    """
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_store(tmp_path / "mlflow.db")
    described = config.load(
        "digits-sgd", ["data.fraction=0.1", "training.epochs=2", "checkpoint.grace_seconds=0.5", "model.width=4"]
    )
    nobody = SimpleNamespace(remote=lambda *_: None)
    monkeypatch.setattr(train, "beside_driver", lambda _: SimpleNamespace(stop=nobody, read=nobody))
    monkeypatch.setattr(train, "make_trainer", lambda *_, **__: None)
    monkeypatch.setattr(train, "checked_resources", lambda _: False)
    monkeypatch.setattr(train, "only_loopback", lambda: True)
    monkeypatch.setattr(ray, "get", lambda *_, **__: ({}, []))

    def ended(epochs: int, seconds: float) -> Any:
        def fit(_: object) -> None:
            (folder,) = (path.parent for path in tmp_path.glob("*/run.yaml"))
            part = described.model_copy(update={"training": described.training.model_copy(update={"epochs": epochs})})
            with loop.alone():
                loop.trained(part, folder)
            terminate()
            time.sleep(seconds)

        monkeypatch.setattr(train, "fit", fit)
        with pytest.raises(Terminated) as end:
            train.train(described, Console(quiet=True))
        (folder,) = (path.parent for path in tmp_path.glob("*/run.yaml"))
        return find_run(f"sqlite:///{tmp_path / 'mlflow.db'}", folder.name), end.value

    return ended


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_run_that_is_told_to_end_when_all_is_trained_is_finished(
    signalled: Callable[[int, float], Any], seconds: float
) -> None:
    run, end = signalled(2, seconds)
    assert run.info.status == "FINISHED"
    assert len(run.outputs.model_outputs) == 2
    assert str(end).endswith(f"run {run.info.run_id} had trained all its epochs and is finished")
    assert not hasattr(end, "__notes__")  # there is nothing to go on with


def test_a_run_that_is_told_to_end_before_is_killed_and_can_go_on(signalled: Callable[[int, float], Any]) -> None:
    run, end = signalled(1, 0)
    assert run.info.status == "KILLED"
    assert end.__notes__ == [f"to go on with it: phisam train --resume {run.info.run_id}"]
