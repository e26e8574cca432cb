"""Numbers in, verdicts out: each line says what was found and, where it is not well, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail"]

GIB = 2**30
DISK_WARN, DISK_FAIL = 10 * GIB, GIB
SHM_WARN, SHM_FAIL = GIB, 64 * 2**20  # Ray's object store lies there
CLOCK_WARN, CLOCK_FAIL = 1.0, 60.0  # seconds: MLflow orders what the nodes tell by their clocks
SLOW_MB_PER_S = 100.0
VERSION = 1


@dataclass(frozen=True)
class Finding:
    """One line."""

    check: str
    verdict: Verdict
    told: str
    remedy: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if any is a failure."""
    return int(any(finding.verdict == "fail" for finding in findings))


def as_json(address: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """What `--json` prints; docs/cluster.md describes it."""
    lines = [asdict(finding) for finding in findings]
    return {"version": VERSION, "address": address, "ok": exit_code(findings) == 0, "findings": lines}


def failed(check: str, told: str, remedy: str = "") -> Finding:
    """A failure."""
    return Finding(check, "fail", told, remedy)


# versions and devices


def versions(driver: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """One line for each package that differs between the driver and a node, or one that says that none does."""
    found = []
    for package in driver:
        held: dict[str, list[str]] = {}
        for node, theirs in nodes.items():
            held.setdefault(theirs.get(package, "missing"), []).append(node)
        others = {version: names for version, names in held.items() if version != driver[package]}
        if others:
            told = "; ".join(f"{version} on {_some(names)}" for version, names in sorted(others.items()))
            remedy = f"install {package} {driver[package]} everywhere: one image, or one constraints.txt, for all nodes"
            found.append(failed(f"version of {package}", f"{driver[package]} at the driver, {told}", remedy))
    told = ", ".join(f"{package} {version}" for package, version in driver.items())
    return found or [Finding("versions", "pass", f"the same at the driver and on {_nodes(len(nodes))}: {told}")]


def devices(gpus: Mapping[str, float], usable: Mapping[str, int]) -> Finding:
    """Whether torch sees the GPUs that Ray offers. Both: node -> how many."""
    blind = [node for node, offered in gpus.items() if offered > usable.get(node, 0)]
    if blind:
        told = f"Ray offers GPUs on {_some(blind)} that torch does not see"
        remedy = "install a torch built for CUDA and a driver that is new enough for it (nvidia-smi tells the driver's)"
        return failed("GPUs", told, remedy)
    total = sum(gpus.values())
    return Finding("GPUs", "pass", f"{total:g}, seen by torch" if total else "none: runs train on CPUs")


# storage


def storage(folder: str, named: bool, writes: Mapping[str, str], unseen: Sequence[str]) -> Finding:
    """Whether all nodes write into one folder and see what the others wrote.

    Args:
        named: whether somebody chose it, by PHISAM_HOME.
        writes: node -> why it could not write; "" where it could.
        unseen: nodes that do not see the driver's file, or whose files the driver does not see.
    """
    share = "put PHISAM_HOME on a file system that all nodes share and that the user of Ray may write to"
    refused = {node: why for node, why in writes.items() if why}
    if refused:
        node, why = next(iter(refused.items()))
        return failed("storage", f"{folder} cannot be written on {_some(list(refused))}: {node}: {why}", share)
    if unseen:
        told = (
            f"{folder} is another folder on {_some(unseen)} than at the driver: checkpoints would be lost with a node"
        )
        return failed("storage", told, share)
    if not named:
        remedy = "set it where Ray is started, or give phisam submit --home FOLDER"
        return Finding(
            "storage", "warn", f"PHISAM_HOME is not set; {folder} is written by {_nodes(len(writes))}", remedy
        )
    return Finding("storage", "pass", f"{folder} is written and read by {_nodes(len(writes))}")


def space(check: str, where: str, free: Mapping[str, int], warn_below: int, fail_below: int, remedy: str) -> Finding:
    """Free bytes by node."""
    node = min(free, key=lambda name: free[name])
    least = free[node]
    told = f"{least / GIB:.1f} GiB free in {where}" + (f" on {node}, the least" if len(free) > 1 else "")
    if least >= warn_below:
        return Finding(check, "pass", told)
    return Finding(check, "fail" if least < fail_below else "warn", told, remedy)


def disk(where: str, free: Mapping[str, int]) -> Finding:
    """Where runs lie."""
    remedy = "delete old runs, or lower checkpoint.keep; on a full disk a run trains on and keeps nothing of it"
    return space("disk", where, free, DISK_WARN, DISK_FAIL, remedy)


def shared_memory(free: Mapping[str, int]) -> Finding:
    """/dev/shm."""
    remedy = "give containers more: docker run --shm-size=2g, in Kubernetes an emptyDir of medium Memory at /dev/shm"
    return space("/dev/shm", "/dev/shm", free, SHM_WARN, SHM_FAIL, remedy)


# secrets


def open_files(modes: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    """Files that others may read, or folders that they may write to. node -> path -> mode."""
    found = []
    for node, paths in modes.items():
        for path, mode in paths.items():
            if path.endswith("/"):
                if mode & 0o002:
                    told = f"{path} on {node} has mode {mode:o}: everybody can change what is resumed from it"
                    found.append(Finding("file modes", "warn", told, f"chmod o-w {path}"))
            elif mode & 0o077:
                told = f"{path} on {node} has mode {mode:o}: others can read the secret in it"
                found.append(failed("file modes", told, f"chmod 600 {path}"))
    count = sum(map(len, modes.values()))
    return found or [Finding("file modes", "pass", f"{count} looked at: secrets are readable by their owner alone")]


def token(mode: str, in_environment: bool) -> Finding:
    """RAY_AUTH_MODE of the cluster's processes, and whether the token itself stands in their environment."""
    if in_environment:
        remedy = (
            "keep it in ~/.ray/auth_token, mode 600, or a file that RAY_AUTH_TOKEN_PATH names, and unset RAY_AUTH_TOKEN"
        )
        return Finding("token", "warn", "RAY_AUTH_TOKEN is in the environment of every task", remedy)
    if mode != "token":
        remedy = "start Ray with RAY_AUTH_MODE=token and the same ~/.ray/auth_token, mode 600, on all nodes"
        return failed("token", "the cluster asks for no token: whoever reaches it may run code on it", remedy)
    return Finding("token", "pass", "the cluster asks for it")


# time and communication


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Seconds by which each node's clock is ahead of the driver's, and how sure that is (plus or minus)."""
    certain = {node: max(0.0, abs(offset) - sure) for node, (offset, sure) in offsets.items()}
    node = max(certain, key=lambda name: certain[name])
    worst = certain[node]
    if worst < CLOCK_WARN:
        return Finding("clocks", "pass", f"within {max(abs(o) + s for o, s in offsets.values()):.2g} s of the driver's")
    told = f"the clock of {node} is {abs(offsets[node][0]):.3g} s {'ahead' if offsets[node][0] > 0 else 'behind'}"
    return Finding("clocks", "fail" if worst >= CLOCK_FAIL else "warn", told, "run chrony or ntpd on all nodes")


def all_reduce(backend: str, ranks: int, megabytes: float, seconds: float, right: bool) -> Finding:
    """An all-reduce of so many megabytes; MB/s are the gradient's bytes over the time it took."""
    if not right:
        remedy = "update the network's and the GPUs' drivers, and try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1"
        return failed("all-reduce", f"{backend} over {ranks} ranks gives a wrong sum", remedy)
    if ranks == 1:
        return Finding("all-reduce", "pass", f"{backend} starts; with one GPU there is nothing to exchange")
    speed = megabytes / seconds
    told = f"{backend}, {ranks} ranks, {megabytes:g} MB: {speed:,.0f} MB/s"
    if speed < SLOW_MB_PER_S:
        remedy = (
            "name the fast network with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; phisam plan tells what a step costs"
        )
        return Finding("all-reduce", "warn", told, remedy)
    return Finding("all-reduce", "pass", told)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _some(names: Sequence[str]) -> str:
    """Three names, and how many more."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
