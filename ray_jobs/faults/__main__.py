"""`python -m ray_jobs.faults`, `make chaos`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from ray_jobs.commands.arguments import positive, set_environment
from ray_jobs.errors import RunError


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.faults",
        description="Injects faults from a seed into a running training and a running sweep: kills workers, drivers, "
        "controllers and MLflow's server, damages checkpoints. Prints what it cost, and whether anything was lost.",
    )
    parser.add_argument("--faults", type=positive, default=20, metavar="N", help="in all (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=["train", "sweep"], help="default: three fifths over trainings, the rest sweeps"
    )
    parser.add_argument("--epochs", type=positive, default=60, help="of an undisturbed run (default: 60)")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="adds what came out to a file; the table is of all in it"
    )
    parser.add_argument("--folder", type=Path, help="keep what runs leave there; default: a temporary folder")
    arguments = parser.parse_args(argv)
    set_environment(None, False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended here too
    from ray_jobs.faults.campaign import add_outcomes, campaign, read_outcomes, summed, table

    over_trainings = {"train": arguments.faults, "sweep": 0, None: -(-3 * arguments.faults // 5)}[arguments.only]
    parts = {"train": over_trainings, "sweep": arguments.faults - over_trainings}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve()
        try:
            outcomes = [
                campaign(kind, count, arguments.seed, folder, arguments.epochs, lambda line: print(line, flush=True))
                for kind, count in parts.items()
                if count
            ]
        except RunError as error:
            print(f"phisam: {error}", file=sys.stderr)
            return 1
    if arguments.add:
        add_outcomes(arguments.add, outcomes)
        outcomes = summed(read_outcomes(arguments.add))
    print(table(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
