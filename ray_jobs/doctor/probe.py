"""What a cluster's nodes tell a driver on it. Each check is on its own: one that cannot be done is a line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.config import TrackingConfig
from ray_jobs.doctor import allreduce, findings
from ray_jobs.doctor.findings import Finding
from ray_jobs.errors import first_line
from ray_jobs.paths import runs_folder

SECONDS = 60.0
SEEN_SECONDS = 10.0  # that a network file system may take to show a file
SEES_GPUS = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}  # a process that asks for none is shown none else
PACKAGES = ("ray", "torch", "phisam", "mlflow")


class Node:
    """What is asked of one node, in a process on it."""

    def facts(self, folder: str, secret_files: list[str]) -> dict[str, Any]:
        """Versions, devices, free bytes and file modes."""
        import torch

        return {
            "versions": own_versions(),
            "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
            "disk": _free(folder),
            "shm": _free("/dev/shm"),
            "modes": _modes([*secret_files, f"{folder}/"]),
        }

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def write(self, folder: str, name: str, own: str, text: str) -> tuple[str, bool]:
        """Writes a file beside the driver's; why it could not ("" if it could), and whether it sees the driver's."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, own).write_text(text, encoding="utf-8")
        except OSError as error:
            return error.strerror or type(error).__name__, False
        return "", _seen(Path(folder, name), text)


