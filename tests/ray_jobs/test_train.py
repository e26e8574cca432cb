"""Whole runs, as a user starts them: trained, killed, resumed, tracked. Real Ray, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from ray_jobs import attempts, checkpoint, checkpoints, config, train
from ray_jobs.errors import ConfigError, RunError
from tests.ray_jobs.store import put_store

EPOCHS, SAMPLES = 12, 7
STEPS = 80  # 1797 digits, less a fifth for the test and a tenth of the rest for validation: 1294, by 16
# Small batches and many samples: few epochs may pass before a signal is heard. A checkpoint in an epoch's middle.
DESCRIPTION = ["digits-frob", "--set", f"training.epochs={EPOCHS}", "--set", "training.batch_size=16"]
DESCRIPTION += ["--set", f"optimizer.n_samples={SAMPLES}", "--set", "optimizer.base.lr=0.02"]
DESCRIPTION += ["--set", "checkpoint.every_steps=30"]


def command(home: Path, *arguments: str, subcommand: str = "train") -> subprocess.Popen[str]:
    """`phisam train`, or another, in a session of its own."""
    environment = {**os.environ, "PHISAM_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    put_store(home / "mlflow.db")
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", subcommand, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines of its output up to the one with a text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"the output ended before {text!r}: {lines}")


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def the_run(home: Path) -> Run:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def series(home: Path, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    return sorted((m.step, m.value) for m in client.get_metric_history(the_run(home).info.run_id, name))


def final_state(home: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoints.present(home / the_run(home).info.run_id)[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("undisturbed")
    return home, finished(command(home, *DESCRIPTION))


def test_a_run_prints_an_epoch_a_line_and_a_table_and_nothing_else(undisturbed: tuple[Path, str]) -> None:
    lines = undisturbed[1].splitlines()
    assert lines[0] == "digits-frob: starting workers"
    assert [line.split("  ")[0] for line in lines[1 : EPOCHS + 1]] == [
        f"digits-frob: epoch {epoch}/{EPOCHS}" for epoch in range(1, EPOCHS + 1)
    ]
    assert lines[EPOCHS + 1].split() == ["run", "digits-frob"]
    assert lines[-1] == "Curves, models and comparison: phisam ui"
    assert len(lines) == EPOCHS + 21


def test_the_run_in_mlflow_is_complete(undisturbed: tuple[Path, str]) -> None:
    home, _ = undisturbed
    run = the_run(home)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "digits-frob"
    assert [step for step, _ in series(home, "loss/train")] == list(range(1, EPOCHS + 1))
    assert run.data.metrics["accuracy/validation"] > 0.9
    assert run.data.metrics["accuracy/test"] > 0.9
    assert run.data.metrics["strength"] == pytest.approx(9e-7)
    assert run.data.metrics["sharpness"] > 0
    assert run.data.metrics["gradient_evaluations"] == EPOCHS * STEPS * (SAMPLES + 1)
    assert (run.data.metrics["restarts"], run.data.metrics["wasted_steps"]) == (0, 0)
    assert run.data.metrics["checkpoint_seconds"] > 0
    assert {"data.fingerprint", "version.ray", "device", "phisam.folder"} <= set(run.data.tags)
    assert run.outputs is not None
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    names = {client.get_logged_model(output.model_id).name for output in run.outputs.model_outputs}
    assert names == {"best", "last"}


def test_the_best_model_is_the_first_of_highest_validation_accuracy(undisturbed: tuple[Path, str]) -> None:
    home, _ = undisturbed
    best = final_state(home)["best"]
    accuracy, loss = dict(series(home, "accuracy/validation")), dict(series(home, "loss/validation"))
    expected = max(accuracy, key=lambda step: (accuracy[step], -loss[step], -step))
    assert (best["epoch"], best["accuracy"]) == (expected, accuracy[expected])


def terminated(home: Path) -> str:
    """The id of a run that was told to end, and saved what it did."""
    process = command(home, *DESCRIPTION)
    read_until(process, "epoch 1/")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    run_id = the_run(home).info.run_id
    assert process.returncode == 143, output
    told = ["phisam: told to end (SIGTERM), and saved", f"  to go on with it: phisam train --resume {run_id}"]
    assert output.splitlines()[-2:] == told
    assert the_run(home).info.status == "KILLED"
    at, saved = attempts.read(home / run_id), checkpoints.newest(home / run_id)
    assert saved is not None
    assert at == (0, 0, int(saved.name.partition("_")[2]))  # no step of it will be taken again
    return run_id


def killed(process: subprocess.Popen[str], home: Path) -> None:
    """SIGKILL to a driver in the middle of its run."""
    read_until(process, f"/{EPOCHS}  ")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert the_run(home).info.status == "RUNNING"
    assert 0 < len(checkpoints.saved_history(home / the_run(home).info.run_id)) < EPOCHS
    _wait_until_ended(process.pid)


def without_a_worker(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a worker of a run that comes to its end nevertheless."""
    lines = read_until(process, f"/{EPOCHS}  ")
    assert _listening(_session(process.pid)) <= LOOPBACK
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    lines += finished(process).splitlines()
    assert sum("workers failed and start again from the newest checkpoint" in line for line in lines) == 1
    assert not any("raylet" in line for line in lines)


