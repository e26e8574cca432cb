"""`phisam sharpness`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ray_jobs.commands.arguments import add_set, command, positive, set_environment, words


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "sharpness",
        run,
        "measure the Hessian of a trained model",
        """\
Measures the Hessian of a model's training loss, prints each number with its standard error, and logs it to the model's
run at the model's epoch.

  phisam sharpness 3f2a9c41
  phisam sharpness models:/digits@champion --measures trace,top_eigenvalues
  phisam sharpness runs/3f2a.../checkpoint_1400 --num-workers 4 --budget 60s
  phisam sharpness 3f2a9c41 --measures spectral_density          CSV and picture, into the run's artifacts
  phisam sharpness weights.pt --run mnist5k-frob                  a state_dict, and the description of its network

Measures: frobenius_squared, trace, top_eigenvalues, log_determinant, ggn_log_determinant, spectral_density, and
measure: S(x) of Definition 1 with the run's own (phi, psi, mu), or another by --set optimizer.measure=NAME.
Nothing in a file is executed: weights are read as tensors alone.""",
    )
    parser.add_argument("model", metavar="RUN_ID|MODEL_URI|CHECKPOINT", help="a run, a models:/ URI, a folder or file")
    parser.add_argument("--measures", type=words, metavar="NAME[,NAME]", help="default: the run's, else the first two")
    parser.add_argument("--num-workers", type=positive, default=1, metavar="N", help="Ray Train workers (default: 1)")
    parser.add_argument("--probes", type=positive, metavar="N", help="random vectors (default: 100)")
    parser.add_argument(
        "--lanczos-probes", type=positive, metavar="N", help="of determinants and spectra (default: 10)"
    )
    parser.add_argument("--examples", type=positive, metavar="N", help="training examples (default: 1280)")
    parser.add_argument("--top-k", type=positive, metavar="K", help="eigenvalues (default: 1)")
    parser.add_argument("--budget", type=_seconds, metavar="TIME", help="60s or 5m: choose the number of probes by it")
    parser.add_argument("--model", choices=["last", "best"], default="last", dest="which", help="of a run's models")
    parser.add_argument(
        "--data", metavar="NAME", help="another data set than the run's: short for --set data.name=NAME"
    )
    parser.add_argument(
        "--run", metavar="RECIPE_OR_FILE", help="the description of the network, if nothing else has it"
    )
    add_set(parser)
    parser.add_argument("--address", metavar="ADDR", help="a Ray cluster (host:port, or auto); default: a local Ray")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and MLflow say, and tracebacks")


def check(arguments: argparse.Namespace) -> None:
    """Arguments that do not go together.

    Raises:
        ConfigError: there are such.
    """
    from ray_jobs.errors import ConfigError

    if arguments.budget and arguments.probes:
        raise ConfigError("sharpness: --budget chooses the number of probes, so --probes does not go with it")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    check(arguments)
    set_environment(arguments.address, arguments.verbose)
    from rich.console import Console

    from ray_jobs.sharpness.command import Asked, measure_model

    keys = ("measures", "probes", "lanczos_probes", "examples", "top_k")
    settings = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    data = [f"data.name={arguments.data}"] if arguments.data else []
    asked = Asked(
        arguments.model,
        arguments.which,
        arguments.run,
        [*data, *arguments.set],
        settings,
        arguments.budget,
        arguments.num_workers,
        arguments.address,
        arguments.verbose,
    )
    measure_model(asked, Console())
    return 0


def _seconds(text: str) -> float:
    """60s, 5m, 1h or 60."""
    told = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    value = float(told[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[told[2]] if told else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 60s or 5m")
    return value
