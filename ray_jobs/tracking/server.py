"""An MLflow server or store: where it is, who speaks to it, and its words as ours."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from ray_jobs.config import TrackingConfig
from ray_jobs.errors import RunError, first_line

PAGE = 1000


def tracking_uri(config: TrackingConfig, runs: Path) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else the embedded store in the runs folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"


def open_store(uri: str) -> None:
    """Opens the embedded store, and makes it where there is none: seconds once a process. Asks nothing of a server.

    Raises:
        RunError: it cannot be opened.
    """
    if uri.startswith("sqlite:"):
        with asked(uri, "open"):
            MlflowClient(uri).search_experiments(max_results=1)


def find_run(uri: str, name_or_id: str) -> Run:
    """A run by its id, the first eight letters of it, or its name if that is unique.

    Raises:
        RunError: there is none, or several.
    """
    runs: list[Run] = []
    store = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:") or store.exists():  # a look must not make a store
        runs = _runs(uri)
    found = [run for run in runs if run.info.run_id.startswith(name_or_id)] if len(name_or_id) >= 8 else []
    found = found or [run for run in runs if run.info.run_name == name_or_id]
    if not found:
        raise RunError(f"no run {name_or_id!r} in MLflow at {uri}; `phisam ui` lists them")
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found[:5])
        raise RunError(f"{len(found)} runs are called {name_or_id!r}; say which by its id: {ids}")
    return found[0]


def _runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    with asked(uri, "list its runs"):
        return search_runs(client, [experiment.experiment_id for experiment in client.search_experiments()])


def search_runs(client: MlflowClient, experiments: list[str], query: str = "") -> list[Run]:
    """All runs that a query finds, newest first, however many they are."""
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def experiment(client: MlflowClient, name: str, runs: Path | None) -> str:
    """The experiment's id, made if need be; in the embedded store its artifacts go to the runs folder."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = (runs / "artifacts").as_uri() if runs is not None else None
    tags = {  # what MLflow's pages call an experiment that trains models
        "mlflow.experimentKind": "custom_model_development"
    }
    return str(client.create_experiment(name, artifact_location=location, tags=tags))


@contextlib.contextmanager
def asked(uri: str, what: str) -> Iterator[None]:
    """Tells MLflow's refusals and a server that does not answer as a RunError."""
    try:
        yield
    except MlflowException as error:
        shown = re.sub("//[^/@]*@", "//***@", uri)  # a password may stand there
        raise RunError(f"MLflow at {shown} was asked to {what}, but: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps MLflow's and torch.export's remarks on model logging out of the way."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
