"""`phisam list`."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ray_jobs.commands.arguments import add_head, command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(commands, "list", run, "list the jobs of a cluster", "The jobs that were submitted, newest first.")
    parser.add_argument("--json", action="store_true", help="for programs; docs/cluster.md describes it")
    add_head(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from rich.console import Console
    from rich.table import Table

    from ray_jobs.jobs import status
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient

    client = JobsClient(find_head(arguments.address))
    jobs = [status.summary(job) for job in status.ours(client.jobs())]
    if arguments.json:
        told = {"version": status.VERSION, "address": client.head.url, "time": client.now, "jobs": jobs}
        print(json.dumps(told, indent=1))
        return 0
    table = Table("id", "kind", "state", "submitted", box=None, pad_edge=False)
    for job in jobs:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["submitted"])) if job["submitted"] else "-"
        table.add_row(job["id"], job["kind"], job["state"], when)
    Console().print(table if jobs else f"no job at {client.head.url}", highlight=False)
    return 0
