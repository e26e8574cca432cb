"""`phisam validate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ray_jobs.commands.arguments import add_set, command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "validate",
        run,
        "check a run description and print it with every setting resolved",
        """\
  phisam validate my-run.yaml
  phisam validate mnist5k-frob --set optimizer.rho=0.05
  phisam validate --schema > phisam.schema.json      for your editor""",
    )
    parser.add_argument("run", nargs="?", metavar="RECIPE_OR_FILE")
    add_set(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of run descriptions")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs import config
    from ray_jobs.errors import ConfigError

    if arguments.schema:
        print(json.dumps(config.json_schema(), indent=2))
        return 0
    if not arguments.run:
        raise ConfigError("validate: name a recipe or a file, or ask for --schema")
    resolved = config.load(arguments.run, arguments.set)
    print(config.dump_yaml(resolved), end="")
    print(f"# strength s = lam rho^2 = {resolved.optimizer.strength:.4g}")
    return 0
