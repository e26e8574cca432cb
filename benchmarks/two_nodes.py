"""Jobs on a Ray cluster of two nodes on this machine: what `phisam doctor`, submit, status, logs and stop do there.

    python benchmarks/two_nodes.py            five to eight minutes on two busy cores
    python benchmarks/two_nodes.py PYTHON     the client has a Python of its own: with phisam, without Ray and MLflow

Each node has a raylet of its own and, which matters for packages, a folder of its own: with one folder for both,
packages of jobs were seen to vanish. The client works from another folder, with no more environment variables than it
needs, and sends a model of its own. One run's workers are spread over both nodes; a node is then
killed under another run, to see what status says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HOME = Path(tempfile.mkdtemp(prefix="two-", dir="/tmp"))  # short: Unix sockets lie in it
CLIENT = sys.argv[1] if len(sys.argv) > 1 else sys.executable
NET = """
from math import prod

from torch import nn


def make(input_shape, num_classes, width=32):
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), width), nn.ReLU(), nn.Linear(width, num_classes))
"""
SWEEP = """
name: two
run: digits-frob
set: {training.epochs: 2, model: "my_pkg.nets:make"}
space: {optimizer.rho: {grid: [0.01, 0.03]}}
search: {name: grid}
"""


def main() -> None:
    """Starts the cluster, looks, ends it."""
    os.environ |= {
        "HOME": str(HOME),
        "PHISAM_HOME": str(HOME / "runs"),
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    from ray_jobs.jobs.token import ensure_token

    ensure_token()
    Path("/tmp/ray").mkdir(exist_ok=True)  # Cluster notes its address there
    from ray.cluster_utils import Cluster

    common: dict[str, Any] = {"num_cpus": 2, "node_ip_address": "127.0.0.1"}
    head = {**common, "include_dashboard": True, "dashboard_port": 8299, "temp_dir": str(HOME / "a")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(**common, temp_dir=str(HOME / "b"))
        look(cluster, second)
    finally:
        cluster.shutdown()


def look(cluster: Any, second: Any) -> None:
    """All that a user would do."""
    client = HOME / "client"
    (client / "my_pkg").mkdir(parents=True)
    (client / "my_pkg" / "nets.py").write_text(NET)
    (client / "two.yaml").write_text(SWEEP)
    four = ["--num-workers", "4", "--set", "model=my_pkg.nets:make"]
    run = submitted("train", "digits-frob", *four, "--set", "training.epochs=3")
    phisam("logs", run, "-f")
    phisam("status", run)
    sweep = submitted("sweep", "two.yaml")
    phisam("logs", sweep, "-f")
    phisam("status", sweep)

    long = submitted("train", "digits-frob", *four, "--set", "training.epochs=1000")
    until(long, "1000 epochs, at")
    cluster.remove_node(second, allow_graceful=False)
    print("--- the second node was killed")
    for _ in range(4):
        time.sleep(8)
        phisam("status", long)
    phisam("stop", long)
    phisam("list")
    phisam("doctor")


def phisam(*words: str) -> str:
    """A command's output, printed too."""
    environment = {"HOME": str(HOME), "PATH": "/usr/bin:/bin"}
    if not sys.argv[1:]:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    command = [CLIENT, "-m", "ray_jobs.cli", *words, "--address", "127.0.0.1:8299"]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=HOME / "client", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(f"$ phisam {' '.join(words)}  ({time.monotonic() - began:.1f} s, exit code {done.returncode})")
    print(done.stdout, flush=True)
    if words[0] == "submit" and done.returncode:
        raise SystemExit("nothing was sent")
    return done.stdout


def submitted(*words: str) -> str:
    """The id of a job."""
    return phisam("submit", *words).splitlines()[0]


def until(job: str, text: str) -> None:
    """Waits for a word in a job's status."""
    while text not in (told := phisam("status", job)):
        if "failed" in told:
            raise SystemExit("it failed")
        time.sleep(3)


if __name__ == "__main__":
    main()
