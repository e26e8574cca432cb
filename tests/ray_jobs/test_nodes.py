"""A run on two nodes that loses one: Ray's notice that it will go, and its raylet killed with all that it started."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from rich.console import Console

from ray_jobs import checkpoint, checkpoints, config, train
from tests.ray_jobs import loop

EPOCHS, STEPS = 120, 12


def described(num_workers: object) -> config.RunConfig:
    run = {
        "name": "elastic",
        "data": {"name": "digits", "fraction": 0.3},
        "model": {"name": "mlp", "width": 8, "depth": 2},
        "optimizer": {"measure": "trace", "rho": 0.1, "lam": 0.5, "n_samples": 3, "base": {"name": "adam"}},
        "training": {"epochs": EPOCHS, "batch_size": 32, "precision": "float64"},
        "scaling": {"num_workers": num_workers},
    }
    return config.RunConfig.model_validate(run)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with one CPU, for the driver and a worker."""
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all sockets on 127.0.0.1; Ray reads it on import:
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False)
    for name, value in {
        "HEALTH_CHECK_INTERVAL_S": "0.2",
        "PREEMPTION_POLL_INTERVAL_S": "0.2",
        "WORKER_GROUP_START_TIMEOUT_S": "10",
    }.items():
        monkeypatch.setenv(f"RAY_TRAIN_{name}", value)
    noticed_soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_timeout_ms": 2000}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": noticed_soon, "node_ip_address": "127.0.0.1"}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def take_away(node: object, node_id: str, folder: Path, notice: bool, boards: list[str]) -> None:
    """A node dies in the middle of a run: at once, or after Ray's notice, once the run has saved itself.

    boards: takes the id of the node that the run's board is on.
    """
    (newest,) = until(lambda: list(folder.glob("*/checkpoint_*"))[:1])
    actors = ray._private.state.actors().values()
    boards += [actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == "Board"]
    if notice:
        give_notice(node_id, newest.parent)
    raylet = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
    for pid in [*children(raylet), raylet]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def give_notice(node_id: str, run: Path) -> None:
    """Returns when the run has saved itself in the middle of an epoch."""
    client = ray._private.worker.global_worker.gcs_client
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 60) * 1000)
    accepted, refusal = client.drain_node(node_id, reason, "taken away", deadline)
    assert accepted, refusal
    before = {path.name for path in run.glob("checkpoint_*")}
    until(lambda: [p for p in checkpoints.present(run) if p.name not in before and steps(p) % STEPS])


def steps(path: Path) -> int:
    return int(path.name.partition("_")[2])


def until(found: Callable[[], list[Path]]) -> list[Path]:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if paths := found():
            return paths
        time.sleep(0.02)
    raise AssertionError("it did not come")


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("notice", [True, False])
def test_an_elastic_run_loses_a_node_and_ends_as_if_it_had_not(cluster: Cluster, tmp_path: Path, notice: bool) -> None:
    """To the tolerance of float64, as the number of workers changed; few steps are taken twice."""
    node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    (node_id,) = (n["NodeID"] for n in ray.nodes() if n["RayletSocketName"] == node._raylet_socket_name)
    boards: list[str] = []
    thief = threading.Thread(target=take_away, args=(node, node_id, tmp_path / "runs", notice, boards), daemon=True)
    thief.start()
    output = io.StringIO()
    summary = train.train(described({"min": 1, "max": 2}), Console(file=output, width=200))
    thief.join(timeout=1)
    assert boards == [ray.get_runtime_context().get_node_id()]  # else SIGTERM and the epochs would be lost with it
    warned = "Ray will take 1 of the run's nodes away: the run is saved" in output.getvalue()
    assert warned == notice, output.getvalue()
    assert summary.history[-1]["restarts"] == 1
    assert summary.history[-1]["wasted_steps"] < 2 * STEPS, summary.history[-1]

    with loop.alone():
        loop.trained(described(1), tmp_path / "alone")
    newest = checkpoints.newest(tmp_path / "alone")
    assert newest is not None
    expected, found = checkpoint.load(newest), checkpoint.load(tmp_path / "runs" / summary.run_id / newest.name)
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0, atol=1e-9)
    run = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}").get_run(summary.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["phisam.restarts"] == "1"
