"""Whether MLflow takes a run: for `phisam doctor`."""

from __future__ import annotations

import time
from pathlib import Path

from mlflow import MlflowClient

from ray_jobs.tracking.server import asked, experiment, open_store

EXPERIMENT = "phisam-doctor"


def written(uri: str, runs: Path) -> float:
    """Seconds that MLflow took for a run with a tag and a file; the run is deleted again.

    Raises:
        RunError: it did not take it.
    """
    open_store(uri)
    began = time.monotonic()
    client = MlflowClient(uri)
    with asked(uri, "take a run"):
        run = client.create_run(experiment(client, EXPERIMENT, runs if uri.startswith("sqlite:") else None))
        try:
            client.set_tag(run.info.run_id, "phisam.kind", "doctor")
            client.log_text(run.info.run_id, "from phisam doctor", "doctor.txt")
        finally:
            client.delete_run(run.info.run_id)
    return time.monotonic() - began
