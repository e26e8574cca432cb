"""Who is asked, and where: a cluster by a job on it, or the Ray of this machine that `phisam train` would start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ray_jobs.doctor import here
from ray_jobs.doctor.findings import Finding, failed
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.jobs import heartbeat, local
from ray_jobs.jobs.address import find_head
from ray_jobs.jobs.client import JobsClient, UnreachableError
from ray_jobs.jobs.status import OVER, read_heartbeat, state
from ray_jobs.jobs.submit import Command, stop, submit

SECONDS = 300.0


def examined(address: str | None, home: str | None, say: Callable[[str], object]) -> tuple[str, list[Finding]]:
    """The cluster's address as it was found, and the findings.

    Args:
        address: of a dashboard; "auto" on the cluster itself; None: RAY_API_SERVER_ADDRESS, else the cluster that
            `phisam cluster start` began, else a Ray that is started for this.
        home: as for `phisam submit`.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or None
    if address == "auto" or (address is None and local.running() is None):
        return address or "this machine", _probed(address)
    try:
        client = JobsClient(find_head(address))
    except ConfigError as error:
        return address or "", [failed("address and token", str(error))]
    found = here.reached(client)
    if any(finding.verdict == "fail" for finding in found):
        return client.head.url, found
    return client.head.url, [*found, *_by_job(client, home, say)]


def _probed(address: str | None) -> list[Finding]:
    from ray_jobs import cluster
    from ray_jobs.doctor.probe import probed

    try:
        with cluster.connected(address, 2, verbose=False):
            found = probed(cluster=address is not None)
            heartbeat.tell_findings([vars(finding) for finding in found])
            return found
    except (ConfigError, RunError) as error:
        return [failed("Ray", str(error))]


def _by_job(client: JobsClient, home: str | None, say: Callable[[str], object]) -> list[Finding]:
    """What a job on the cluster finds, from its last heartbeat."""
    try:
        job_id = submit(Command("doctor", "doctor", [], {}), client, home)
        say(f"job {job_id} looks at the cluster")
        deadline = time.monotonic() + SECONDS
        while state(job := client.job(job_id)) not in OVER:
            if time.monotonic() > deadline:
                stop(client, job_id)
                told = f"job {job_id} was not over in {SECONDS:g} s: {job['message'] or state(job)}"
                return [failed("job", told, "phisam logs tells what it printed; is the cluster full?")]
            time.sleep(0.5)
        left = (read_heartbeat(client, job) or {}).get("findings")
    except (RunError, UnreachableError) as error:
        return [failed("job", str(error))]
    if not left:
        why = (job["message"] or "").strip().splitlines()
        remedy = "the cluster needs phisam, in the Python that `python` is on its PATH"
        return [failed("job", f"job {job_id} {state(job)}: {why[-1] if why else 'it left no word'}", remedy)]
    return [Finding("job", "pass", f"{job_id} ran"), *(Finding(**finding) for finding in left)]
