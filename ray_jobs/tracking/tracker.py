"""One MLflow run, written: each epoch once, models without pickle, a true status."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from torch import Tensor, nn

from ray_jobs.config import RunConfig, dump_yaml
from ray_jobs.redaction import redacted
from ray_jobs.tracking.server import asked, experiment, open_store, quiet

Metrics = dict[str, Any]


class Tracker:
    """One MLflow run. Each method raises RunError if MLflow does not do what it is asked for."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(uri)

    @classmethod
    def start(cls, uri: str, runs: Path, config: RunConfig, tags: dict[str, str]) -> Tracker:
        """A new run with its parameters, tags and resolved description."""
        open_store(uri)
        client = MlflowClient(uri)
        settings = [Param(key, str(value)) for key, value in parameters(config).items()]
        tags = {**tags, "mlflow.note.content": config.description, **config.tracking.tags}
        with asked(uri, "start a run"):
            experiment_id = experiment(client, config.tracking.experiment, runs if uri.startswith("sqlite:") else None)
            run_id = client.create_run(experiment_id, run_name=config.name).info.run_id
            try:
                client.log_batch(run_id, params=settings, tags=[RunTag(key, value) for key, value in tags.items()])
                client.log_text(run_id, dump_yaml(config), "run.yaml")
            except MlflowException:
                client.set_terminated(run_id, "FAILED")
                raise
        return cls(uri, run_id)

    def log_epoch(self, metrics: Metrics) -> None:
        """One epoch's metrics, in one transaction."""
        self.log_epochs([metrics])

    def log_epochs(self, epochs: Sequence[Metrics]) -> None:
        """Metrics of epochs, in one transaction: MLflow takes 1,000 at once."""
        batch = []
        for metrics in epochs:
            step, timestamp = int(metrics["epoch"]), int(metrics["timestamp_ms"])
            values = {name: float(value) for name, value in metrics.items() if name not in ("epoch", "timestamp_ms")}
            batch += [Metric(name, value, timestamp, step) for name, value in values.items()]
        steps = [int(metrics["epoch"]) for metrics in epochs]
        what = f"epoch {steps[0]}" if len(steps) == 1 else f"epochs {steps[0]} to {steps[-1]}"
        with asked(self.uri, f"take {what}"):
            self._client.log_batch(self.run_id, metrics=batch)

    def logged_epochs(self) -> set[int]:
        """Epochs that MLflow has."""
        with asked(self.uri, f"tell the epochs of run {self.run_id}"):
            return {metric.step for metric in self._client.get_metric_history(self.run_id, "loss/train")}

    def log_model(self, name: str, model: nn.Module, example: Tensor, metadata: dict[str, Any]) -> None:
        """A model with signature and input example, in the pt2 format: no pickle, loadable without this package.

        Its weights lie beside it as `<name>/weights.pt`, for training on: a loaded pt2 model has no train mode.
        """
        model.eval()
        with torch.no_grad():
            output = model(example)
        inputs = example.numpy()
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)
        with asked(self.uri, f"take the model {name}"), quiet(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pt"
            torch.save(model.state_dict(), path)
            self._client.log_artifact(self.run_id, str(path), name)  # first: a model that is there has its weights
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
                # MLflow keeps it in the environment, where the next run of this process would read it.
                mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None takes it out again

    def log_files(self, paths: Sequence[Path], folder: str) -> None:
        """Files into a folder of the run's artifacts."""
        with asked(self.uri, f"take files into {folder}"):
            for path in paths:
                self._client.log_artifact(self.run_id, str(path), folder)

    def log_texts(self, texts: Mapping[str, str]) -> None:
        """Texts into the run's artifacts, by file name."""
        with asked(self.uri, "take a text"):
            for name, text in texts.items():
                self._client.log_text(self.run_id, redacted(text), name)

    def models(self) -> dict[str, str]:
        """Name -> id of the run's models in MLflow, the newest of a name; without those that are not whole."""
        with asked(self.uri, f"give the models of run {self.run_id}"):
            outputs = self._client.get_run(self.run_id).outputs
            ids = [output.model_id for output in outputs.model_outputs] if outputs else []
            models = [self._client.get_logged_model(model_id) for model_id in ids]
            return {model.name: model.model_id for model in models if model.status == LoggedModelStatus.READY}

    def set_tags(self, tags: dict[str, str]) -> None:
        """Adds tags."""
        with asked(self.uri, "take tags"):
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, status: str, time_ms: int | None = None) -> None:
        """FINISHED, FAILED or KILLED, and when, None: now; or RUNNING again."""
        with asked(self.uri, f"say that run {self.run_id} is {status}"):
            if status == "RUNNING":
                self._client.update_run(self.run_id, status)
            else:
                self._client.set_terminated(self.run_id, status, time_ms)


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
