"""The `phisam` command: what it is asked for, and how mistakes and failures end it. Each command is a module."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from ray_jobs.commands import (
    bench,
    cluster,
    compare,
    doctor,
    jobs_list,
    landscape,
    logs,
    plan,
    recipes,
    render,
    report,
    reproduce,
    sharpness,
    status,
    stop,
    submit,
    sweep,
    sync,
    train,
    ui,
    validate,
)
from ray_jobs.errors import ConfigError, RunError, Terminated
from ray_jobs.redaction import redacted_output

# In the order that --help tells them.
COMMANDS = (
    *(train, sweep, compare, report, sharpness, landscape, reproduce, validate, recipes, plan, bench, render, ui),
    *(sync, cluster, submit, status, logs, stop, jobs_list, doctor),
)

DESCRIPTION = "Train with (phi, psi, mu) sharpness-aware optimizers on Ray, tracked in MLflow."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run failed, 2 a mistake in what was asked for, 130 interrupted, 143 told to end."""
    try:
        with redacted_output():  # what was mistyped may be a secret too
            return _done(_parser().parse_args(argv))
    except BrokenPipeError:  # whoever reads has read enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so when it flushes at its end
        return 0


def _done(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.command(arguments))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("phisam", "ray_jobs"):
            return _defect()
        print(f"phisam: the package {error.name} is missing: pip install 'phisam[service]'", file=sys.stderr)
        return 2
    except ConfigError as error:
        if getattr(arguments, "verbose", False) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)  # of what a user's own function raised
        print(f"phisam: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
        return 2
    except RunError as error:
        if getattr(arguments, "verbose", False):
            return _defect()
        print("\n".join([f"phisam: {error}", *_notes(error)]), file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        print("\n".join([f"phisam: {str(error) or 'interrupted'}", *_notes(error)]), file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except Exception:
        return _defect()


def _defect() -> int:
    """All that there is to say of an error, said here: Python's own way would print secrets with it."""
    traceback.print_exc()
    return 1


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
