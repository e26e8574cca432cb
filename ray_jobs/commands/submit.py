"""`phisam submit`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from ray_jobs.commands import sharpness, sweep, train
from ray_jobs.commands.arguments import add_head, command, own_name

if TYPE_CHECKING:
    from ray_jobs.jobs.submit import Command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "submit",
        run,
        "send a run, a sweep or a measurement to a cluster as a job",
        """\
Checks the description here, with all --set applied, and sends it to a Ray cluster as a job. Prints the job's id.

  phisam submit train mnist5k-frob --set training.epochs=5
  phisam submit sweep digits-rho --register digits
  phisam submit --address https://ray.example.com sharpness 3f2a9c41

What travels: the description with every setting resolved, own modules that it names, the git commit and the changes
since. Data folders, runs and checkpoints are the cluster's own. Then: phisam status, phisam logs ID -f, phisam stop ID.
docs/cluster.md tells more.""",
    )
    add_head(parser, dest="head")  # a kind has an --address of its own, which is as good
    parser.add_argument("--home", metavar="FOLDER", help="where on the cluster runs lie; default: its PHISAM_HOME")
    kinds = parser.add_subparsers(metavar="train|sweep|sharpness", required=True, dest="kind")
    for module in (train, sweep, sharpness):
        module.add(kinds)
    for inner in kinds.choices.values():
        inner.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.errors import ConfigError
    from ray_jobs.jobs.address import find_head
    from ray_jobs.jobs.client import JobsClient
    from ray_jobs.jobs.submit import submit

    if arguments.home is not None and not os.path.isabs(arguments.home):
        raise ConfigError(f"submit --home {arguments.home}: a folder of the cluster is named by its whole path")
    asked = {"train": _train, "sweep": _sweep, "sharpness": _sharpness}[arguments.kind](arguments)
    client = JobsClient(find_head(arguments.head or arguments.address))
    job_id = submit(asked, client, arguments.home)
    print(job_id)
    phisam = own_name()
    print(f"\nWhat becomes of it: {phisam} status {job_id}; {phisam} logs {job_id} -f; {phisam} stop {job_id}")
    return 0


def _train(arguments: argparse.Namespace) -> Command:
    from ray_jobs.config import dump_yaml
    from ray_jobs.jobs.submit import Command

    configs = train.described(arguments)
    files = {f"run-{number}.yaml": dump_yaml(config) for number, config in enumerate(configs)}
    words = [*files, *_options(arguments, "resume", "key", "verbose")]
    name = "-".join(config.name for config in configs) or f"resume-{arguments.resume}"
    return Command("train", name, words, files, [config.model_dump(mode="json") for config in configs])


def _sweep(arguments: argparse.Namespace) -> Command:
    from ray_jobs.errors import ConfigError
    from ray_jobs.jobs.submit import Command
    from ray_jobs.sweep.config import dump_sweep
    from ray_jobs.sweep.variety import check_one_winner

    if arguments.dry_run:
        raise ConfigError("submit sweep --dry-run: nothing is sent for that; phisam sweep ... --dry-run does it here")
    described = sweep.described(arguments)
    if described is not None:
        check_one_winner(described, arguments.register)
    if arguments.register is not None:
        from ray_jobs.tracking.sweep import check_model_name

        check_model_name(arguments.register)
    files = {} if described is None else {"sweep.yaml": dump_sweep(described)}
    words = [*files, *_options(arguments, "resume", "max_concurrent", "register", "go_on", "verbose")]
    settings = [] if described is None else [described.model_dump(mode="json")]
    return Command("sweep", described.name if described else f"resume-{arguments.resume}", words, files, settings)


def _sharpness(arguments: argparse.Namespace) -> Command:
    from ray_jobs.config import changed, dump_yaml, load
    from ray_jobs.jobs.submit import Command

    sharpness.check(arguments)
    files, settings = {}, []
    if arguments.run:
        described = load(arguments.run)
        settings = [changed(described, arguments.set).model_dump(mode="json")]
        files = {"run-0.yaml": dump_yaml(described)}
    model = os.path.abspath(arguments.model) if os.path.exists(arguments.model) else arguments.model
    names = ("num_workers", "probes", "lanczos_probes", "examples", "top_k", "budget", "data", "verbose")
    words = [model, f"--model={arguments.which}", *_options(arguments, *names)]
    words += [f"--measures={','.join(arguments.measures)}"] if arguments.measures else []
    words += [*(f"--run={name}" for name in files), *(f"--set={text}" for text in arguments.set)]
    return Command("sharpness", f"sharpness-{arguments.model}"[:40], words, files, settings)


def _options(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Options as they were given, for the command line of the job."""
    given: list[str] = []
    for name in names:
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is True:
            given.append(option)
        elif value not in (None, False):
            given.append(f"{option}={value}")
    return given
