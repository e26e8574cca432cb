"""A command -> what travels -> a job on the cluster. Whatever is wrong is said before anything is sent."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import phisam
from ray_jobs import source
from ray_jobs.errors import RunError
from ray_jobs.jobs.client import JobsClient
from ray_jobs.jobs.package import module_files, own_modules, packed
from ray_jobs.jobs.status import OVER, state
from ray_jobs.redaction import redacted

JOB = "job.json"
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"  # from SIGTERM to SIGKILL; Ray's own is 3 s
END_SECONDS = 40  # beside the grace in which a run saves itself: MLflow is told how it ended
UNKNOWN_SECONDS = 20.0  # the grace of what goes on with a description of its own
# Ray's own runtime environment gives the folder of the package to the driver and to all its workers.
ENTRYPOINT = "python -m ray_jobs.jobs.driver"


@dataclass(frozen=True)
class Command:
    """kind: train, sweep or sharpness. arguments: of `phisam`, where descriptions stand by their names in the package.

    descriptions: file name -> text. settings: the same as plain values, where own modules are looked for.
    """

    kind: str
    name: str
    arguments: list[str]
    descriptions: Mapping[str, str]
    settings: list[dict[str, Any]] = field(default_factory=list)


def submit(command: Command, client: JobsClient, home: str | None) -> str:
    """Sends a job; its id.

    Args:
        home: the cluster's folder for runs, in place of its PHISAM_HOME.

    Raises:
        ConfigError: a module that it names is missing or too large.
        RunError: the cluster does not take it.
    """
    job_id = new_id(command.name)
    package = packed(package_files(command, job_id))
    variables = {GRACE: str(grace_seconds(command)), **({"PHISAM_HOME": home} if home else {})}
    uri = client.upload(package)
    environment = {"working_dir": uri, "env_vars": variables}
    client.submit(job_id, ENTRYPOINT, environment, {"phisam": command.kind, "name": command.name})
    return job_id


def stop(client: JobsClient, job_id: str) -> str:
    """Stops a job and waits until it is over; how it ended.

    Raises:
        RunError: it did not end.
    """
    given = (client.job(job_id).get("runtime_env") or {}).get("env_vars") or {}
    patience = int(given.get(GRACE, END_SECONDS)) + 30
    client.stop(job_id)
    deadline = time.monotonic() + patience
    while (ended := state(client.job(job_id))) not in OVER:
        if time.monotonic() > deadline:
            raise RunError(f"job {job_id} was asked to stop {patience} s ago and is still {ended}")
        time.sleep(0.5)
    return ended


def grace_seconds(command: Command) -> int:
    """From SIGTERM to SIGKILL, for the run that takes longest to save itself."""
    graces = [run["checkpoint"]["grace_seconds"] for run in command.settings if "checkpoint" in run]
    return math.ceil(max(graces, default=UNKNOWN_SECONDS)) + END_SECONDS


def package_files(command: Command, job_id: str) -> dict[str, bytes]:
    """All that travels: path in the package -> content."""
    tags, changes = source.taken()
    modules = sorted({module for settings in command.settings for module in own_modules(settings)})
    job = {"version": phisam.__version__, "id": job_id, "kind": command.kind, "arguments": command.arguments}
    texts = {JOB: json.dumps(job, indent=1), source.NOTE: json.dumps(tags, indent=1), **command.descriptions}
    if changes:
        texts[source.DIFF] = redacted(changes)
    return {**module_files(modules), **{name: text.encode() for name, text in texts.items()}}


def new_id(name: str) -> str:
    """digits-frob-3f2a9c"""
    words = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return f"{words or 'job'}-{secrets.token_hex(3)}"
