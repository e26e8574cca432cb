"""A cluster of this machine for those who have none: `phisam cluster start` and `stop`.

It is `ray start --head --block` in a session of its own, every socket on 127.0.0.1, the token on, its files in a folder
that others cannot read. What it is, is noted in ~/.phisam/cluster.json, and `stop` ends that process alone: never what
another Ray of this machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_jobs.errors import ConfigError, RunError
from ray_jobs.jobs.token import ensure_token

START_SECONDS = 180.0  # a machine that is busy
STOP_SECONDS = 60.0
LONGEST_FOLDER = 44  # characters: what Ray appends must fit into a Unix socket's 107


@dataclass(frozen=True)
class Cluster:
    """url: of the dashboard. began: the start time of process `pid`, in clock ticks, since numbers are used again."""

    url: str
    pid: int
    began: int
    folder: str
    runs: str


def running() -> Cluster | None:
    """The cluster that `start` began, if it is still there."""
    try:
        noted = Cluster(**json.loads(_note().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return noted if _began(noted.pid) == noted.began else None


def start(port: int, runs: Path, num_cpus: int | None, ready: Callable[[str], bool]) -> Cluster:
    """Begins a cluster and waits until it takes jobs.

    Args:
        port: of the dashboard.
        runs: where its jobs leave their runs, PHISAM_HOME for them.
        ready: whether the cluster at a URL takes jobs.

    Raises:
        ConfigError: the port is taken.
        RunError: there is one already, or it did not come up.
    """
    found = running()
    if found is not None:
        raise RunError(f"a cluster runs already, at {found.url}: phisam cluster stop ends it")
    _check_free(port)
    ensure_token()
    folder = _folder()
    url = f"http://127.0.0.1:{port}"
    log = folder / "start.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            _command(port, folder, num_cpus),
            env=_environment(runs),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    began = _began(process.pid)
    assert began is not None, "a child that was not waited for is there"
    cluster = Cluster(url, process.pid, began, str(folder), str(runs))
    _note().parent.mkdir(mode=0o700, exist_ok=True)
    _note().write_text(json.dumps(asdict(cluster)), encoding="utf-8")
    try:
        _wait(process, url, ready, log)
    except BaseException:
        end(cluster)
        raise
    return cluster


def end(cluster: Cluster) -> None:
    """Ends a cluster's process, and with it all that it began.

    Raises:
        RunError: it is still there after a minute and a SIGKILL.
    """
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        if _began(cluster.pid) != cluster.began:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(cluster.pid, number)
        deadline = time.monotonic() + seconds
        while _began(cluster.pid) == cluster.began and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(cluster.pid, os.WNOHANG)
            time.sleep(0.1)
    if _began(cluster.pid) == cluster.began:
        raise RunError(f"the cluster's process {cluster.pid} does not end")
    _note().unlink(missing_ok=True)


def _note() -> Path:
    return Path.home() / ".phisam" / "cluster.json"


def _command(port: int, folder: Path, num_cpus: int | None) -> list[str]:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    ports = _free_ports(3)  # Ray's own are the same for every head: a second on this machine would not take jobs
    ray += ["--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--dashboard-agent-listen-port={ports[1]}"]
    ray += [f"--ray-client-server-port={ports[2]}", "--include-dashboard=true"]
    ray += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--temp-dir={folder / 'ray'}",
    ]  # Ray opens its own to all
    return ray + ([f"--num-cpus={num_cpus}"] if num_cpus else [])


def _environment(runs: Path) -> dict[str, str]:
    """What the cluster's processes, and so its jobs, inherit."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    here = os.path.dirname(sys.executable)  # a job's command is `python`: this one
    return {
        **inherited,
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
        "PHISAM_HOME": str(runs),
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every socket on 127.0.0.1: --node-ip-address alone does not do it
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(START_SECONDS)),
    }


def _wait(process: subprocess.Popen[bytes], url: str, ready: Callable[[str], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    said = "nothing"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if ready(url):
                return
        except RunError as error:
            said = str(error)
        time.sleep(0.3)
    what = f"does not take jobs ({said})" if process.poll() is None else "did not come up"
    last = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:])
    raise RunError(f"the cluster {what}; {log} ends with\n  {last}")


def _folder() -> Path:
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="phisam-", dir=base if len(base) + 20 <= LONGEST_FOLDER else "/tmp"))


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"port {port} is not free ({error.strerror}); choose another with --port") from None


def _free_ports(count: int) -> list[int]:
    """So many different ones."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _began(pid: int) -> int | None:
    """A process's start time, in clock ticks after boot; None: there is none, or it is dead and only not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
