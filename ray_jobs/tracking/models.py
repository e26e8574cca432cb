"""The weights of a model that a run left, found by what a person has in hand, and read without executing a pickle.

A run's models lie in MLflow as pt2 programs for serving, with their state_dict beside them (`Tracker.log_model`); that,
or a checkpoint's, is what is read here, into the network that the run's own description names.
"""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from torch import Tensor, nn

from ray_jobs import checkpoint, checkpoints
from ray_jobs.config import RunConfig, TrackingConfig, load
from ray_jobs.data import Dataset
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.models import make_model
from ray_jobs.paths import runs_folder
from ray_jobs.tracking.server import asked, find_run, tracking_uri
from ray_jobs.user_code import own_functions
from ray_jobs.yaml_source import read_yaml

DESCRIPTION = "run.yaml"
WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Found:
    """Weights, the run description that names their network, and the MLflow run that they are of, if there is one.

    where: in words; epoch: whole epochs of training behind the weights, None where nothing says.
    """

    where: str
    weights: Mapping[str, Tensor]
    epoch: int | None
    config: RunConfig
    uri: str | None
    run_id: str | None
    fingerprint: str | None

    def model(self, dataset: Dataset) -> nn.Module:
        """The network with these weights, on the CPU, in the precision it was trained in.

        Raises:
            RunError: the weights are of another architecture than the description's.
        """
        dtype = torch.float64 if self.config.training.precision == "float64" else torch.float32
        seed = self.config.training.seed
        model = make_model(self.config.model, dataset.input_shape, dataset.num_classes, seed).to(dtype)
        checkpoint.load_model(model, dict(self.weights), self.where)
        return model

    def check_data(self, dataset: Dataset) -> None:
        """Raises RunError where the run was trained on other data than the description gives now."""
        if self.fingerprint not in (None, dataset.fingerprint):
            raise RunError(
                f"{self.where}: it was trained on data with fingerprint {self.fingerprint}, but {dataset.name} is "
                f"{dataset.fingerprint} now: its files or settings changed. Say which data to take with --data or --set"
            )


def find_model(what: str, which: str = "last", described: RunConfig | None = None) -> Found:
    """The model that a run id, a models:/ URI, a checkpoint's folder or a file of weights stands for.

    Args:
        what: RUN_ID (eight letters do) or a run's unique name; models:/m-ID, models:/NAME/VERSION, models:/NAME@ALIAS;
            a folder with a checkpoint, or one of a run with checkpoints; a file with a state_dict.
        which: of a run's models, "last" or "best".
        described: the description to read the weights with; None: the run's own.

    Raises:
        ConfigError: nothing says which network the weights are of, or only MLflow says so and it names own functions.
        RunError: there is no such run, model, or checkpoint, or it cannot be read.
    """
    if what.startswith("models:"):
        return _of_uri(what, described)
    path = Path(what).expanduser()
    if path.exists() and (path.is_file() or (path / checkpoint.STATE).exists() or (path / DESCRIPTION).exists()):
        return _of_path(path.resolve(), which, described)
    if "/" in what and not path.exists() and re.match(r"[./~]", what):
        raise RunError(f"{what}: there is no such checkpoint")
    uri = tracking_uri(described.tracking if described else TrackingConfig(), runs_folder())
    return _of_run(uri, find_run(uri, what), which, described)


def _of_run(uri: str, run: Run, which: str, described: RunConfig | None) -> Found:
    """A run's logged model, or the newest checkpoint of a run that has not come to its end."""
    run_id = run.info.run_id
    client = MlflowClient(uri)
    if run.data.tags.get("phisam.kind") == "sweep":
        raise RunError(f"{run_id} is a sweep, with a model for each trial: name one of its trials")
    for model in _models(uri, client, run):
        if model.name == which:
            return _logged(uri, run, model, described)
    folder = Path(run.data.tags.get("phisam.folder", str(runs_folder() / run_id)))
    newest = checkpoints.newest(folder)
    if newest is None:
        raise RunError(
            f"run {run_id} ({run.info.run_name}, {run.info.status}) has no model {which!r} in MLflow, and no "
            f"checkpoint in {folder}"
        )
    described = described or _description(uri, run)
    return _checkpoint(newest, which, described, uri, run)


def _models(uri: str, client: MlflowClient, run: Run) -> list[LoggedModel]:
    with asked(uri, f"give the models of run {run.info.run_id}"):
        outputs = run.outputs.model_outputs if run.outputs else []
        models = [client.get_logged_model(output.model_id) for output in outputs]
    return sorted(models, key=lambda model: model.creation_timestamp, reverse=True)


def _logged(uri: str, run: Run, model: LoggedModel, described: RunConfig | None) -> Found:
    """The state_dict beside a logged model."""
    run_id, where = run.info.run_id, f"model {model.name!r} of run {run.info.run_id}"
    with tempfile.TemporaryDirectory() as folder:
        path = _fetched(uri, f"{run.info.artifact_uri}/{model.name}/{WEIGHTS}", folder)
        if path is None:
            raise RunError(
                f"{where} has no {WEIGHTS} beside it, as models that phisam logs have: name a checkpoint instead"
            )
        weights = _weights(path)
    epoch = _epoch(uri, model)
    described = described or _description(uri, run)
    return Found(where, weights, epoch, described, uri, run_id, run.data.tags.get("data.fingerprint"))


def _epoch(uri: str, model: LoggedModel) -> int | None:
    """The epoch in a logged model's metadata."""
    with tempfile.TemporaryDirectory() as folder:
        path = _fetched(uri, f"{model.artifact_location}/MLmodel", folder)
        told = read_yaml(path.read_bytes(), f"MLmodel of {model.model_id}").value if path else {}
    epoch = (told.get("metadata") or {}).get("epoch")
    return None if epoch is None else int(epoch)


