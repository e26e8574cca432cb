"""`phisam sweep`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ray_jobs.commands.arguments import add_set, command, own_name, positive, set_environment

if TYPE_CHECKING:
    from ray_jobs.sweep.config import SweepConfig


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "sweep",
        run,
        "train many runs over a space of settings, and find the best",
        """\
Trains the trials that a sweep file describes, each a run of its own, several at once where the cluster has place, stops
losers early if the file says so, and keeps the winner's model.

  phisam sweep small/table2 --dry-run          the trials, their number and what they cost
  phisam sweep my-sweep.yaml --register digits
  phisam sweep my-sweep.yaml --set search.trials=4 --max-concurrent 2
  phisam sweep --resume 3f2a9c41               goes on after a crash: same trials, same rungs, same winner

Metrics, models and the report lie in MLflow: one run for the sweep, one child for each trial.""",
    )
    parser.add_argument(
        "file", nargs="?", metavar="SWEEP_OR_FILE", help="a sweep that comes with phisam, or a YAML file"
    )
    add_set(parser)
    parser.add_argument(
        "--resume", metavar="SWEEP_ID", help="go on with a sweep: its id, or its name if that is unique"
    )
    parser.add_argument(
        "--max-concurrent", type=positive, metavar="N", help="trials at once; default: as the cluster has place"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials and their cost, train nothing")
    parser.add_argument(
        "--register", metavar="NAME", help="register the winner's model under this name, alias champion"
    )
    parser.add_argument("--address", metavar="ADDR", help="a Ray cluster (host:port, or auto); default: a local Ray")
    parser.add_argument(
        "--go-on", action="store_true", help="if the sweep was begun before, go on with it: for schedulers"
    )
    parser.add_argument("--verbose", action="store_true", help="show what Ray and MLflow say, and tracebacks")


def described(arguments: argparse.Namespace) -> SweepConfig | None:
    """The sweep that is asked for; None with --resume alone.

    Raises:
        ConfigError: a mistake in its description, or arguments that do not go together.
    """
    from ray_jobs.errors import ConfigError
    from ray_jobs.sweep.config import load_sweep

    if not arguments.file and not arguments.resume:
        raise ConfigError("sweep: name a sweep or a file, or a sweep that was begun with --resume SWEEP_ID")
    if arguments.set and not arguments.file:
        raise ConfigError("sweep --resume goes on with the sweep as it was: --set does not go with it")
    return load_sweep(arguments.file, arguments.set) if arguments.file else None


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.errors import ConfigError

    sweep = described(arguments)
    if arguments.dry_run:
        from ray_jobs.sweep.preview import preview

        if sweep is None:
            raise ConfigError("sweep --dry-run: name a sweep or a file")
        print(preview(sweep, arguments.max_concurrent or sweep.max_concurrent))
        return 0

    set_environment(arguments.address, arguments.verbose)
    from rich.console import Console

    from ray_jobs import cluster
    from ray_jobs.sweep import begun, variety
    from ray_jobs.sweep import run as sweeps
    from ray_jobs.tracking.sweep import check_model_name

    console = Console()
    if arguments.register is not None:
        check_model_name(arguments.register)
    found = None
    if arguments.go_on and sweep is not None:
        found = begun.begun_before(sweep)
        if found and found.over:
            print(f"sweep {found.folder.name} ({sweep.name}) is over: there is nothing to do")
            return 0
    if arguments.resume:
        found = begun.find(arguments.resume)
        if sweep is not None:
            begun.check_same(found, sweep)
    asked = found.sweep if found else sweep
    assert asked is not None
    variety.check_one_winner(asked, arguments.register)
    at_once = arguments.max_concurrent or asked.max_concurrent
    with cluster.connected(arguments.address, variety.cpus_at_once(asked, at_once), arguments.verbose):
        if found:
            sweeps.resume(found, console, at_once, arguments.register)
        else:
            sweeps.start(asked, console, at_once, arguments.register)
    console.print(f"\nTrials, curves and the report: {own_name()} ui", highlight=False)
    return 0
