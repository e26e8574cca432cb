"""`phisam report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray_jobs.commands.arguments import command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "report",
        run,
        "write a sweep's report: one HTML page that needs no network",
        """\
Reads a sweep from MLflow and writes one HTML page: methods at equal epochs, gradient evaluations and time, rho x lam,
parallel coordinates, sharpness, what early stopping saved, what it all cost, every trial, and how to run it again.

  phisam report my-sweep
  phisam report 3f2a9c41 --output report.html

A sweep that is not done yet is reported as it stands.""",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="its name, id, or the id's first eight letters")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: SWEEP.html in this folder")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.commands.arguments import set_environment

    set_environment(None, verbose=False)
    from ray_jobs.config import TrackingConfig
    from ray_jobs.errors import ConfigError
    from ray_jobs.paths import runs_folder
    from ray_jobs.report import page
    from ray_jobs.tracking import tracking_uri
    from ray_jobs.tracking.read import read_sweep

    sweep = read_sweep(tracking_uri(TrackingConfig(), runs_folder()), arguments.sweep)
    text = page(sweep.parent, sweep.trials, sweep.metric, sweep.mode, sweep.description)
    output = arguments.output or Path(f"{sweep.parent.name.replace('/', '-')}.html")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
    print(f"{output}: {len(sweep.trials)} trials, {len(text) / 1e6:.1f} MB")
    return 0
