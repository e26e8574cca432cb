"""`phisam validate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ray_jobs.commands.arguments import add_set, add_traceback, command


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
  phisam validate --schema > phisam.schema.json      for your editor

Functions of your own, package.module:function, must be there and take what they will get; they are not called.""",
    )
    parser.add_argument("run", nargs="?", metavar="RECIPE_OR_FILE")
    add_set(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of run descriptions")
    add_traceback(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs import config
    from ray_jobs.errors import ConfigError
    from ray_jobs.section import is_own

    if arguments.schema:
        print(json.dumps(config.json_schema(), indent=2))
        return 0
    if not arguments.run:
        raise ConfigError("validate: name a recipe or a file, or ask for --schema")
    resolved = config.load(arguments.run, arguments.set)
    if any(is_own(section.name) for section in (resolved.data, resolved.model, resolved.optimizer.measure)):
        from ray_jobs.user_code import check_own  # torch: only for those who have functions of their own

        check_own(resolved)
    print(config.dump_yaml(resolved), end="")
    print(f"# strength s = lam rho^2 = {resolved.optimizer.strength:.4g}")
    return 0
