"""What is disturbed: a `phisam train` or `phisam sweep` in a session of its own, and the MLflow server that it uses."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from ray_jobs import attempts, checkpoint, checkpoints
from ray_jobs.errors import RunError
from ray_jobs.faults.verdict import Left
from ray_jobs.tracking import open_store
from ray_jobs.tracking.read import all_points

PATIENCE_SECONDS = 600.0  # of a machine that is busy
POLL_SECONDS = 0.05
OUTPUT = "output.log"

TRAINING = """\
name: chaos
data: digits
model: {{name: mlp, width: 32, depth: 2}}
optimizer: {{base: {{name: adam}}, measure: frobenius, rho: 0.03, lam: 0.001, n_samples: 3}}
training: {{epochs: {epochs}, batch_size: 16}}
scaling: {{num_workers: 2}}
checkpoint: {{every_steps: 50}}
"""
SWEEP = """\
name: chaos-sweep
run: run.yaml
space: {optimizer.rho: {grid: [0.01, 0.03]}}
retries: 1000  # a trial that is killed thrice would have failed, as it should
"""


class Server:
    """MLflow over the store of a runs folder, on a free port of 127.0.0.1."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        open_store(f"sqlite:///{runs / 'mlflow.db'}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Until it answers.

        Raises:
            RunError: it does not.
        """
        command = [sys.executable, "-m", "ray_jobs.cli", "ui", "--port", str(self._port)]
        environment = {**os.environ, "PHISAM_HOME": str(self._runs)}
        with (self._runs.parent / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_for(self._answers, "MLflow's server")

    def kill(self) -> None:
        """SIGKILL, with its own processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Subject:
    """One disturbed or undisturbed command, in a folder of its own.

    kind: train or sweep. server: None for the embedded store.
    """

    def __init__(self, kind: str, folder: Path, epochs: int, with_server: bool) -> None:
        self.kind, self.folder, self.runs = kind, folder, folder / "runs"
        self.runs.mkdir(parents=True)
        (folder / "run.yaml").write_text(TRAINING.format(epochs=epochs))
        (folder / "sweep.yaml").write_text(SWEEP)
        self.server = Server(self.runs) if with_server else None
        self.resumes = 0
        self.begin()

    def begin(self) -> None:
        """`phisam train` or `phisam sweep`."""
        self._start("run.yaml" if self.kind == "train" else "sweep.yaml")

    def resume(self) -> None:
        """`--resume`, once nothing of the driver before is left; from the beginning, if it had not begun."""
        self.process.wait()
        self._end_session()
        self.resumes += 1
        described = "sweep.yaml" if self.kind == "sweep" else "run.yaml"
        begun = [path.parent.name for path in self.runs.glob(f"*/{described}")]
        if begun:
            self._start("--resume", begun[0])
        else:
            self.begin()

    def close(self) -> None:
        """Ends all that was started."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._end_session()
        if self.server is not None:
            self.server.kill()

    @property
    def over(self) -> bool:
        """Whether it came to its end, which a driver that was ended by a signal then may have come to before."""
        if self.process.poll() in (None, 0):
            return self.process.poll() == 0
        last = (self.folder / OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        return any("there is nothing to resume" in line for line in last)

    def steps(self) -> int:
        """Taken so far by all of its runs, those that were taken again too: this number only grows."""
        return sum(each.steps + each.wasted_steps for each in self._attempts())

    def wasted_steps(self) -> int:
        """Taken again."""
        return sum(each.wasted_steps for each in self._attempts())

    def run_folders(self) -> list[Path]:
        """Of its training runs, the one that was begun last at the end."""
        return sorted((path.parent for path in self.runs.glob(f"*/{attempts.FILE}")), key=lambda f: f.stat().st_ctime)

    def processes(self, name: str) -> list[int]:
        """Ray's processes of the driver's session that Ray calls so."""
        table = subprocess.run(["ps", "-eo", "pid=,sess=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in table.splitlines()]
        return [int(row[0]) for row in rows if int(row[1]) == self.process.pid and name in row[2]]

    def _attempts(self) -> list[attempts.Attempts]:
        return [found for folder in self.run_folders() if (found := attempts.read(folder)) is not None]

    def _start(self, *arguments: str) -> None:
        environment = {**os.environ, "PHISAM_HOME": str(self.runs)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        if self.server is not None:
            environment["MLFLOW_TRACKING_URI"] = self.server.uri
        with (self.folder / OUTPUT).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray_jobs.cli", self.kind, *arguments],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end_session(self) -> None:
        """Ray's processes end by themselves when their driver is gone; the rest is ended here."""
        with contextlib.suppress(RunError):
            wait_for(lambda: not self.processes(""), "the end of Ray", 20)
        for pid in self.processes(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def left(runs: Path) -> Mapping[str, Left]:
    """What the runs of a runs folder left, by name."""
    found = {}
    for run in all_points(f"sqlite:///{runs / 'mlflow.db'}"):
        newest = checkpoints.newest(runs / run.run_id)
        if newest is not None:
            found[run.name] = Left(run.status, run.points, checkpoint.load(newest))
    return found


def wait_for(true: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Until something is true.

    Raises:
        RunError: it was not in time.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RunError(f"chaos: waited {seconds:g} s for {what}, in vain")
        time.sleep(POLL_SECONDS)
