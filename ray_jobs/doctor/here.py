"""What this machine can tell of a cluster before anything runs there."""

from __future__ import annotations

import importlib.metadata
import time
from urllib.parse import urlsplit

from ray_jobs.doctor import findings
from ray_jobs.doctor.findings import Finding, failed
from ray_jobs.errors import RunError
from ray_jobs.jobs.client import JobsClient


def reached(client: JobsClient) -> list[Finding]:
    """Whether the cluster answers, takes the token, and has this machine's Ray and time."""
    head = client.head
    try:
        theirs = client.version()
        offset = (client.now - time.time(), 1.0)  # HTTP tells whole seconds
    except RunError as error:
        return [failed("cluster", str(error))]
    found = [Finding("cluster", "pass", f"{head.url} answers")]
    if not head.loopback and urlsplit(head.url).scheme == "http":
        told = f"the token travels to {head.url} unencrypted"
        remedy = "reach it by https, or through a tunnel: ssh -L 8265:127.0.0.1:8265 HEAD"
        found.append(Finding("encryption", "warn", told, remedy))
    try:
        ours = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        ours = theirs  # whoever only submits needs none
    if ours != theirs:
        remedy = f"jobs run with the cluster's; phisam train --address needs the same here: pip install 'ray=={theirs}'"
        found.append(Finding("Ray of this machine", "warn", f"{ours} here, {theirs} on the cluster", remedy))
    skew = findings.clocks({"the head, seen from here,": offset})
    return found if skew.verdict == "pass" else [*found, skew]
