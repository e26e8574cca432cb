"""MLflow's runs, read back as records."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from ray_jobs.errors import RunError
from ray_jobs.results import Curve, RunRecord, better_is_more
from ray_jobs.tracking.server import asked, find_run, search_runs
from ray_jobs.yaml_source import read_yaml

READERS = 8  # MLflow gives one metric of one run at a time
COSTS = ("gradient_evaluations", "seconds")
NOT_READ = ("seconds_per_step", "examples_per_second", "lr", "system/")  # nothing is compared by them


def read_run(uri: str, run_id: str) -> RunRecord:
    """One run with all its curves.

    Raises:
        RunError: MLflow has no such run, or does not answer.
    """
    client = MlflowClient(uri)
    with asked(uri, f"give run {run_id}"):
        return _record(client, client.get_run(run_id), None)


@dataclass(frozen=True)
class Written:
    """All that MLflow has of a run, as often as it has it. points: (metric, step, value)."""

    run_id: str
    name: str
    status: str
    points: list[tuple[str, int, float]]


def all_points(uri: str) -> list[Written]:
    """Every measurement of every run in a store: for a look whether one is missing, or there twice.

    Raises:
        RunError: MLflow does not answer.
    """
    client = MlflowClient(uri)
    with asked(uri, "give all that it has"):
        runs = search_runs(client, [experiment.experiment_id for experiment in client.search_experiments()])
        return [
            Written(
                run.info.run_id,
                run.info.run_name or "",
                run.info.status,
                [
                    (metric, point.step, point.value)
                    for metric in run.data.metrics
                    for point in client.get_metric_history(run.info.run_id, metric)
                ],
            )
            for run in runs
        ]


def read_children(uri: str, parent_id: str, metrics: Sequence[str] | None = None) -> list[RunRecord]:
    """A sweep's trials, in their order.

    Args:
        metrics: those whose curves are read; None: all.

    Raises:
        RunError: MLflow does not answer.
    """
    client = MlflowClient(uri)
    with asked(uri, f"list the trials of {parent_id}"):
        experiment = client.get_run(parent_id).info.experiment_id
        found = search_runs(client, [experiment], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    records = _records(uri, client, found, metrics)
    return sorted(records, key=lambda record: (-1 if record.trial is None else record.trial, record.started_ms))


def select(uri: str, names_or_ids: Sequence[str], metrics: Sequence[str] | None = None) -> list[RunRecord]:
    """Runs by id (eight letters do) or by name; a name stands for all runs that have it, a sweep for its trials.

    Raises:
        RunError: nothing is called so.
    """
    store = Path(uri.removeprefix("sqlite:///"))
    runs: list[Run] = []
    client = MlflowClient(uri)
    if not uri.startswith("sqlite:") or store.exists():  # a look must not make a store
        with asked(uri, "list its runs"):
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            runs = search_runs(client, experiments)
    chosen: dict[str, Run] = {}
    for name in names_or_ids:
        found = [run for run in runs if run.info.run_id.startswith(name)] if len(name) >= 8 else []
        found = found or [run for run in runs if run.info.run_name == name]
        if not found:
            raise RunError(f"no run or sweep {name!r} in MLflow at {uri}; `phisam ui` lists them")
        for run in found:
            for member in _members(runs, run):
                chosen.setdefault(member.info.run_id, member)
    return _records(uri, client, chosen.values(), metrics)


@dataclass(frozen=True)
class Sweep:
    """A sweep as MLflow has it. description: its sweep.yaml, resolved; None: it has none."""

    parent: RunRecord
    trials: list[RunRecord]
    metric: str
    mode: str
    description: str | None


def read_sweep(uri: str, name_or_id: str) -> Sweep:
    """Parent, trials and what was optimised.

    Raises:
        RunError: there is no such run, or it is no sweep.
    """
    found = find_run(uri, name_or_id)
    if found.data.tags.get("phisam.kind") != "sweep":
        raise RunError(f"{name_or_id!r} is a single run, not a sweep: `phisam compare {name_or_id} ...` compares runs")
    client = MlflowClient(uri)
    with asked(uri, f"give sweep {name_or_id}"):
        parent = _record(client, found, None)
    description = read_text(uri, parent.run_id, "sweep.yaml")
    described = read_yaml(description, f"sweep.yaml of {parent.run_id}").value if description else {}
    metric = str(described.get("metric", "accuracy/validation"))
    mode = str(described.get("mode", "max" if better_is_more(metric) else "min"))
    return Sweep(parent, read_children(uri, parent.run_id), metric, mode, description)


def read_text(uri: str, run_id: str, path: str) -> str | None:
    """A text artifact, such as sweep.yaml; None: the run has none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Not MlflowClient's: it looks at MLflow's default store too, and makes one in the current folder.
            file = download_artifacts(artifact_uri=f"runs:/{run_id}/{path}", dst_path=folder, tracking_uri=uri)
            return Path(file).read_text(encoding="utf-8")
        except (MlflowException, OSError):
            return None


def _members(runs: Iterable[Run], run: Run) -> list[Run]:
    """A sweep's trials in their order, or the run itself."""
    if run.data.tags.get("phisam.kind") != "sweep":
        return [run]
    trials = [other for other in runs if other.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    return sorted(trials, key=lambda trial: int(trial.data.tags.get("phisam.trial", -1)))


def _records(uri: str, client: MlflowClient, runs: Iterable[Run], metrics: Sequence[str] | None) -> list[RunRecord]:
    with asked(uri, "give its metrics"), ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda run: _record(client, run, metrics), runs))


def _record(client: MlflowClient, run: Run, metrics: Sequence[str] | None) -> RunRecord:
    tags, info = run.data.tags, run.info
    wanted = [m for m in run.data.metrics if (not m.startswith(NOT_READ) if metrics is None else m in metrics)]
    last = int(tags["phisam.stopped_epoch"]) if "phisam.stopped_epoch" in tags else None
    curves = {metric: _curve(client.get_metric_history(info.run_id, metric), last) for metric in wanted}
    return RunRecord(
        run_id=info.run_id,
        name=info.run_name or info.run_id[:8],
        status=info.status,
        parent_id=tags.get("mlflow.parentRunId"),
        params=run.data.params,
        tags=tags,
        curves={metric: curve for metric, curve in curves.items() if curve.epochs},
        spent={cost: run.data.metrics[cost] for cost in COSTS if cost in run.data.metrics},
        started_ms=info.start_time or 0,
        reported=frozenset(run.data.metrics),
    )


def _curve(history: Iterable[Metric], last: int | None) -> Curve:
    """By epoch; an epoch that was written twice counts with its newest value."""
    newest = {m.step: m.value for m in sorted(history, key=lambda m: (m.step, m.timestamp))}
    kept = [(epoch, value) for epoch, value in newest.items() if last is None or epoch <= last]
    return Curve(tuple(epoch for epoch, _ in kept), tuple(value for _, value in kept))
