"""The `phisam` command.

    phisam train mnist5k-sgd mnist5k-frob      two runs, one table
    phisam ui                                  MLflow's pages for them

Modules that take seconds to import (torch, ray, mlflow) are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    _add_train(commands)
    _add_validate(commands)
    _add_recipes(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_ui(commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
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
    _add_set(parser)
    parser.add_argument("--num-workers", type=_positive, metavar="N", help="workers, in place of scaling.num_workers")
    parser.add_argument("--address", metavar="ADDR", help="a Ray cluster (host:port, or auto); default: a local Ray")
    parser.add_argument("--resume", metavar="RUN_ID", help="go on with a run: its id, or its name if that is unique")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and MLflow say, and tracebacks")


def _add_validate(commands: Any) -> None:
    parser = _command(
        commands,
        "validate",
        _validate,
        "check a run description and print it with every setting resolved",
        """\
  phisam validate my-run.yaml
  phisam validate mnist5k-frob --set optimizer.rho=0.05
  phisam validate --schema > phisam.schema.json      for your editor""",
    )
    parser.add_argument("run", nargs="?", metavar="RECIPE_OR_FILE")
    _add_set(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of run descriptions")


def _add_recipes(commands: Any) -> None:
    parser = _command(
        commands,
        "recipes",
        _recipes,
        "list the runs that come with phisam, or print one as YAML",
        """\
  phisam recipes
  phisam recipes mnist5k-frob > my-run.yaml          a file of your own to start from
  phisam recipes paper/cifar10-frob                  a cell of the paper's Table 2""",
    )
    parser.add_argument("name", nargs="?", metavar="NAME")


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "measure what a step costs on this machine, beside the limit and other packages",
        """\
Times one step of SGD, PhiSAM and their peers in turns, in about five minutes, and prints Markdown tables.

  phisam bench
  phisam bench --model resnet18 --n 1,3 --workers 2 --csv speed.csv --plot speed.png
  phisam bench --model torchvision/resnet50 --device cuda --batch 64

Let nothing else run meanwhile. What the columns mean: docs/speed.md.""",
    )
    parser.add_argument(
        "--model", type=_words, default=["mlp", "resnet18"], metavar="NAME,...", help="as in run descriptions"
    )
    parser.add_argument("--n", type=_counts, default=[1, 2, 4, 8], metavar="N,...", help="n_samples (default: 1,2,4,8)")
    parser.add_argument("--workers", type=_counts, metavar="W,...", help="processes, or GPUs (default: 1,2)")
    parser.add_argument("--batch", type=_positive, help="examples that the workers share, in place of a model's usual")
    parser.add_argument(
        "--measure",
        choices=["trace", "frobenius", "determinant", "log_determinant"],
        help="default: frobenius, and trace for n = 1",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=_positive, default=300, help="about what it may take (default: 300)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write ratios against n: .png, .svg or .pdf")
    parser.add_argument("--first-step", action="store_true", help="also time `phisam train` up to its first epoch")


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "predict a step's time, memory and traffic on many GPUs, and the best S",
        """\
  phisam plan cifar10-frob --gpus 64
  phisam plan my-run.yaml --gpus 8,64,512 --n 1,3,7 --link ethernet
  phisam plan my-run.yaml --gpus 64 --seconds-per-evaluation 1.9      a time that you measured
  phisam plan my-run.yaml --gpus 64 --parameters 1e9 --flops-per-example 1.2e13      in place of the model

S is the number of ranks that share the points of a step. One W and one n: all S; several: the best of each. Nothing is
started and no data is read. How it is computed, and how far it is from measured steps: docs/plan.md.""",
    )
    parser.add_argument("run", metavar="RECIPE_OR_FILE")
    parser.add_argument("--gpus", type=_counts, required=True, metavar="W[,W]")
    parser.add_argument("--n", type=_counts, default=[], metavar="n[,n]", help="in place of optimizer.n_samples")
    parser.add_argument("--link", default="nvlink", metavar="NAME", help="nvlink (default), ethernet, or gloo")
    parser.add_argument("--tflops", type=_number, metavar="T", help="peak of a GPU in the run's precision")
    parser.add_argument("--utilisation", type=_number, metavar="U", help="part of it that is reached, e.g. 0.3")
    parser.add_argument("--gbps", type=_number, metavar="G", help="Gb/s between nodes, of a node's adapters together")
    parser.add_argument("--gpus-per-node", type=_positive, metavar="N")
    parser.add_argument("--memory-gb", type=_number, metavar="GB", help="of a GPU")
    parser.add_argument("--seconds-per-evaluation", type=_number, metavar="S", help="of the global batch on one GPU")
    parser.add_argument("--parameters", type=_number, metavar="D")
    parser.add_argument("--flops-per-example", type=_number, metavar="F", help="of a forward and a backward")
    parser.add_argument("--activations-gb", type=_number, metavar="GB", help="with --parameters: of one example")
    _add_set(parser)


