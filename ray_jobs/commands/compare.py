"""`phisam compare`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import command, number, words


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "compare",
        run,
        "compare runs or a sweep's settings: mean and interval over seeds, at equal budgets",
        """\
Groups runs that differ by their seed alone, and prints mean and 95 % interval of each group, best first.

  phisam compare mnist5k-sgd mnist5k-frob              all runs of these names
  phisam compare my-sweep --by measure --baseline sgd  each measure at its best, tested against SGD seed by seed
  phisam compare my-sweep --by measure --at gradient_evaluations
  phisam compare 3f2a9c41 8d01b7aa --metric loss/test --at seconds --budget 60
  phisam compare my-sweep --format markdown > table.md

Every run is read at its last epoch within the budget; without --budget that is what the finished run with the least of
it has. A run that was stopped, failed or is not done counts only if it came as far as that. --by KEY has a row for each
value of a parameter: its best setting by the metric on validation data. What the columns mean: docs/compare.md.""",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_SWEEP", help="name, id, or an id's first eight letters")
    parser.add_argument(
        "--at",
        choices=["epochs", "gradient_evaluations", "seconds"],
        default="epochs",
        help="what all runs have the same of (default: epochs); seconds: of training",
    )
    parser.add_argument("--budget", type=number, metavar="X", help="how much of it")
    parser.add_argument("--metric", default="accuracy/test", help="what is compared (default: accuracy/test)")
    parser.add_argument(
        "--by", type=words, default=[], metavar="KEY,...", help="one row for each value, such as measure"
    )
    parser.add_argument("--baseline", metavar="NAME", help="label, measure or run that the others are tested against")
    parser.add_argument("--format", choices=["table", "markdown", "csv", "latex"], default="table")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.commands.arguments import set_environment

    set_environment(None, verbose=False)
    from rich.console import Console

    from ray_jobs.compare import compare
    from ray_jobs.compare_text import TEXTS, print_table
    from ray_jobs.config import TrackingConfig
    from ray_jobs.paths import runs_folder
    from ray_jobs.results import AXES, selection_metric
    from ray_jobs.tracking import tracking_uri
    from ray_jobs.tracking.read import select

    uri = tracking_uri(TrackingConfig(), runs_folder())
    records = select(uri, arguments.runs, [arguments.metric, selection_metric(arguments.metric), *AXES])
    done = compare(
        records,
        metric=arguments.metric,
        axis=arguments.at,
        budget=arguments.budget,
        by=arguments.by,
        baseline=arguments.baseline,
    )
    if arguments.format == "table":
        print_table(done, Console())
    else:
        print(TEXTS[arguments.format](done))
    return 0
