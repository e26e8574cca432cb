"""A sweep in MLflow: a parent run, and one child a trial that stays one run however often it is started again."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from ray_jobs.config import RunConfig
from ray_jobs.errors import RunError
from ray_jobs.tracking.server import asked, experiment, quiet
from ray_jobs.tracking.tracker import Metrics, Tracker

RETRY_SECONDS = 5.0
MAX_PARAM = 6000  # MLflow's limit of a parameter's length
CHAMPION = "champion"


class SweepTracker:
    """The parent run and its children. Each method raises RunError if MLflow does not do what it is asked for."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(uri)
        with asked(uri, f"give run {run_id}"):
            self._experiment = self._client.get_run(run_id).info.experiment_id

    @classmethod
    def start(
        cls, uri: str, runs: Path, experiment_name: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> SweepTracker:
        """A new parent."""
        client = MlflowClient(uri)
        with asked(uri, "start a sweep"):
            found = experiment(client, experiment_name, runs if uri.startswith("sqlite:") else None)
            run_id = client.create_run(found, run_name=name).info.run_id
            client.log_batch(
                run_id,
                params=[Param(key, value[:MAX_PARAM]) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in {**tags, "phisam.kind": "sweep"}.items()],
            )
        return cls(uri, run_id)

    def children(self) -> dict[int, Run]:
        """Trial -> its run; where a crash left two, the newer."""
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        found: dict[int, Run] = {}
        token = None
        with asked(self.uri, f"list the trials of {self.run_id}"):
            while True:
                page = self._client.search_runs([self._experiment], query, max_results=1000, page_token=token)
                for run in page:
                    found.setdefault(int(run.data.tags["phisam.trial"]), run)
                token = page.token
                if not token:
                    return found

    def child(self, runs: Path, index: int, config: RunConfig, tags: Mapping[str, str]) -> str:
        """A new child's id."""
        own = {"mlflow.parentRunId": self.run_id, "phisam.kind": "trial", "phisam.trial": str(index)}
        return Tracker.start(self.uri, runs, config, {**tags, **own}).run_id

    def reopen(self, run_id: str) -> None:
        """RUNNING again, without what an earlier end said of it."""
        with asked(self.uri, f"go on with run {run_id}"):
            self._client.update_run(run_id, status="RUNNING")

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Adds tags to a child."""
        with asked(self.uri, "take tags"):
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

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
                self._client.log_text(self.run_id, text, name)

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        with asked(self.uri, f"end run {self.run_id} as {status}"):
            self._client.set_terminated(self.run_id, status)

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


class Writer:
    """Tells MLflow from a thread, in order. A server that is away is asked again until it answers; nobody waits for it.

    Args:
        say: takes a line for the person at the terminal.
    """

    def __init__(self, uri: str, say: Callable[[str], None]) -> None:
        self._uri, self._say = uri, say
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._error: RunError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def epoch(self, run_id: str, metrics: Metrics) -> None:
        """One epoch of a trial. Returns at once."""
        self._queue.put(lambda: Tracker(self._uri, run_id).log_epoch(metrics))

    def end(self, run_id: str, status: str, tags: Mapping[str, str], history: Sequence[Metrics]) -> None:
        """A trial's end; epochs of its history that MLflow lacks are filled in. Returns at once."""

        def told() -> None:
            tracker = Tracker(self._uri, run_id)
            tracker.reconcile(history)
            tracker.set_tags(dict(tags))
            tracker.finish(status)

        self._queue.put(told)

    def close(self) -> None:
        """Waits until all is told; each thing is tried once more.

        Raises:
            RunError: something could not be told.
        """
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            self._try(task)

    def _try(self, task: Callable[[], Any]) -> None:
        while self._error is None or not self._closing.is_set():
            try:
                task()
                self._error = None
                return
            except RunError as error:
                if self._error is None:
                    self._say(f"{error}; it is asked again until it answers")
                self._error = error
            except Exception:  # a thread that ends would end the sweep's record
                logging.getLogger("phisam").exception("MLflow's writer")
                return
            self._closing.wait(RETRY_SECONDS)
