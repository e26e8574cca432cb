"""`phisam sync`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import command, set_environment


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "sync",
        run,
        "tell MLflow what it missed while it was away",
        """\
Runs and sweeps write all that they tell MLflow to a journal first. This command tells MLflow what is in the journals
and not in MLflow: epochs, models, and how a run ended. A run whose driver was killed is told as KILLED.

  phisam sync                    all runs and sweeps in $PHISAM_HOME, else ./runs
  phisam sync 3f2a9c41 my-sweep

Nothing is told twice, and what is being trained is left to its own driver.""",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN_OR_SWEEP", help="id, the id's first eight letters, name or folder"
    )
    parser.add_argument("--verbose", action="store_true", help="show what MLflow says, and tracebacks")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    set_environment(None, arguments.verbose)
    from ray_jobs.sync import sync

    sync(arguments.runs, print)
    return 0
