"""A sweep in MLflow: a parent run, and one child a trial that stays one run however often it is started again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from ray_jobs.config import RunConfig, dump_yaml
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.redaction import redacted
from ray_jobs.tracking.server import asked, experiment, open_store, quiet, search_runs
from ray_jobs.tracking.tracker import Tracker, parameters

MAX_PARAM = 6000  # MLflow's limit of a parameter's length
MAX_MODEL_NAME = 256  # of the column in MLflow's databases
CHAMPION = "champion"


@dataclass(frozen=True)
class Child:
    """What a trial's run says from its beginning. text: its resolved description, None where its values make no run."""

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    text: str | None

    @classmethod
    def of(cls, config: RunConfig, tags: Mapping[str, str], run: str | None) -> Child:
        """As a single run of this description has it. run: which of the sweep's base runs, where it has several."""
        params = {key: str(value) for key, value in parameters(config).items()}
        if run is not None:
            params["run"] = run
        tags = {**tags, "mlflow.note.content": config.description, **config.tracking.tags}
        return cls(config.name, params, tags, dump_yaml(config))


class SweepTracker:
    """The parent run and its children. Each method raises RunError if MLflow does not do what it is asked for."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(uri)
        self._asked_for: dict[int, str | None] = {}
        with asked(uri, f"give run {run_id}"):
            run = self._client.get_run(run_id)
        self._experiment = run.info.experiment_id
        self._described = bool(run.data.params)

    @classmethod
    def start(cls, uri: str, runs: Path, experiment_name: str, name: str, tags: Mapping[str, str]) -> SweepTracker:
        """A new parent."""
        open_store(uri)
        client = MlflowClient(uri)
        with asked(uri, "start a sweep"):
            found = experiment(client, experiment_name, runs if uri.startswith("sqlite:") else None)
            run = client.create_run(found, run_name=name, tags={**tags, "phisam.kind": "sweep"})
        return cls(uri, run.info.run_id)

    def describe(self, params: Mapping[str, str], tags: Mapping[str, str], texts: Mapping[str, str]) -> None:
        """What the parent says from its beginning; nothing if it says so already."""
        if self._described:
            return
        self.attach([], texts)
        with asked(self.uri, "take the sweep's parameters"):
            self._client.log_batch(
                self.run_id,
                params=[Param(key, value[:MAX_PARAM]) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
        self._described = True

    def children(self) -> list[Run]:
        """The trials' runs, newest first: of a trial more than one where an answer of MLflow was lost."""
        with asked(self.uri, f"list the trials of {self.run_id}"):
            found = search_runs(self._client, [self._experiment], f"tags.`mlflow.parentRunId` = '{self.run_id}'")
        return [run for run in found if trial_of(run) is not None]

    def child(self, index: int, told: Child) -> str:
        """The id of a new run for a trial, which says all of `told`. After an error it may be asked for again."""
        run_id = self._asked_for.get(index)
        if run_id is None and index in self._asked_for:  # the answer may have been lost, not the question
            run_id = next((run.info.run_id for run in self.children() if trial_of(run) == index), None)
        self._asked_for[index] = run_id
        own = {"mlflow.parentRunId": self.run_id, "phisam.kind": "trial", "phisam.trial": str(index)}
        with asked(self.uri, f"start the run of trial {index}"):
            if run_id is None:
                made = self._client.create_run(self._experiment, run_name=told.name, tags={**told.tags, **own})
                run_id = made.info.run_id
            self._asked_for[index] = run_id
            params = [Param(key, value[:MAX_PARAM]) for key, value in told.params.items()]
            self._client.log_batch(run_id, params=params)
            if told.text is not None:
                self._client.log_text(run_id, told.text, "run.yaml")
        return run_id

    def discard(self, run_id: str) -> None:
        """Deletes a child that no trial needs, as MLflow's page does: it may be restored there."""
        with asked(self.uri, f"delete run {run_id}"):
            self._client.delete_run(run_id)

    def reopen(self) -> None:
        """The parent is RUNNING again."""
        with asked(self.uri, f"go on with run {self.run_id}"):
            self._client.update_run(self.run_id, status="RUNNING")

    def summarize(self, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """What the parent says of the whole sweep."""
        with asked(self.uri, "take the sweep's summary"):
            self._client.log_batch(
                self.run_id,
                tags=[RunTag(key, value) for key, value in tags.items()],
                metrics=[Metric(key, value, round(time.time() * 1000), 0) for key, value in metrics.items()],
            )

    def attach(self, files: Iterable[Path], texts: Mapping[str, str]) -> None:
        """Artifacts of the parent."""
        with asked(self.uri, "take the sweep's files"):
            for path in files:
                self._client.log_artifact(self.run_id, str(path))
            for name, text in texts.items():
                self._client.log_text(self.run_id, redacted(text), name)

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        with asked(self.uri, f"end run {self.run_id} as {status}"):
            self._client.set_terminated(self.run_id, status)

    def status(self) -> str:
        """How MLflow says that the sweep stands."""
        with asked(self.uri, f"give run {self.run_id}"):
            return str(self._client.get_run(self.run_id).info.status)

    def tags_of(self, run_id: str) -> Mapping[str, str]:
        """A child's tags."""
        with asked(self.uri, f"give run {run_id}"):
            tags: Mapping[str, str] = self._client.get_run(run_id).data.tags
            return tags

    def register(self, name: str, run_id: str, model: str, tags: Mapping[str, str]) -> int:
        """A model of a run as a new version of a registered model, under the alias `champion`; its version.

        A version that was made from this run before is taken again.
        """
        models = Tracker(self.uri, run_id).models()
        if model not in models:
            raise RunError(f"run {run_id} has no model {model!r} to register")
        client = self._client
        with asked(self.uri, f"register the model {name}"), quiet():
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            made = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
            source = client.get_logged_model(models[model])
            version = (
                made[0]
                if made
                else client.create_model_version(
                    name, source.artifact_location, run_id=run_id, model_id=source.model_id, await_creation_for=0
                )
            )
            for key, value in tags.items():
                client.set_model_version_tag(name, version.version, key, value)
            client.set_registered_model_alias(name, CHAMPION, version.version)
        return int(version.version)


def trial_of(run: Run) -> int | None:
    """The trial that a run is of."""
    text = run.data.tags.get("phisam.trial", "")
    return int(text) if text.isdecimal() else None


def check_model_name(name: str) -> None:
    """MLflow takes a registered model's name, or refuses it after the hours of a sweep.

    Raises:
        ConfigError: it would refuse.
    """
    if not re.fullmatch(r"(?!\.\.)[^/:']*[^/:'\s][^/:']*", name) or name == "." or len(name) > MAX_MODEL_NAME:
        raise ConfigError(
            f"--register {name!r}: a registered model's name has no /, no : and no ', does not begin with '..', is not "
            f"blank, and has at most {MAX_MODEL_NAME} letters"
        )
