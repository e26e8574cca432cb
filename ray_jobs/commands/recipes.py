"""`phisam recipes`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "recipes",
        run,
        "list the runs and sweeps that come with phisam, or print one as YAML",
        """\
  phisam recipes
  phisam recipes mnist5k-frob > my-run.yaml          a file of your own to start from
  phisam recipes paper/cifar10-frob                  a cell of the paper's Table 2""",
    )
    parser.add_argument("name", nargs="?", metavar="NAME")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs import config, paper
    from ray_jobs.sweep.config import load_sweep, sweep_names, sweep_text

    if arguments.name:
        text = sweep_text if arguments.name in sweep_names() else config.recipe_text
        print(text(arguments.name), end="")
        return 0
    names = [name for name in config.recipe_names() if not name.startswith(paper.PREFIX)]
    for name in names:
        print(f"{name:{max(map(len, names))}}  {config.load(name).description}")
    print(f"\n{paper.OVERVIEW}\n\nSweeps, for `phisam sweep`:")
    for name in sweep_names():
        print(f"{name:{max(map(len, sweep_names()))}}  {load_sweep(name).description}")
    return 0
