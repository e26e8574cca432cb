"""What the commands share: how they and their values are declared, and what Ray and MLflow must be told first."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], summary: str, text: str
) -> argparse.ArgumentParser:
    """A command whose `run` is `function`; `text` is printed as it stands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=function)
    return parser


def add_set(parser: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`, any number of times."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, e.g. optimizer.rho=0.05"
    )


def add_head(parser: argparse.ArgumentParser, dest: str = "address") -> None:
    """`--address` of a cluster's dashboard, for the commands that look at jobs."""
    parser.add_argument(
        "--address",
        dest=dest,
        metavar="URL",
        help="a cluster's dashboard, such as http://127.0.0.1:8265; default: RAY_API_SERVER_ADDRESS, else the one that "
        "phisam cluster start began",
    )


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """`--verbose`, of a command that has nothing else to say more of."""
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error in your own functions")


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def words(text: str) -> list[str]:
    """a,b,c"""
    return [word for word in text.split(",") if word]


def counts(text: str) -> list[int]:
    """1,2,4"""
    return [positive(word) for word in text.split(",")]


def number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def port(text: str) -> int:
    """A TCP port."""
    value = positive(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: they end at 65535")
    return value


def own_name() -> str:
    """How this command was called, so that what it tells to type works: phisam, or .venv/bin/phisam."""
    called = sys.argv[0]
    if os.path.basename(called) != "phisam" or shutil.which("phisam") == called:
        return "phisam"
    return os.path.relpath(called)


def set_environment(address: str | None, verbose: bool) -> None:
    """What Ray and MLflow read when they are imported."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray Train looks for reports every 2 s otherwise
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is down is said after seconds, not four minutes
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds, each of the three times: one that hangs is down too
    }
    if address is None:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every socket of a local Ray on 127.0.0.1
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process a run; nobody takes this machine away
    if not verbose:
        settings["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"  # what raylets say of dead workers; progress tells it in a line
        settings |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "ALEMBIC_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
