"""`phisam reproduce`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray_jobs.commands.arguments import add_set, command, number, positive, set_environment


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "reproduce",
        run,
        "train and draw a figure of the paper",
        """\
Makes a figure of the paper again, with its numbers beside it.

  phisam reproduce figure1                                        5,000 MNIST images, 3 seeds
  phisam reproduce figure1 --data mnist --set data.root=FOLDER    as in the paper; --set data.download=true fetches it
  phisam reproduce figure1 --quick                                two epochs, to see that it works
  phisam reproduce figure2

figure1 trains a network for each curve and seed, as runs of their own in MLflow. Stopped, it goes on where it was when
the same command is given again; what is finished is not trained twice.""",
    )
    parser.add_argument("figure", choices=["figure1", "figure2"])
    parser.add_argument("--data", choices=["mnist5k", "fashion_mnist", "mnist"], default="mnist5k")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--strengths", type=_numbers, metavar="S[,S]", help="of Frob-SAM: s = lam rho^2, right panel")
    parser.add_argument("--quick", action="store_true", help="two epochs on a tenth of the data, few probes")
    add_set(parser)
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    parser.add_argument("--address", metavar="ADDR", help="a Ray cluster (host:port, or auto); default: a local Ray")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and MLflow say, and tracebacks")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    set_environment(arguments.address, arguments.verbose)
    from rich.console import Console

    console = Console()
    if arguments.figure == "figure2":
        from ray_jobs.figures.figure2 import reproduce_figure2

        console.print("\n".join(["Written:", *map(str, reproduce_figure2(arguments.output))]), highlight=False)
        return 0
    from ray_jobs.figures import figure1, reproduce

    asked = reproduce.Asked(
        arguments.data,
        arguments.seeds,
        arguments.strengths or figure1.STRENGTHS,
        arguments.set,
        arguments.quick,
        arguments.output,
    )
    reproduce.reproduce_figure1(asked, arguments.address, arguments.verbose, console)
    return 0


def _numbers(text: str) -> list[float]:
    return [number(word) for word in text.split(",")]
