"""`phisam stop`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import add_head, command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "stop",
        run,
        "stop a job on a cluster",
        """\
Sends SIGTERM to a job's driver, and waits until it is over: MLflow then calls the run KILLED. A run goes on with
phisam submit train --resume RUN_ID, a sweep with phisam submit sweep --resume SWEEP_ID.""",
    )
    parser.add_argument("job", metavar="ID", help="a job's id, or the beginning of it")
    add_head(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.jobs import status
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient
    from ray_jobs.jobs.submit import stop

    client = JobsClient(find_head(arguments.address))
    job = status.find(client, arguments.job)
    if status.state(job) in status.OVER:
        print(f"{job['submission_id']} is over already: {status.state(job)}")
        return 0
    print(f"{job['submission_id']} {stop(client, job['submission_id'])}")
    return 0
