"""Jobs on a real head with a token, from another directory and another environment than the head's.

The client has a virtual environment of its own, in which neither Ray nor MLflow is installed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ray_jobs import checkpoint, checkpoints, config, train
from ray_jobs.faults.verdict import equal
from tests.ray_jobs import loop
from tests.ray_jobs.test_train import LOOPBACK, _listening, _session

pytestmark = pytest.mark.slow

LONG_EPOCHS = ["--set", "training.batch_size=2"]  # a status takes seconds, in which a fast machine trains small epochs
SWEEP = """
name: tiny
run: digits-sgd
set: {training.epochs: 1, scaling.num_workers: 1}
space: {optimizer.base.lr: {grid: [0.1]}}
search: {name: grid}
"""


@dataclass(frozen=True)
class Place:
    """A home with a cluster that offers one CPU, and a folder and a Python to work from."""

    home: Path
    port: int

    def start(self) -> None:
        """A cluster, by the head's Python."""
        words = ["cluster", "start", "--num-cpus", "1", "--port", str(self.port)]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PHISAM_", "MLFLOW_"))}
        command = [sys.executable, "-m", "ray_jobs.cli", *words]
        subprocess.run(
            command, cwd=self.home / "head", env={**inherited, "HOME": str(self.home)}, check=True, timeout=600
        )

    @property
    def python(self) -> str:
        """The client's."""
        return str(self.home / "environment" / "bin" / "python")

    def phisam(self, *words: str, code: int = 0, seconds: float = 600) -> str:
        """What a command printed."""
        done = subprocess.run(
            [self.python, "-m", "ray_jobs.cli", *words],
            cwd=self.home / "client",
            env=environment(self.home),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    def status(self, job_id: str) -> dict[str, Any]:
        (found,) = json.loads(self.phisam("status", job_id, "--json"))["jobs"]
        return dict(found)

    def wait(self, job_id: str, there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Its status, once it is so."""
        deadline = time.monotonic() + 600
        while not there(found := self.status(job_id)):
            assert time.monotonic() < deadline, found
            assert found["state"] in ("pending", "running"), found
            time.sleep(0.5)
        return found

    def run(self, run_id: str) -> Run:
        return self.mlflow.get_run(run_id)

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.home / 'head' / 'runs' / 'mlflow.db'}")


def environment(home: Path) -> dict[str, str]:
    """Of the client: what it cannot do without, and no more."""
    return {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    for folder in ("head", "client"):
        (home / folder).mkdir()
    without_ray(home / "environment")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        made = Place(home, probe.getsockname()[1])
    try:
        made.start()
        repository(home / "client")
        (home / "client" / "tiny.yaml").write_text(SWEEP)
        yield made
    finally:
        folder = noted(home)["folder"]
        stop = [sys.executable, "-m", "ray_jobs.cli", "cluster", "stop"]
        subprocess.run(stop, env=environment(home), check=True, timeout=600)
        assert folder not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def without_ray(folder: Path) -> None:
    """A virtual environment with links to all that is installed here but Ray and MLflow."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if path.name.partition("-")[0] not in ("ray", "mlflow", "mlflow_skinny", "mlflow_tracing"):
            (packages / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def run(place: Place) -> str:
    """A run that has the cluster's CPU and does not end; the id of its job."""
    words = ["digits-frob", "--num-workers", "1", *LONG_EPOCHS, "--set", "training.epochs=5000"]
    job_id = place.phisam("submit", "train", *words).splitlines()[0]
    place.wait(job_id, lambda found: bool(found["heartbeat"] and found["heartbeat"].get("epoch", 0) >= 2))
    return job_id


def noted(home: Path) -> dict[str, Any]:
    """What `phisam cluster start` left word of."""
    return dict(json.loads((home / ".phisam" / "cluster.json").read_text()))


def repository(folder: Path) -> None:
    """With a commit, and a change since."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (folder / "notes.txt").write_text("before\n")
    for words in (["init", "--quiet"], ["add", "notes.txt"], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    (folder / "notes.txt").write_text("after\n")


def test_the_cluster_listens_on_loopback_and_its_token_is_ours_alone(place: Place) -> None:
    assert (place.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    url = json.loads(place.phisam("status", "--json"))["address"]
    cluster = noted(place.home)
    assert (url, Path(cluster["folder"]).stat().st_mode & 0o777) == (cluster["url"], 0o700)
    assert _listening(_session(os.getsid(cluster["pid"]))) <= LOOPBACK
    (place.home / "none").mkdir(exist_ok=True)
    command = [place.python, "-m", "ray_jobs.cli", "list", "--address", url]
    stranger = {**environment(place.home), "HOME": str(place.home / "none")}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "asks for a token" in refused.stderr


def test_a_run_is_told_with_its_place_and_with_the_code_that_it_was_sent_with(place: Place, run: str) -> None:
    found = place.wait(run, lambda found: found["heartbeat"]["at"] is not None)
    assert (found["state"], found["exit_code"], found["ended"]) == ("running", None, None)
    beat = found["heartbeat"]
    assert (beat["epochs"], beat["stale"], sorted(beat["at"])) == (5000, False, ["epoch", "step", "steps"])
    logged = {metric.step for metric in place.mlflow.get_metric_history(found["run_id"], "loss/train")}
    assert beat["epoch"] in logged
    tags = place.run(found["run_id"]).data.tags
    commit = ["git", "rev-parse", "HEAD"]
    here = subprocess.run(commit, cwd=place.home / "client", capture_output=True, text=True, check=True).stdout.strip()
    assert (tags["git.commit"], tags["git.dirty"]) == (here, "true")
    assert "-before\n+after" in Path(place.mlflow.download_artifacts(found["run_id"], "code.diff")).read_text()


def test_a_sweep_without_room_says_so_and_has_it_when_the_run_is_stopped(place: Place, run: str) -> None:
    sweep = place.phisam("submit", "sweep", "tiny.yaml").splitlines()[0]
    waiting = place.wait(sweep, lambda found: bool(found["waiting_for"]))
    assert [wanted["resources"] for wanted in waiting["waiting_for"]] == [{"CPU": 1.0}]
    assert waiting["usage"]["CPU"] == [1, 1]

    assert place.phisam("stop", run) == f"{run} stopped\n"
    assert place.run(str(place.status(run)["run_id"])).info.status == "KILLED"

    output = place.phisam("logs", sweep, "-f")
    assert output == place.phisam("logs", sweep)
    assert output.count("winner:") == 1
    found = place.status(sweep)
    assert (found["state"], found["exit_code"]) == ("succeeded", 0)
    assert found["heartbeat"]["trials"] == {"finished": 1, "of": 1}
    assert place.run(found["run_id"]).info.status == "FINISHED"
    listed = {job["id"]: job["state"] for job in json.loads(place.phisam("list", "--json"))["jobs"]}
    assert listed == {run: "stopped", sweep: "succeeded"}


@pytest.mark.usefixtures("run")
def test_the_token_is_nowhere_but_in_its_file(place: Place) -> None:
    token = (place.home / ".ray" / "auth_token").read_text()
    folder = Path(noted(place.home)["folder"])
    for path in [*folder.rglob("*"), *(place.home / "head").rglob("*"), *(place.home / "client").rglob("*")]:
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        for what in ("environ", "cmdline"):
            try:
                text = Path("/proc", pid, what).read_bytes()
            except OSError:
                continue
            assert token.encode() not in text, (pid, what)


def test_the_doctor_finds_nothing_wrong(place: Place) -> None:
    told = json.loads(place.phisam("doctor", "--json"))
    failed = [finding for finding in told["findings"] if finding["verdict"] == "fail"]
    assert failed == []
    checks = {finding["check"] for finding in told["findings"]}
    assert checks >= {"job", "versions", "storage", "MLflow", "all-reduce", "clocks", "disk", "/dev/shm", "token"}


def test_a_head_that_is_killed_takes_its_jobs_along_and_a_run_goes_on_on_the_next(place: Place, tmp_path: Path) -> None:
    """All of its processes at once, as when its machine is lost. Ray has forgotten the job, and the run has not."""
    words = ["train", "digits-sgd", "--num-workers", "1", *LONG_EPOCHS, "--set", "training.epochs=40"]
    broken_off = place.phisam("submit", *words).splitlines()[0]
    found = place.wait(broken_off, lambda found: bool(found["heartbeat"] and found["heartbeat"].get("epoch", 0) >= 2))
    run_id = str(found["run_id"])
    head = psutil.Process(noted(place.home)["pid"])
    for process in [head, *head.children(recursive=True)]:
        process.kill()
    assert "no cluster: phisam cluster start begins one here" in place.phisam("status", broken_off, code=2)
    assert place.run(run_id).info.status == "RUNNING"

    place.start()
    assert json.loads(place.phisam("list", "--json"))["jobs"] == []
    again = place.phisam("submit", "train", "--resume", run_id).splitlines()[0]
    place.phisam("logs", again, "-f")
    ended = place.status(again)
    assert (ended["state"], ended["exit_code"], ended["run_id"]) == ("succeeded", 0, run_id)
    run, folder = place.run(run_id), place.home / "head" / "runs" / run_id
    assert (run.info.status, run.data.tags["phisam.restarts"]) == ("FINISHED", "1")

    with loop.alone():
        told, _ = loop.trained(config.load(str(folder / train.DESCRIPTION)), tmp_path)
    losses = place.mlflow.get_metric_history(run_id, "loss/train")
    assert [(metric.step, metric.value) for metric in losses] == [(m["epoch"], m["loss/train"]) for m in told]
    undisturbed, resumed = checkpoints.newest(tmp_path), checkpoints.newest(folder)
    assert undisturbed is not None
    assert resumed is not None
    left, right = checkpoint.load(undisturbed), checkpoint.load(resumed)
    assert equal([left["model"], left["optimizer"]], [right["model"], right["optimizer"]])