def _description(uri: str, run: Run) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = _fetched(uri, f"{run.info.artifact_uri}/{DESCRIPTION}", folder)
        if path is None:
            raise ConfigError(
                f"run {run.info.run_id} has no {DESCRIPTION} that names its network and data: say which description "
                "fits with --run RECIPE_OR_FILE"
            )
        described = load(str(path))
    _check_functions(described, run)
    return described


def _check_functions(described: RunConfig, run: Run) -> None:
    """What others may have written into MLflow has no function called that none of the run's files here names."""
    run_id, runs = run.info.run_id, runs_folder().resolve()
    known = []
    for folder in (runs / run_id, Path(run.data.tags.get("phisam.folder", runs / run_id)).resolve()):
        ours = runs in folder.parents and runs / "artifacts" not in folder.parents  # which MLflow's server writes to
        if ours and (folder / DESCRIPTION).exists():
            known += own_functions(load(str(folder / DESCRIPTION)))
    for function in own_functions(described):
        if function not in known:
            raise ConfigError(
                f"run {run_id}: {function} is your own function, or somebody else's, and only MLflow says that the run "
                f"has it with these options, where others may write: read the run's {DESCRIPTION}, and name it, or the "
                "file that you trained from, with --run FILE"
            )


def _fetched(uri: str, artifact: str, folder: str) -> Path | None:
    """A copy of an artifact in the folder; None if there is no such artifact.

    By its own URI: MLflow's client would look for logged models in the global store, whatever store it was made for.
    """
    try:
        return Path(download_artifacts(artifact_uri=artifact, dst_path=folder, tracking_uri=uri))
    except OSError:
        return None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise RunError(f"MLflow was asked to give {artifact}, but: {first_line(error)}") from error


def _of_uri(what: str, described: RunConfig | None) -> Found:
    uri = tracking_uri(described.tracking if described else TrackingConfig(), runs_folder())
    store = Path(uri.removeprefix("sqlite:///"))
    told = re.fullmatch(r"models:/+(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))?", what)
    if told is None or (told["name"][:2] != "m-" and not (told["version"] or told["alias"])):
        raise ConfigError(f"{what!r}: a model's URI is models:/m-ID, models:/NAME/VERSION or models:/NAME@ALIAS")
    if uri.startswith("sqlite:") and not store.exists():  # a look must not make a store
        raise RunError(f"no model {what!r}: {store} does not exist")
    client = MlflowClient(uri)
    with asked(uri, f"give {what}"):
        model_id = told["name"]
        if told["version"] or told["alias"]:
            version = (
                client.get_model_version(told["name"], told["version"])
                if told["version"]
                else client.get_model_version_by_alias(told["name"], told["alias"])
            )
            named = re.search("m-[0-9a-f]{32}", str(version.source))
            model_id = version.model_id or (named[0] if named else str(version.source))
        model = client.get_logged_model(model_id)
        if not model.source_run_id:
            raise RunError(f"{what} belongs to no run, so nothing says what it was trained on: name a checkpoint")
        run = client.get_run(model.source_run_id)
    return _logged(uri, run, model, described)


def _of_path(path: Path, which: str, described: RunConfig | None) -> Found:
    if path.is_file() and path.name != checkpoint.STATE:
        if described is None:
            raise _undescribed(path)
        return Found(str(path), _weights(path), None, described, None, None, None)
    folder = path.parent if path.is_file() else path
    if not (folder / checkpoint.STATE).exists():  # of a run
        newest = checkpoints.newest(folder)
        if newest is None:
            raise RunError(f"{folder}: the run has no checkpoint yet")
        folder = newest
    beside = folder.parent / DESCRIPTION
    if described is None and not beside.exists():
        raise _undescribed(folder)
    own = load(str(beside)) if beside.exists() else None
    run, uri = None, None
    if own is not None:  # the run's folder is called as the run
        uri = tracking_uri(own.tracking, runs_folder())
        try:
            run = find_run(uri, folder.parent.name)
        except RunError:
            uri = None
    used = described or own
    assert used is not None
    return _checkpoint(folder, which, used, uri, run)


def _checkpoint(folder: Path, which: str, described: RunConfig, uri: str | None, run: Run | None) -> Found:
    state = checkpoint.load(folder)
    try:
        weights, epoch = (state["model"], state["epoch"]) if which == "last" else _best(state)
    except (KeyError, TypeError):
        raise RunError(f"{folder}: this is no checkpoint of phisam, or one without a model {which!r}") from None
    run_id = None if run is None else run.info.run_id
    fingerprint = None if run is None else run.data.tags.get("data.fingerprint")
    return Found(f"checkpoint {folder}", weights, int(epoch), described, uri, run_id, fingerprint)


def _best(state: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], int]:
    return state["best"]["model"], state["best"]["epoch"]


def _weights(path: Path) -> Mapping[str, Tensor]:
    """A state_dict; what needs a pickle's code to be executed is refused."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RunError(
            f"{path}: it is damaged, or holds more than tensors, which could not be read without executing code from it"
        ) from None
    except Exception as error:  # a file that somebody made has torch's reader raise whatever it likes
        raise RunError(f"{path}: no weights can be read from it ({first_line(error)})") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise RunError(f"{path}: this is no state_dict, which has a tensor under each name")
    return weights


def _undescribed(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: nothing beside it says which network and data it is of: name a description that does with "
        "--run RECIPE_OR_FILE"
    )
