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
  phisam report first second --folder reports    a page each, without the 4.6 MB of script in it: it lies beside them

A sweep that is not done yet is reported as it stands.""",
    )
    parser.add_argument(
        "sweeps", metavar="SWEEP", nargs="+", help="its name, id, or the id's first eight letters; several: --folder"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="FILE", help="default: SWEEP.html in this folder")
    where.add_argument("--folder", type=Path, metavar="FOLDER", help="for pages that share one script; it is made")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.commands.arguments import set_environment

    set_environment(None, verbose=False)
    from ray_jobs.config import TrackingConfig
    from ray_jobs.errors import ConfigError
    from ray_jobs.paths import runs_folder
    from ray_jobs.report import SCRIPT, page, plotly
    from ray_jobs.tracking import tracking_uri
    from ray_jobs.tracking.read import read_sweep

    shared = arguments.folder is not None
    if len(arguments.sweeps) > 1 and not shared:
        raise ConfigError(f"{len(arguments.sweeps)} sweeps make as many pages: name their folder with --folder")
    uri = tracking_uri(TrackingConfig(), runs_folder())
    found = [read_sweep(uri, name) for name in dict.fromkeys(arguments.sweeps)]  # all, before anything is written
    try:
        if shared:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            (arguments.folder / SCRIPT).write_text(plotly(), encoding="utf-8")
        for sweep in found:
            text = page(sweep.parent, sweep.trials, sweep.metric, sweep.mode, sweep.description, shared)
            name = f"{sweep.parent.name.replace('/', '-')}.html"
            output = arguments.folder / name if shared else arguments.output or Path(name)
            output.write_text(text, encoding="utf-8")
            print(f"{output}: {len(sweep.trials)} trials, {len(text) / 1e6:.1f} MB")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return 0
