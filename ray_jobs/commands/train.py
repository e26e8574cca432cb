"""`phisam train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ray_jobs.commands.arguments import add_set, command, own_name, positive, set_environment

if TYPE_CHECKING:
    from ray_jobs.config import RunConfig
    from ray_jobs.data import Dataset


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "train",
        run,
        "train one run, or several one after the other",
        """\
Trains the runs that recipes or YAML files describe, on a Ray of this machine or on a cluster, and ends with one table.

  phisam train mnist5k-frob
  phisam train mnist5k-sgd mnist5k-frob --num-workers 4
  phisam train my-run.yaml --set optimizer.rho=0.05 --set training.epochs=5
  phisam train mnist5k-frob --address 127.0.0.1:6379
  phisam train --resume 3f2a9c41           goes on from the newest checkpoint, to the same weights, bit for bit

What a step costs: n_samples + 1 gradient evaluations, shared by the workers. What acts: s = lam rho^2.
Metrics, models and checkpoints lie in $PHISAM_HOME, else ./runs; MLFLOW_TRACKING_URI names another MLflow.""",
    )
    parser.add_argument("runs", nargs="*", metavar="RECIPE_OR_FILE", help="`phisam recipes` lists the recipes")
    add_set(parser)
    parser.add_argument("--num-workers", type=positive, metavar="N", help="workers, in place of scaling.num_workers")
    parser.add_argument("--address", metavar="ADDR", help="a Ray cluster (host:port, or auto); default: a local Ray")
    parser.add_argument("--resume", metavar="RUN_ID", help="go on with a run: its id, or its name if that is unique")
    parser.add_argument(
        "--key", metavar="KEY", help="begin the run, or go on with the one that was begun with this key: for schedulers"
    )
    parser.add_argument("--verbose", action="store_true", help="show what Ray and MLflow say, and tracebacks")


def described(arguments: argparse.Namespace) -> list[RunConfig]:
    """The runs that are asked for; none with --resume.

    Raises:
        ConfigError: a mistake in a description, or arguments that do not go together.
    """
    from ray_jobs import config
    from ray_jobs.errors import ConfigError

    if bool(arguments.runs) == bool(arguments.resume):
        raise ConfigError("train: name a recipe or a file, or an unfinished run with --resume RUN_ID")
    if arguments.resume and (arguments.set or arguments.num_workers):
        raise ConfigError("train --resume goes on with the run as it was: --set and --num-workers do not go with it")
    if arguments.key and len(arguments.runs) != 1:
        raise ConfigError("train --key goes with one recipe or file")
    workers = [f"scaling.num_workers={arguments.num_workers}"] if arguments.num_workers else []
    return [config.load(name, [*arguments.set, *workers]) for name in arguments.runs]


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    configs = described(arguments)  # all, before the first starts

    set_environment(arguments.address, arguments.verbose)
    from rich.console import Console

    from ray_jobs import cluster

    going_on, run_id = None, arguments.resume
    if arguments.key:
        from ray_jobs import train

        configs = [train.with_key(configs[0], arguments.key)]
        run_id = train.begun(configs[0])
        if run_id and train.is_finished(configs[0], run_id):
            print(f"run {run_id} with the key {arguments.key} is finished: there is nothing to do")
            return 0
    if run_id:
        from ray_jobs import train

        going_on = train.unfinished(run_id)
        configs = [going_on.config]
    most_workers = max(config.scaling.most_workers for config in configs)

    def prepared() -> Dataset:
        from ray_jobs import train  # torch, Ray Train and MLflow: six seconds of imports, beside the start of Ray

        return train.prepared(configs[0])

    console = Console()
    with cluster.connected(arguments.address, most_workers, arguments.verbose, prepared) as dataset:
        from ray_jobs import train
        from ray_jobs.progress import summary_table

        summaries = []
        try:
            if going_on:
                summaries.append(train.resume(going_on, console, dataset))
            else:
                for config in configs:
                    summaries.append(train.train(config, console, dataset))
                    dataset = None
        finally:  # a run that fails takes nothing from those before it
            if summaries:
                console.print(summary_table(summaries))
                console.print(f"\nCurves, models and comparison: {own_name()} ui", highlight=False)
    return 0
