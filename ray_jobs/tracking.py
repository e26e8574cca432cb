"""MLflow: one run per run, also across restarts; each epoch once. The only module that imports mlflow.

Metrics carry the worker's timestamp, and a checkpoint carries the metrics of all epochs behind it. MLflow's key of a
measurement is (run, name, timestamp, value, step), so that writing an epoch again writes nothing, and `reconcile` can
fill in whatever a killed process had not sent.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from torch import Tensor, nn

import phisam
from ray_jobs.config import RunConfig, TrackingConfig, dump_yaml
from ray_jobs.errors import RunError, first_line

Metrics = dict[str, Any]


def tracking_uri(config: TrackingConfig, runs: Path) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else the embedded store in the runs folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"


class Tracker:
    """One MLflow run. Each method raises RunError if MLflow does not do what it is asked for."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(uri)

    @classmethod
    def start(cls, uri: str, runs: Path, config: RunConfig, tags: dict[str, str]) -> Tracker:
        """A new run with its parameters, tags and resolved description."""
        client = MlflowClient(uri)
        settings = [Param(key, str(value)) for key, value in parameters(config).items()]
        tags = {**tags, "mlflow.note.content": config.description, **config.tracking.tags}
        with _asked(uri, "start a run"):
            experiment_id = _experiment(client, config.tracking.experiment, runs if uri.startswith("sqlite:") else None)
            run_id = client.create_run(experiment_id, run_name=config.name).info.run_id
            try:
                client.log_batch(run_id, params=settings, tags=[RunTag(key, value) for key, value in tags.items()])
                client.log_text(run_id, dump_yaml(config), "run.yaml")
            except MlflowException:
                client.set_terminated(run_id, "FAILED")
                raise
        return cls(uri, run_id)

    @classmethod
    def resume(cls, uri: str, run_id: str) -> Tracker:
        """A run that exists; it is RUNNING again."""
        tracker = cls(uri, run_id)
        with _asked(uri, f"go on with run {run_id}"):
            tracker._client.update_run(run_id, status="RUNNING")
        return tracker

    def log_epoch(self, metrics: Metrics) -> None:
        """One epoch's metrics, in one transaction."""
        step, timestamp = int(metrics["epoch"]), int(metrics["timestamp_ms"])
        values = {name: float(value) for name, value in metrics.items() if name not in ("epoch", "timestamp_ms")}
        batch = [Metric(name, value, timestamp, step) for name, value in values.items()]
        with _asked(self.uri, f"take epoch {step}"):
            self._client.log_batch(self.run_id, metrics=batch)

    def logged_epochs(self) -> set[int]:
        """Epochs that MLflow has."""
        with _asked(self.uri, f"tell the epochs of run {self.run_id}"):
            return {metric.step for metric in self._client.get_metric_history(self.run_id, "loss/train")}

    def reconcile(self, history: Sequence[Metrics]) -> None:
        """Logs the epochs of a checkpoint's history that MLflow lacks."""
        logged = self.logged_epochs()
        for metrics in history:
            if metrics["epoch"] not in logged:
                self.log_epoch(metrics)

    def log_model(self, name: str, model: nn.Module, example: Tensor, metadata: dict[str, Any]) -> None:
        """A model with signature and input example, in the pt2 format: no pickle, loadable without this package.

        Its weights lie beside it as `<name>/weights.pt`, for training on: a loaded pt2 model has no train mode.
        """
        model.eval()
        with torch.no_grad():
            output = model(example)
        inputs = example.numpy()
        mlflow.set_tracking_uri(self.uri)
        with _asked(self.uri, f"take the model {name}"), _quiet(), tempfile.TemporaryDirectory() as folder:
            mlflow.start_run(run_id=self.run_id)
            try:
                mlflow.pytorch.log_model(
                    model,
                    name=name,
                    signature=infer_signature(inputs, output.numpy()),
                    input_example=inputs,
                    pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],
                    metadata=metadata,
                )
            finally:
                mlflow.end_run("RUNNING")  # how the run ends is for the driver to say
            path = Path(folder) / "weights.pt"
            torch.save(model.state_dict(), path)
            self._client.log_artifact(self.run_id, str(path), name)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Adds tags."""
        with _asked(self.uri, "take tags"):
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        with _asked(self.uri, f"end run {self.run_id} as {status}"):
            self._client.set_terminated(self.run_id, status)


def find_run(uri: str, name_or_id: str) -> Run:
    """A run by its id, the first eight letters of it, or its name if that is unique.

    Raises:
        RunError: there is none, or several.
    """
    runs: Sequence[Run] = []
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


def _runs(uri: str) -> Sequence[Run]:
    client = MlflowClient(uri)
    with _asked(uri, "list its runs"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return client.search_runs(experiments, max_results=10_000)


def parameters(config: RunConfig) -> dict[str, str | float]:
    """Every setting that one compares runs by, named so that MLflow's compare page needs no clicking around.

    It offers the first parameters that differ, by the alphabet: rho, lam and n_samples have short names and stand once,
    as numbers; the run's name and description are told elsewhere.
    """
    short = {f"optimizer.{key}": key for key in ("rho", "lam", "n_samples")} | {"optimizer.measure.name": "measure"}
    flat = {short.get(k, k): value for k, value in config.flat().items() if k not in ("name", "description")}
    if config.optimizer.measure.name == "sgd":  # what the settings amount to
        flat |= {"n_samples": 0, "lam": 0.0}
    return {**flat, "strength": config.optimizer.strength}


def provenance(fingerprint: str) -> dict[str, str]:
    """Tags that say what a run was made from and with."""
    packages = ("torch", "ray", "mlflow")
    versions = {f"version.{name}": importlib.metadata.version(name) for name in packages}
    return {
        "data.fingerprint": fingerprint,
        "version.python": platform.python_version(),
        "version.phisam": phisam.__version__,
        **versions,
        **_git(),
    }


def _git() -> dict[str, str]:
    """Commit of the current directory's repository and whether it has uncommitted changes; nothing outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def _experiment(client: MlflowClient, name: str, runs: Path | None) -> str:
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
def _asked(uri: str, what: str) -> Iterator[None]:
    """Tells MLflow's refusals and a server that does not answer as a RunError."""
    try:
        yield
    except MlflowException as error:
        shown = re.sub("//[^/@]*@", "//***@", uri)  # a password may stand there
        raise RunError(f"MLflow at {shown} was asked to {what}, but: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MLflow's and torch.export's remarks on model logging out of the way."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
