"""What a run survives, and what it leaves behind where it cannot: real Ray, real processes, real signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from ray_jobs import checkpoints, cli, cluster, train, trainer
from ray_jobs.errors import RunError
from ray_jobs.progress import Board, ProgressView, Summary
from tests.ray_jobs.test_progress import metrics
from tests.ray_jobs.test_train import command, finished, read_until, series, the_run, workers

EPOCHS = 20
DESCRIPTION = ["digits-frob", "--set", "optimizer.n_samples=7", "--set"]


def newest_history(home: Path) -> list[int]:
    folder = home / the_run(home).info.run_id
    return [int(epoch["epoch"]) for epoch in checkpoints.saved_history(folder)]


def test_ctrl_c_is_told_and_recorded(tmp_path: Path) -> None:
    process = command(tmp_path, *DESCRIPTION, "training.epochs=1000")  # it does not come near its end
    read_until(process, "epoch 2/")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=180)

    run_id = the_run(tmp_path).info.run_id
    assert process.returncode == 130, output
    assert output.splitlines()[-2:] == ["phisam: interrupted", f"  to go on with it: phisam train --resume {run_id}"]
    assert the_run(tmp_path).info.status == "KILLED"
    epochs = [step for step, _ in series(tmp_path, "loss/train")]
    assert epochs == newest_history(tmp_path) == list(range(1, len(epochs) + 1))
    assert 2 <= len(epochs) < 1000


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
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield kill
    finally:
        kill()


def server_epochs(port: int, run_id: str) -> list[int]:
    """In the order in which MLflow was told."""
    client = MlflowClient(f"http://127.0.0.1:{port}")
    return [metric.step for metric in client.get_metric_history(run_id, "loss/train")]


def test_a_tracking_server_that_dies_and_hangs_costs_no_training_and_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in mid-run, comes back, and hangs at the end: the run is finished, and `sync` tells the rest, once.

    The workers stand still while it comes back: no machine is so slow to start it that the run would be over by then.
    """
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at_server = ["--set", f"tracking.uri=http://127.0.0.1:{port}"]
    with mlflow_server(tmp_path, port) as kill:
        process = command(tmp_path, *DESCRIPTION, f"training.epochs={EPOCHS}", *at_server)
        read_until(process, "epoch 2/")
        kill()
        read_until(process, "epoch 4/")  # nobody is there, and training goes on
        training = workers(process.pid)
        send(training, signal.SIGSTOP)
    (folder,) = (path.parent for path in tmp_path.glob("*/run.yaml"))
    with mlflow_server(tmp_path, port) as kill:
        deadline = time.monotonic() + 180
        while len(server_epochs(port, folder.name)) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert server_epochs(port, folder.name)[:3] == [1, 2, 3]  # what it missed, in order, while the run goes on
        kill()
    with hanging_server(port):
        send(training, signal.SIGCONT)
        output, _ = process.communicate(timeout=300)
    lines = output.splitlines()
    assert process.returncode == 0, output
    assert any("MLflow was not told all of it; it is kept: phisam sync" in line for line in lines)
    assert [line for line in lines if f"epoch {EPOCHS}/{EPOCHS}" in line]
    assert "Traceback" not in output

    with mlflow_server(tmp_path, port):
        client = MlflowClient(f"http://127.0.0.1:{port}")
        assert client.get_run(folder.name).info.status == "RUNNING"
        for _ in range(2):  # the second changes nothing
            finished(command(tmp_path, folder.name, subcommand="sync"))
            run = client.get_run(folder.name)
            assert server_epochs(port, folder.name) == list(range(1, EPOCHS + 1))
            assert run.info.status == "FINISHED"
            assert run.outputs is not None
            models = [client.get_logged_model(model.model_id) for model in run.outputs.model_outputs]
            assert sorted(model.name for model in models) == ["best", "last"]


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


@contextlib.contextmanager
def hanging_server(port: int) -> Iterator[None]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", port), reuse_port=True) as listening:
        taken: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listening.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)
        for connection in taken:
            connection.close()


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
    answered = threading.Event()

    def read(seen: int) -> Any:
        for error in slow:
            raise error
        answered.set()
        return board.read(seen)

    output = io.StringIO()
    board.tell_event(metrics(1))
    with ProgressView(Console(file=output, width=100), "run", 1, read, interval=0.01):
        assert answered.wait(60)
    assert "epoch 1/1" in output.getvalue()
