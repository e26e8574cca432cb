"""An MLflow server or store: where it is, who speaks to it, and its words as ours."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds

from ray_jobs.config import TrackingConfig
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.redaction import redacted

PAGE = 1000
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's words for what it will not take however often it is asked; all others may pass."""


def tracking_uri(config: TrackingConfig, runs: Path) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else the embedded store in the runs folder.

    Raises:
        ConfigError: tracking.uri is what only MLFLOW_TRACKING_URI may be.
    """
    own = os.environ.get("MLFLOW_TRACKING_URI")
    if config.uri and config.uri != own:
        _check_described(config.uri, own or "", runs)
    return config.uri or own or f"sqlite:///{runs / 'mlflow.db'}"


def _check_described(uri: str, own: str, runs: Path) -> None:
    """A description may be somebody else's: it gets no credentials of the user's, and chooses no file to write to."""
    scheme = urlsplit(uri).scheme.partition("+")[0]  # sqlite+pysqlite
    allowed = f"if you want that, set MLFLOW_TRACKING_URI to {redacted(uri)} yourself"
    if scheme in ("http", "https"):
        server = _server(uri)
        if (server is None or server != _server(own)) and _would_log_in(uri):
            raise ConfigError(
                f"tracking.uri: your MLflow credentials would go to {redacted(uri)}, which a description alone names; "
                f"{allowed}"
            )
    elif scheme in ("sqlite", "file", "") and runs.resolve() not in _place(uri, scheme).parents:
        raise ConfigError(
            f"tracking.uri: {redacted(uri)} is outside the runs folder, {runs}, where a description alone must not "
            f"have files written; {allowed}"
        )


def _would_log_in(uri: str) -> bool:
    """Whether MLflow has something to log in with, from the environment or ~/.mlflow/credentials: any host gets it."""
    found = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    return bool((found.username and found.password) or found.token or found.aws_sigv4 or found.auth)


def _server(uri: str) -> str | None:
    """Scheme, host and port as requests, which MLflow asks with, reads them; None: it reads none.

    urlsplit alone would take https://evil\\@good for a URI of good.
    """
    try:
        parts = urlsplit(requests.Request("GET", uri).prepare().url or "")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        return None
    return f"{parts.scheme}://{parts.hostname}:{port}"


def _place(uri: str, scheme: str) -> Path:
    """The file or folder of a store without a server; the root where options in the URI could name another."""
    path = uri.partition(":///")[2] if scheme == "sqlite" else unquote(urlsplit(uri).path)
    return Path("/" if "?" in uri else path).resolve()


def open_store(uri: str) -> None:
    """Opens the embedded store, and makes it where there is none: seconds once a process. Asks nothing of a server.

    One process at a time: two that make its tables at once would leave it broken.

    Raises:
        RunError: it cannot be opened.
    """
    if uri.startswith("sqlite:"):
        try:
            with Path(f"{uri.removeprefix('sqlite:///')}.lock").open("a") as lock, asked(uri, "open"):
                fcntl.flock(lock, fcntl.LOCK_EX)
                MlflowClient(uri).search_experiments(max_results=1)
        except OSError as error:
            raise RunError(f"{uri} cannot be opened ({error.strerror})") from None


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
        raise RunError(f"MLflow at {redacted(uri)} was asked to {what}, but: {first_line(error)}") from error


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


def is_refusal(error: RunError) -> bool:
    """Whether MLflow answered, and would answer the same again."""
    return isinstance(error.__cause__, MlflowException) and error.__cause__.error_code in REFUSALS


def is_deleted(uri: str, run_id: str) -> bool:
    """Whether a run is not, or no more, in MLflow.

    Raises:
        RunError: MLflow does not answer.
    """
    try:
        with asked(uri, f"give run {run_id}"):
            stage: str = MlflowClient(uri).get_run(run_id).info.lifecycle_stage
    except RunError as error:
        if is_refusal(error):
            return True
        raise
    return stage == LifecycleStage.DELETED
