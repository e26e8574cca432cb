"""`phisam logs`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ray_jobs.commands.arguments import add_head, command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "logs",
        run,
        "print what a job has printed",
        """\
Prints a job's output; with -f also what it prints from now on, until it is over. A stream that breaks is connected
again. Ctrl-C ends the printing, not the job.""",
    )
    parser.add_argument("job", metavar="ID", help="a job's id, or the beginning of it")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job is over")
    add_head(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 1 where -f saw the job fail."""
    from ray_jobs.jobs import logs, status
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient

    client = JobsClient(find_head(arguments.address))
    job = status.find(client, arguments.job)
    job_id = job["submission_id"]

    part = b""

    def write(text: bytes) -> None:
        """Whole lines: what is printed is looked through for secrets, and a letter may come in two parts."""
        nonlocal part
        lines, end, part = (part + text).rpartition(b"\n")
        print((lines + end).decode(errors="replace"), end="", flush=True)

    def say(line: str) -> None:
        print(f"phisam: {line}", file=sys.stderr)

    if not arguments.follow:
        output = client.output(job)
        write(output or b"")
        write(b"\n" if part else b"")
        if output is None and job["driver_node_id"]:
            say(logs.unread(job))
        return 0
    ended = logs.follow(client, job_id, write, say)
    write(b"\n" if part else b"")
    say(f"job {job_id} {ended}")
    return int(ended == "failed")
