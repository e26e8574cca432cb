"""`phisam status`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ray_jobs.commands.arguments import add_head, command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "status",
        run,
        "tell how jobs stand on a cluster",
        """\
Tells of one job, else of all that are not over, else of the newest: its state, its driver's last word (place, metrics,
MLflow run), and what it waits for. From the cluster's own record and the driver's heartbeat, never from the output.""",
    )
    parser.add_argument("job", nargs="?", metavar="ID", help="a job's id, or the beginning of it")
    parser.add_argument("--json", action="store_true", help="for programs; docs/cluster.md describes it")
    add_head(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.jobs import status
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient

    client = JobsClient(find_head(arguments.address))
    if arguments.job:
        jobs = [status.find(client, arguments.job)]
    else:
        ours = status.ours(client.jobs())
        jobs = [job for job in ours if status.state(job) not in status.OVER] or ours[:1]
    found = [status.status(client, job) for job in jobs]
    if arguments.json:
        told = {"version": status.VERSION, "address": client.head.url, "time": client.now, "jobs": found}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(map(status.told, found)) or f"no job at {client.head.url}")
    return 0
