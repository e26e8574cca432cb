"""The `phisam` command: what it is asked for, and how mistakes and failures end it. Each command is a module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ray_jobs.commands import (
    bench,
    compare,
    landscape,
    plan,
    recipes,
    render,
    report,
    reproduce,
    sharpness,
    sweep,
    train,
    ui,
    validate,
)

# In the order that --help tells them.
COMMANDS = (train, sweep, compare, report, sharpness, landscape, reproduce, validate, recipes, plan, bench, render, ui)

DESCRIPTION = "Train with (phi, psi, mu) sharpness-aware optimizers on Ray, tracked in MLflow."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run failed, 2 a mistake in what was asked for, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        from ray_jobs.errors import ConfigError, RunError

        return int(arguments.command(arguments))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("phisam", "ray_jobs"):
            raise
        print(f"phisam: the package {error.name} is missing: pip install 'phisam[service]'", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(f"phisam: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
        return 2
    except RunError as error:
        if getattr(arguments, "verbose", False):
            raise
        print("\n".join([f"phisam: {error}", *_notes(error)]), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("\n".join(["phisam: interrupted", *_notes(error)]), file=sys.stderr)
        return 130


def _notes(error: BaseException) -> list[str]:
    """What else there is to say of an error, such as how to go on."""
    return [f"  {note}" for note in getattr(error, "__notes__", [])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phisam",
        description=DESCRIPTION,
        epilog="A first run: phisam train mnist5k-sgd mnist5k-frob; then: phisam ui",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
