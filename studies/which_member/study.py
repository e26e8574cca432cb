"""Which member of the class earns its cost: draws settings of every method on every task, trains the best anew, tells.

    python studies/which_member/study.py [--quick] [--fashion FOLDER] [--output FOLDER]

Each task is two sweeps, `which-member/TASK/tuning` and `.../finals`, and at equal steps `.../steps-tuning` and
`.../steps-finals`. They are run by `phisam sweep --go-on`: interrupt it at any moment and start it again, and it goes
on. Sweep files and what steps cost lie in the runs folder ($PHISAM_HOME).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import seconds
from design import (
    BASELINES,
    COMPARISONS,
    QUICK,
    TASKS,
    WHOLE,
    Comparison,
    Scale,
    Values,
    finalists,
    finals,
    sweep_name,
    tuning,
)
from page import Results, best, drawn, page
from picture import draw

from ray_jobs.config import TrackingConfig
from ray_jobs.paths import runs_folder
from ray_jobs.results import RunRecord
from ray_jobs.tracking import tracking_uri
from ray_jobs.tracking.read import read_sweep
from ray_jobs.trainer import made
from ray_jobs.yaml_source import write_yaml


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: of the first sweep that did not come to its end, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks in a few minutes, which say nothing")
    parser.add_argument("--fashion", metavar="FOLDER", help="Fashion-MNIST's files; else its tasks are left out")
    told = "of page, pictures and the finals' sweep files (default: beside the runs)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=told)
    given = parser.parse_args(arguments)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    scale = QUICK if given.quick else WHOLE
    tasks = [task for task in scale.tasks if given.fashion or TASKS[task].data["name"] != "fashion_mnist"]
    folder = made(runs_folder() / ("which-member-quick" if given.quick else "which-member"))
    lasts: dict[tuple[Comparison, str], Values] = {}
    for comparison, task in ((c, task) for c in COMPARISONS for task in tasks if task in c.tasks):
        code = _sweep(tuning(comparison, task, scale, given.fashion), folder)
        if not code:
            tuned = _runs(sweep_name(comparison, task, "tuning"))
            last = lasts[comparison, task] = finals(
                comparison, task, scale, given.fashion, _chosen(comparison, tuned, scale)
            )
            code = _sweep(last, folder)
        if code:
            return code
    found: dict[str, dict[str, Results]] = {}
    for (comparison, task), last in lasts.items():  # times at the end, when nothing else runs
        tuned, final = (_runs(sweep_name(comparison, task, stage)) for stage in ("tuning", "finals"))
        times = _seconds(last, folder / f"{task}-{comparison.part}seconds.json")
        found.setdefault(comparison.title, {})[task] = Results(tuned, final, times)
    output = made(given.output or folder)
    (output / "which-member.md").write_text(page(found), encoding="utf-8")
    for last in lasts.values():
        _write(last, output)
    print("\n".join(f"written: {path}" for path in [output / "which-member.md", *draw(found, output)]))
    return 0


def _sweep(described: Values, folder: Path) -> int:
    path = _write(described, folder)
    return subprocess.run([sys.executable, "-m", "ray_jobs.cli", "sweep", str(path), "--go-on"], check=False).returncode


def _write(described: Values, folder: Path) -> Path:
    path = folder / f"{described['name'].replace('/', '-')}.yaml"
    path.write_text(write_yaml(described), encoding="utf-8")
    return path


def _runs(sweep: str) -> list[RunRecord]:
    return read_sweep(tracking_uri(TrackingConfig(), runs_folder()), sweep).trials


def _chosen(comparison: Comparison, tuned: Sequence[RunRecord], scale: Scale) -> dict[str, Values]:
    """The best setting of each finalist, by validation loss alone."""
    found = best(tuned)
    names = finalists(comparison, {method: loss for method, (loss, _) in found.items()}, scale)
    return {name: drawn(found[name][1]) for name in names}


def _seconds(described: Values, path: Path) -> seconds.Ratios:
    """Measured once."""
    if not path.exists():
        path.write_text(json.dumps(seconds.ratios(described["runs"], BASELINES[0])), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    return {method: {int(workers): ratio for workers, ratio in of.items()} for method, of in found.items()}


if __name__ == "__main__":
    sys.exit(main())
