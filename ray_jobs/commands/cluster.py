"""`phisam cluster`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import command, own_name, port, positive, set_environment


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "cluster",
        run,
        "begin or end a Ray cluster of this machine",
        """\
A Ray of this machine that takes jobs: every socket on 127.0.0.1, its token in ~/.ray/auth_token, mode 600.

  phisam cluster start
  phisam submit train mnist5k-frob        finds it by itself
  phisam cluster stop                     stops its jobs, then ends what start began, and no other Ray""",
    )
    parser.add_argument("what", choices=["start", "stop"])
    parser.add_argument("--port", type=port, default=8265, help="of the dashboard (default: 8265)")
    parser.add_argument("--num-cpus", type=positive, metavar="N", help="CPUs to offer; default: the machine's")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    return _start(arguments) if arguments.what == "start" else _stop()


def _start(arguments: argparse.Namespace) -> int:
    from ray_jobs.jobs import local
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient
    from ray_jobs.paths import runs_folder

    set_environment(None, verbose=False)
    runs = runs_folder()
    runs.mkdir(parents=True, exist_ok=True)
    found = local.start(arguments.port, runs, arguments.num_cpus, lambda url: JobsClient(find_head(url)).ready())
    print(f"cluster at {found.url}; its jobs leave their runs in {found.runs}, Ray its logs in {found.folder}")
    print(f"\nSend it a run: {own_name()} submit train mnist5k-frob; end it: {own_name()} cluster stop")
    return 0


def _stop() -> int:
    from ray_jobs.errors import RunError
    from ray_jobs.jobs import local, status
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient
    from ray_jobs.jobs.submit import stop

    found = local.running()
    if found is None:
        print("no cluster that phisam cluster start began is running")
        return 0
    try:
        client = JobsClient(find_head(found.url))
        for job in client.jobs():
            if status.state(job) not in status.OVER:
                print(f"{job['submission_id']} {stop(client, job['submission_id'])}", flush=True)
    except RunError as error:
        print(f"its jobs could not be stopped: {error}")
    local.end(found)
    print(f"the cluster at {found.url} ended")
    return 0