def test_a_run_whose_driver_and_worker_are_killed_ends_bit_equal_and_nothing_listens_beyond_loopback(
    undisturbed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, SIGKILL of the resumed run, and of a worker of the next: the same weights and state, each epoch once, in
    one MLflow run.
    """
    run_id = terminated(tmp_path)
    killed(command(tmp_path, "--resume", run_id), tmp_path)
    without_a_worker(command(tmp_path, "--resume", run_id))
    run, (home, _) = the_run(tmp_path), undisturbed
    assert run.info.status == "FINISHED"
    assert_same_end(home, tmp_path)
    assert run.data.metrics["restarts"] == 3
    assert run.data.tags["phisam.restarts"] == "3"
    assert 0 <= run.data.metrics["wasted_steps"] < 2 * STEPS
    for name in ("loss/train", "loss/validation", "accuracy/validation", "accuracy/test", "lr", "sharpness"):
        assert series(tmp_path, name) == series(home, name), name

    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RunError, match="is finished: there is nothing to resume"):
        train.unfinished("digits-frob")


def assert_same_end(home: Path, other: Path) -> None:
    """All of the last checkpoint but its times."""
    left, right = final_state(home), final_state(other)
    for name in ("seconds", "waited"):
        assert isinstance(left.pop(name), float)
        right.pop(name)
    assert_equal(left, right)


def assert_equal(left: Any, right: Any, where: str = "state") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def _wait_until_ended(session: int) -> None:
    """Ray's processes see that their driver is gone and end by themselves; the rest of the session is ended here."""
    deadline = time.monotonic() + 5
    while _session(session) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in _session(session):
        os.kill(pid, signal.SIGKILL)


def _session(session: int) -> list[int]:
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(folder.name))
    return pids


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def _listening(pids: list[int]) -> set[str]:
    """Addresses, as the kernel writes them, that processes listen on over TCP."""
    sockets = {
        link
        for pid in pids
        for descriptor in Path(f"/proc/{pid}/fd").glob("*")
        if (link := _target(descriptor)).startswith("socket:")
    }
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].partition(":")[0])
    assert addresses
    return addresses


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def workers(session: int) -> list[int]:
    """Ray Train's workers of a session, by the names that Ray gives their processes."""
    return [pid for pid in _session(session) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def cluster_of_2_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    return


@pytest.mark.usefixtures("cluster_of_2_cpus")
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["scaling.use_gpu=true"], r"num_workers = 2 on GPUs needs 2 of them, but the cluster has 0"),
        (["scaling.num_workers=4"], r"num_workers = 4 with cpus_per_worker = 1 needs 4 CPUs, but the cluster has 2"),
        (["scaling.cpus_per_worker=2"], r"needs 4 CPUs, but the cluster has 2"),
        (
            ["training.batch_size=63", "optimizer.sample_parallel=1"],
            r"batch_size = 63 .* shared equally by 2 data ranks",
        ),
        (
            ["scaling.num_workers={min: 3, max: 4}", "training.batch_size=60"],
            r"num_workers = 3 .* needs 3 CPUs, but the cluster has 2",
        ),
        (
            ["scaling.num_workers={min: 1, max: 3}", "optimizer.sample_parallel=1"],
            r"batch_size = 64 .* shared equally by 3 data ranks",
        ),
        (["training.batch_size=5000"], r"batch_size = 5000, but the training split has 1294 examples"),
        (["model={name: torchvision/resnet18}"], r"takes images of 3 channels"),
        (["data.name=cifar10", "data.root=/absent"], r"/absent"),
    ],
)
def test_what_cannot_run_is_said_before_a_worker_starts(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=told):
        train.train(config.load("digits-frob", overrides), Console())
    assert not list(tmp_path.iterdir())


def test_resume_of_what_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RunError, match="no run 'nothing' in MLflow"):
        train.unfinished("nothing")
    assert not list(tmp_path.iterdir())