def _add_ui(commands: Any) -> None:
    parser = _command(
        commands,
        "ui",
        _ui,
        "open MLflow's pages over the runs of this folder",
        """\
Starts MLflow's server on 127.0.0.1 over $PHISAM_HOME, else ./runs, until Ctrl-C.""",
    )
    parser.add_argument("--port", type=_port, default=5000)


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], summary: str, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=function)
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, e.g. optimizer.rho=0.05"
    )


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _counts(text: str) -> list[int]:
    return [_positive(word) for word in text.split(",")]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _port(text: str) -> int:
    value = _positive(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: they end at 65535")
    return value


def _train(arguments: argparse.Namespace) -> int:
    from ray_jobs import config
    from ray_jobs.errors import ConfigError

    if bool(arguments.runs) == bool(arguments.resume):
        raise ConfigError("train: name a recipe or a file, or an unfinished run with --resume RUN_ID")
    if arguments.resume and (arguments.set or arguments.num_workers):
        raise ConfigError("train --resume goes on with the run as it was: --set and --num-workers do not go with it")
    workers = [f"scaling.num_workers={arguments.num_workers}"] if arguments.num_workers else []
    configs = [config.load(run, [*arguments.set, *workers]) for run in arguments.runs]  # all, before the first starts

    _set_environment(arguments.address, arguments.verbose)
    from rich.console import Console

    from ray_jobs import train
    from ray_jobs.progress import summary_table

    console = Console()
    going_on = [train.unfinished(arguments.resume)] if arguments.resume else []
    most_workers = max(c.scaling.num_workers for c in [*configs, *(run.config for run in going_on)])
    with train.connected(arguments.address, most_workers, arguments.verbose):
        summaries = []
        try:
            for run in going_on:
                summaries.append(train.resume(run, console))  # noqa: PERF401  (what is done must stay)
            for described in configs:
                summaries.append(train.train(described, console))  # noqa: PERF401  (what is done must stay)
        finally:  # a run that fails takes nothing from those before it
            if summaries:
                console.print(summary_table(summaries))
                console.print(f"\nCurves, models and comparison: {_own_name()} ui", highlight=False)
    return 0


def _own_name() -> str:
    """How this command was called, so that what it tells to type works: phisam, or .venv/bin/phisam."""
    called = sys.argv[0]
    if os.path.basename(called) != "phisam" or shutil.which("phisam") == called:
        return "phisam"
    return os.path.relpath(called)


def _validate(arguments: argparse.Namespace) -> int:
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


def _recipes(arguments: argparse.Namespace) -> int:
    from ray_jobs import config, paper

    if arguments.name:
        print(config.recipe_text(arguments.name), end="")
        return 0
    names = [name for name in config.recipe_names() if not name.startswith(paper.PREFIX)]
    for name in names:
        print(f"{name:{max(map(len, names))}}  {config.load(name).description}")
    print(f"\n{paper.OVERVIEW}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is used to count, and is not to talk
    from ray_jobs.bench import command

    return command.run(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from ray_jobs.plan_hardware import profile

    hardware = profile(
        arguments.link,
        arguments.tflops,
        arguments.utilisation,
        arguments.gbps,
        arguments.gpus_per_node,
        arguments.memory_gb,
    )
    _set_environment(None, False)
    from ray_jobs.plan_table import plan_text

    text = plan_text(
        arguments.run,
        arguments.set,
        arguments.gpus,
        arguments.n,
        hardware,
        arguments.parameters,
        arguments.flops_per_example,
        arguments.activations_gb,
        arguments.seconds_per_evaluation,
    )
    print(text)
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from ray_jobs.errors import RunError
    from ray_jobs.paths import runs_folder

    store = runs_folder() / "mlflow.db"
    if not store.exists():
        raise RunError(f"{store} does not exist: train a run first, from this folder, or set PHISAM_HOME")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", arguments.port))
        except OSError as error:
            raise RunError(
                f"port {arguments.port} is not free ({error.strerror}); choose another with --port"
            ) from None
    print(f"MLflow over {store.parent} at http://127.0.0.1:{arguments.port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(arguments.port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning", "--backend-store-uri", f"sqlite:///{store}"]
    command += ["--default-artifact-root", (store.parent / "artifacts").as_uri()]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    os.execve(sys.executable, command, environment)  # this process becomes the server: one signal ends it


def _set_environment(address: str | None, verbose: bool) -> None:
    """What Ray and MLflow read when they are imported."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray Train looks for reports every 2 s otherwise
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is down is said after seconds, not four minutes
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    if address is None:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every socket of a local Ray on 127.0.0.1
    if not verbose:
        settings["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"  # what raylets say of dead workers; progress tells it in a line
        settings |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "ALEMBIC_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