def probed(cluster: bool) -> list[Finding]:
    """All checks, on the Ray that this process has joined: a cluster, or one that was started for this."""
    folder = runs_folder()
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    names = {node["NodeID"]: _name(node, alive) for node in alive}
    offered = {names[node["NodeID"]]: node["Resources"].get("GPU", 0.0) for node in alive}
    gpu_nodes = [node["NodeID"] for node in alive if node["Resources"].get("GPU")]
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in alive)
    found = [Finding("nodes", "pass", f"{len(alive)}, with {cpus:g} CPUs and {sum(offered.values()):g} GPUs")]
    actors: dict[str, Any] = {
        name: ray.remote(Node)
        .options(
            num_cpus=0, runtime_env=SEES_GPUS, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        .remote()
        for node, name in names.items()
    }
    try:
        facts, silent = _asked(actors, lambda node: node.facts.remote(str(folder), _secret_files()))
        found += [
            findings.failed(
                f"node {name}", f"it runs no task: {why}", "is phisam installed there, in Ray's environment?"
            )
            for name, why in silent.items()
        ]
        if facts:
            found += _of_facts(facts, folder, offered)
        answering = {name: actors[name] for name in facts}
        found += _tried(
            "storage", lambda: [_storage(folder, answering, named=not cluster or "PHISAM_HOME" in os.environ)]
        )
        if answering:
            found += _tried("clocks", lambda: [findings.clocks({n: _offset(actor) for n, actor in answering.items()})])
    finally:
        for actor in actors.values():
            ray.kill(actor)
    found += _tried("MLflow", lambda: [_mlflow(folder)])
    found += _tried("all-reduce", lambda: [allreduce.measured(gpu_nodes or list(names), sum(offered.values()))])
    return found


def own_versions() -> dict[str, str]:
    """Of this process: the packages that must be the same everywhere, Python, and the CUDA that torch is built for."""
    import torch

    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {**versions, "CUDA": torch.version.cuda or "none"}


def _of_facts(facts: Mapping[str, dict[str, Any]], folder: Path, offered: Mapping[str, float]) -> list[Finding]:
    mode, in_environment = os.environ.get("RAY_AUTH_MODE", ""), "RAY_AUTH_TOKEN" in os.environ
    return [
        *findings.versions(own_versions(), {name: fact["versions"] for name, fact in facts.items()}),
        findings.devices({n: offered[n] for n in facts}, {name: fact["gpus"] for name, fact in facts.items()}),
        findings.disk(str(folder), {name: fact["disk"] for name, fact in facts.items()}),
        findings.shared_memory({name: fact["shm"] for name, fact in facts.items()}),
        findings.token(mode, in_environment),
        *findings.open_files({name: fact["modes"] for name, fact in facts.items()}),
    ]


def _asked(actors: Mapping[str, Any], ask: Callable[[Any], Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Node -> answer, and node -> why there is none."""
    calls = {name: ask(actor) for name, actor in actors.items()}
    answers, silent = {}, {}
    deadline = time.monotonic() + SECONDS
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=max(1.0, deadline - time.monotonic()))
        except Exception as error:  # Ray raises of many kinds when a process does not start
            silent[name] = first_line(error)
    return answers, silent


def _tried(check: str, do: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return do()
    except Exception as error:  # a check that cannot be done is a line, whatever the reason
        return [findings.failed(check, f"not to be found out: {first_line(error)}")]


def _storage(folder: Path, actors: Mapping[str, Any], named: bool) -> Finding:
    """Files by all nodes and by the driver, and who sees whose; they are deleted again."""
    text = secrets.token_hex(8)
    name = f".phisam-doctor-{text}"
    own = {node: f"{name}-{number}" for number, node in enumerate(actors)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        return findings.storage(str(folder), named, {"the driver's node": error.strerror or str(error)}, [])
    try:
        calls = {n: actor.write.remote(str(folder), name, own[n], text) for n, actor in actors.items()}
        answers = {node: ray.get(call, timeout=SECONDS) for node, call in calls.items()}
        unseen = [
            node for node, (why, sees) in answers.items() if not why and not (sees and _seen(folder / own[node], text))
        ]
        return findings.storage(str(folder), named, {node: why for node, (why, _) in answers.items()}, unseen)
    finally:
        for left in (name, *own.values()):
            (folder / left).unlink(missing_ok=True)


def _seen(path: Path, text: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # not there yet
            if path.read_text(encoding="utf-8") == text:
                return True
        time.sleep(0.2)
    return False


def _offset(actor: Any) -> tuple[float, float]:
    """Seconds that a node's clock is ahead, and how sure that is; the quickest of a few answers."""
    offsets = []
    for _ in range(4):
        before = time.time()
        there = ray.get(actor.clock.remote(), timeout=SECONDS)
        after = time.time()
        offsets.append(((after - before) / 2, there - (before + after) / 2))
    sure, offset = min(offsets)
    return offset, sure


def _mlflow(folder: Path) -> Finding:
    from ray_jobs.redaction import redacted
    from ray_jobs.tracking import tracking_uri
    from ray_jobs.tracking.check import written

    uri = tracking_uri(TrackingConfig(), folder)
    try:
        seconds = written(uri, folder)
    except Exception as error:  # a server that is no MLflow raises of many kinds
        remedy = "start the server, or set MLFLOW_TRACKING_URI (and MLFLOW_TRACKING_USERNAME, _PASSWORD) on the cluster"
        return findings.failed("MLflow", f"{redacted(uri)}: {first_line(error)}", remedy)
    return Finding("MLflow", "pass", f"{redacted(uri)} took a run and a file in {seconds:.1f} s")


def _secret_files() -> list[str]:
    from ray_jobs.jobs.token import token_path

    return [str(token_path()), str(Path("~/.mlflow/credentials").expanduser())]


def _modes(paths: list[str]) -> dict[str, int]:
    """Mode of those that are there."""
    return {path: stat.S_IMODE(os.stat(path).st_mode) for path in paths if os.path.exists(path)}


def _free(folder: str) -> int:
    """Bytes, of the nearest folder above that is there."""
    path = Path(folder)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _name(node: dict[str, Any], nodes: list[dict[str, Any]]) -> str:
    """The host's name; with the node's id where several are on one host."""
    host = str(node["NodeManagerHostname"])
    several = sum(other["NodeManagerHostname"] == host for other in nodes) > 1
    return f"{host} ({node['NodeID'][:6]})" if several else host
