"""What is told of a job: from its own state on the cluster and from its driver's heartbeat, never from its output."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray_jobs.errors import RunError
from ray_jobs.formatting import shown
from ray_jobs.jobs import heartbeat
from ray_jobs.jobs.client import JobsClient, Json
from ray_jobs.progress import duration

VERSION = 1
OVER = ("stopped", "failed", "succeeded")
STALE_SECONDS = 30.0  # a driver beats every 2; a busy machine may be late


def find(client: JobsClient, wanted: str) -> Json:
    """The job with an id, or with the beginning of one.

    Raises:
        RunError: there is none, or there are several.
    """
    jobs = client.jobs()
    found = [job for job in jobs if job["submission_id"] == wanted]
    found = found or [job for job in jobs if wanted and job["submission_id"].startswith(wanted)]
    if not found:
        raise RunError(f"no job {wanted!r} at {client.head.url}; `phisam list` shows those that are there")
    if len(found) > 1:
        ids = ", ".join(sorted(job["submission_id"] for job in found)[:5])
        raise RunError(f"{len(found)} jobs begin with {wanted!r}; say which: {ids}")
    return found[0]


def ours(jobs: Sequence[Json]) -> list[Json]:
    """Those that `phisam submit` sent, the newest first."""
    return sorted(
        (job for job in jobs if "phisam" in (job["metadata"] or {})), key=lambda job: -(job["start_time"] or 0)
    )


def state(job: Json) -> str:
    """pending, running, stopped, failed or succeeded."""
    return str(job["status"]).lower()


def summary(job: Json) -> dict[str, Any]:
    """What `phisam list --json` tells of a job."""
    metadata = job["metadata"] or {}
    return {
        "id": job["submission_id"],
        "kind": metadata.get("phisam"),
        "name": metadata.get("name"),
        "state": state(job),
        "submitted": _seconds(job["start_time"]),
        "ended": _seconds(job["end_time"]),
    }


def status(client: JobsClient, job: Json) -> dict[str, Any]:
    """What `phisam status --json` tells of a job; docs/cluster.md describes it."""
    over = state(job) in OVER
    beat = read_heartbeat(client, job)
    return {
        **summary(job),
        "message": job["message"] or "",
        "exit_code": job["driver_exit_code"],
        "run_id": beat.get("run_id") if beat else None,
        "heartbeat": None if beat is None else {**beat, **ages(beat, client.now, over)},
        "connected": bool(job["job_id"]),
        "waiting_for": [] if over else waiting_for(client, job),
        "usage": {} if over else {name: list(counts) for name, counts in client.usage().items() if ":" not in name},
    }


def read_heartbeat(client: JobsClient, job: Json) -> Json | None:
    """The newest word of a job's driver; None: it left none yet, or its node is gone or does not answer."""
    node = job["driver_node_id"]
    text = client.node_file(node, heartbeat.file_name(job["submission_id"])) if node else None
    try:
        beat = json.loads(text) if text else None
    except ValueError:
        return None
    known = isinstance(beat, dict) and all(isinstance(beat.get(key), int | float) for key in ("time", "moved"))
    return beat if known else None


def ages(beat: Json, now: float, over: bool) -> dict[str, Any]:
    """Seconds since the driver's last word and since its last progress; stale: it should have said something since."""
    age = max(0.0, now - beat["time"])
    return {
        "age": age,
        "still": max(0.0, now - beat["moved"]),
        "stale": not over and age > STALE_SECONDS,
    }


def waiting_for(client: JobsClient, job: Json) -> list[dict[str, Any]]:
    """What a job has asked the cluster for and did not get: how many processes of which resources."""
    if not job["job_id"]:  # its driver has not spoken to Ray
        return []
    wanted: Counter[str] = Counter()
    for group in client.rows("placement_groups"):
        if group["creator_job_id"] == job["job_id"] and group["state"] in ("PENDING", "RESCHEDULING"):
            wanted.update(_written(bundle["unit_resources"]) for bundle in group["bundles"] or [])
    for actor in client.rows("actors"):
        asked = actor["required_resources"] or {}
        if any("_group_" in name for name in asked):
            continue  # it waits with its placement group
        if actor["job_id"] == job["job_id"] and actor["state"] == "PENDING_CREATION":
            wanted[_written(asked)] += 1
    del wanted[_written({})]
    return [{"count": count, "resources": json.loads(resources)} for resources, count in wanted.items()]


def _written(resources: dict[str, float]) -> str:
    """As text; without the marks of nodes and groups, which are Ray's own."""
    plain = {name: value for name, value in sorted(resources.items()) if ":" not in name and "_group_" not in name}
    return json.dumps(plain)


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


# for a person


def told(found: dict[str, Any]) -> str:
    """A job's status in a few lines."""
    head = f"{found['id']}  {found['kind'] or 'job'}  {found['state']}"
    if found["exit_code"]:
        head += f" (exit code {found['exit_code']})"
    lines = [head]
    beat = found["heartbeat"]
    if beat is not None:
        lines += [f"  {line}" for line in _place(beat)]
        if found["state"] not in OVER:
            lines.append(f"  {_age(beat)}")
    elif found["state"] == "running" and found["connected"]:  # it beats from then on
        lines.append("  no heartbeat can be read: the driver's node is gone, or does not answer")
    elif found["state"] == "running":
        lines.append("  no heartbeat yet: the driver is starting")
    for wanted in found["waiting_for"]:
        lines.append(f"  waits for {_resources(wanted, found['usage'])}")
    if found["message"] and found["state"] in ("pending", "failed"):
        lines += [f"  {line}" for line in found["message"].strip().splitlines()[-8:]]
    return "\n".join(lines)


def _place(beat: Json) -> list[str]:
    lines = []
    if beat.get("run_id"):
        lines.append(f"MLflow run {beat['run_id']}  {beat.get('name', '')}")
    if trials := beat.get("trials"):
        counts = ", ".join(f"{count} {state}" for state, count in trials.items() if state != "of")
        lines.append(f"{trials['of']} trials: {counts or 'none has begun'}")
    elif "epochs" in beat:
        at = beat.get("at")
        within = f", at epoch {at['epoch']}, step {at['step']} of {at['steps']}" if at else ""
        metrics = "".join(f"  {name} {shown(name, value)}" for name, value in beat.get("metrics", {}).items())
        lines.append(f"{beat.get('epoch', 0)} of {beat['epochs']} epochs{within}{metrics}")
    if beat.get("said"):
        lines.append(str(beat["said"]))
    return lines


def _age(beat: Json) -> str:
    if beat["stale"]:
        return f"no heartbeat for {duration(beat['age'])}: this is old; the driver hangs, or its node is gone"
    still = f", no progress for {duration(beat['still'])}" if beat["still"] > STALE_SECONDS else ""
    return f"heartbeat {duration(beat['age'])} ago{still}"


def _resources(wanted: dict[str, Any], usage: dict[str, Sequence[float]]) -> str:
    each = ", ".join(f"{name} {value:g}" for name, value in wanted["resources"].items())
    free = [
        f"{all_of - taken:g} of {all_of:g} {name} are free"
        for name, (taken, all_of) in usage.items()
        if name in wanted["resources"] and math.isfinite(all_of)
    ]
    return f"{wanted['count']} x {{{each}}}" + (f"; {', '.join(free)}" if free else "")
