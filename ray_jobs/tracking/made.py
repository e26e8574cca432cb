"""Runs that were made from a description before: what makes a command that trains many runs resumable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient

from ray_jobs.config import RunConfig
from ray_jobs.paths import runs_folder
from ray_jobs.results import BOOKKEEPING
from ray_jobs.tracking.server import asked, tracking_uri
from ray_jobs.tracking.tracker import parameters


class Made(NamedTuple):
    """A run that has all parameters of a description. status: as MLflow has it, FINISHED or another."""

    uri: str
    run_id: str
    status: str


def made_from(config: RunConfig) -> Made | None:
    """A finished run of a description's name and parameters, else the newest unfinished one; None if there is none.

    Where files lie and how often they are written does not count.

    Raises:
        RunError: MLflow does not answer.
    """
    uri = tracking_uri(config.tracking, runs_folder())
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None  # a look must not make a store
    client = MlflowClient(uri)
    wanted = _trained({key: str(value) for key, value in parameters(config).items()})
    with asked(uri, f"list the runs called {config.name}"):
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            return None
        named = client.search_runs(
            [experiment.experiment_id], f"run_name = '{config.name}'", order_by=["attributes.start_time DESC"]
        )
    same = [run for run in named if _trained(run.data.params) == wanted]
    same.sort(key=lambda run: run.info.status != "FINISHED")  # stable: the newest first among equals
    return Made(uri, same[0].info.run_id, same[0].info.status) if same else None


def _trained(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if not key.startswith(BOOKKEEPING)}
