"""`phisam landscape`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ray_jobs.commands.arguments import add_set, command, number, positive, set_environment


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "landscape",
        run,
        "draw the loss around a model, along a line and over a plane",
        """\
Evaluates the training loss on a grid around the weights of a run, and draws it: contours, a surface, two lines.

  phisam landscape 3f2a9c41
  phisam landscape 3f2a9c41 --directions eigenvectors --radius 1 --num-workers 2
  phisam landscape models:/m-... --dimensions 1 --points 201

Random directions are filter-normalised: radius 1 moves each filter by its own length. Eigenvectors have length 1. The
pictures and the points are logged to the run. Points are kept as they come: the same command again goes on. What the
pictures show: docs/landscape.md.""",
    )
    parser.add_argument("model", metavar="RUN_ID|MODEL_URI|CHECKPOINT", help="what to look around")
    parser.add_argument("--directions", choices=["random", "eigenvectors"], default="random")
    parser.add_argument("--dimensions", type=int, choices=[1, 2], default=2, help="a line or a plane (default: 2)")
    parser.add_argument("--points", type=positive, default=41, metavar="P", help="along each direction (default: 41)")
    parser.add_argument("--radius", type=number, default=1.0, metavar="R", help="of the grid (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of random directions (default: 0)")
    parser.add_argument(
        "--examples", type=positive, default=1280, metavar="N", help="training examples (default: 1280)"
    )
    parser.add_argument("--which", choices=["last", "best"], default="last", help="of a run's two models")
    parser.add_argument("--run", metavar="RECIPE_OR_FILE", help="the description to read weights with that have none")
    add_set(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: landscapes/ in the runs folder")
    parser.add_argument("--num-workers", type=positive, default=1, metavar="N", help="processes on a Ray (default: 1)")
    parser.add_argument("--address", metavar="ADDR", help="a Ray cluster (host:port, or auto); default: a local Ray")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and MLflow say, and tracebacks")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.errors import ConfigError

    if arguments.set and not arguments.run:
        raise ConfigError("landscape: --set changes the description that --run names; name one")
    if arguments.points < 2:
        raise ConfigError("landscape: --points must be 2 or more; an odd number has the model in its middle")
    set_environment(arguments.address, arguments.verbose)
    from rich.console import Console

    from ray_jobs import cluster, config
    from ray_jobs.figures.landscape import landscape_of
    from ray_jobs.figures.slice_file import Slice
    from ray_jobs.tracking.models import find_model

    described = config.load(arguments.run, arguments.set) if arguments.run else None
    found = find_model(arguments.model, arguments.which, described)
    wanted = Slice(arguments.directions, arguments.dimensions, arguments.points, arguments.radius, arguments.seed)
    workers = arguments.num_workers
    with cluster.connected(arguments.address, workers, arguments.verbose) if workers > 1 else nullcontext():
        landscape_of(found, wanted, arguments.examples, arguments.output, workers, Console())
    return 0
