"""What a run survives, and what it leaves behind where it cannot: real Ray, real processes, real signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from ray_jobs import cli, cluster, train, trainer
from ray_jobs.errors import RunError
from ray_jobs.progress import Board, ProgressView, Summary
from tests.ray_jobs.test_progress import metrics
from tests.ray_jobs.test_train import command, finished, series, the_run

EPOCHS = 12
# Eight points a step: an epoch lasts long enough that what happens in its middle happens there.
DESCRIPTION = ["digits-frob", "--set", f"training.epochs={EPOCHS}", "--set", "optimizer.n_samples=7"]


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the output ended before {text!r}")


def newest_history(home: Path) -> list[int]:
    folder = home / the_run(home).info.run_id
    return [int(epoch["epoch"]) for epoch in trainer.saved_history(folder)]


def test_ctrl_c_is_told_and_recorded(tmp_path: Path) -> None:
    process = command(tmp_path, *DESCRIPTION)
    read_until(process, "epoch 3/")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    run_id = the_run(tmp_path).info.run_id
    assert process.returncode == 130, output
    assert output.splitlines()[-2:] == ["phisam: interrupted", f"  to go on with it: phisam train --resume {run_id}"]
    assert the_run(tmp_path).info.status == "KILLED"
    epochs = [step for step, _ in series(tmp_path, "loss/train")]
    assert epochs == newest_history(tmp_path) == list(range(1, len(epochs) + 1))
    assert 3 <= len(epochs) < EPOCHS


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[Callable[[], None]]:
    """MLflow's server over HTTP; yields a function that kills it."""
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    arguments += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=10)

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield kill
    finally:
        kill()


def test_a_tracking_server_that_is_gone_costs_no_training_and_no_epoch(tmp_path: Path) -> None:
    """It dies in mid-run: the run trains to its end and says how to go on; when it is back, the rest is filled in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at_server = ["--set", f"tracking.uri=http://127.0.0.1:{port}"]
    with mlflow_server(tmp_path, port) as kill:
        process = command(tmp_path, *DESCRIPTION, *at_server)
        read_until(process, "epoch 4/")
        kill()
        output, _ = process.communicate(timeout=120)
    (folder,) = (path.parent for path in tmp_path.glob("*/run.yaml"))
    lines = output.splitlines()
    assert process.returncode == 1, output
    assert lines[-2].startswith(f"phisam: MLflow at http://127.0.0.1:{port} was asked to")
    assert lines[-1] == f"  to go on with it: phisam train --resume {folder.name}"
    assert "Traceback" not in output
    assert [epoch["epoch"] for epoch in trainer.saved_history(folder)] == list(range(1, EPOCHS + 1))

    with mlflow_server(tmp_path, port):
        output = finished(command(tmp_path, "--resume", folder.name))
        assert "View run" not in output
        client = MlflowClient(f"http://127.0.0.1:{port}")
        steps = [metric.step for metric in client.get_metric_history(folder.name, "loss/train")]
        assert sorted(steps) == list(range(1, EPOCHS + 1))
        assert client.get_run(folder.name).info.status == "FINISHED"


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    again = pytest.raises(RunError, match="is being trained by another process")
    with trainer.alone(tmp_path, "run"), again, trainer.alone(tmp_path, "run"):
        pass
    with trainer.alone(tmp_path, "run"):
        pass


def test_a_run_that_fails_takes_no_table_from_those_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(described: Any, *_: object) -> Summary:
        if described.name == "digits-frob":
            raise RunError("the second run fails")
        return Summary(described.name, "a" * 32, "sgd", 0, [metrics(1)], 1.0)

    monkeypatch.setattr(cluster, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert cli.main(["train", "digits-sgd", "digits-frob"]) == 1
    told = capsys.readouterr()
    assert "digits-sgd" in told.out
    assert told.err == "phisam: the second run fails\n"


def test_a_board_that_is_slow_to_answer_once_loses_no_line() -> None:
    board = Board()
    slow = iter([TimeoutError, TimeoutError])

    def read(seen: int) -> Any:
        for error in slow:
            raise error
        return board.read(seen)

    output = io.StringIO()
    board.tell_event(metrics(1))
    with ProgressView(Console(file=output, width=100), "run", 1, read, interval=0.01):
        time.sleep(0.5)
    assert "epoch 1/1" in output.getvalue()
