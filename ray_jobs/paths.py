"""Where runs live when nothing else is said.

runs/mlflow.db          MLflow's embedded store
runs/artifacts/         its models and files
runs/<run id>/          what a run resumes from: run.yaml and its checkpoints
"""

from __future__ import annotations

import os
from pathlib import Path


def runs_folder() -> Path:
    """$PHISAM_HOME, else ./runs; absolute, since workers run in another directory."""
    return Path(os.environ.get("PHISAM_HOME") or "runs").expanduser().absolute()
