"""The driver: a run description -> Ray Train workers -> an MLflow run with metrics and models.

Everything that can be known to be wrong is said before a worker starts. A run survives: a worker that dies is started
again from the newest checkpoint by Ray Train; a driver that dies is followed by `phisam train --resume RUN_ID`, which
gives Ray Train the same name and storage, and MLflow the same run.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from rich.console import Console

import phisam
from ray_jobs import checkpoint
from ray_jobs.callback import EpochCallback, EpochWriter
from ray_jobs.cluster import checked_resources, only_loopback
from ray_jobs.config import RunConfig, TrackingConfig, dump_yaml, load
from ray_jobs.data import Dataset, check_batch_size, load_dataset
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.models import make_model
from ray_jobs.paths import runs_folder
from ray_jobs.progress import Board, Metrics, ProgressView, Summary
from ray_jobs.sharpness.measuring import check_measurable
from ray_jobs.tracking import Tracker, find_run, open_store, provenance, tracking_uri
from ray_jobs.trainer import alone, made, make_trainer, saved_history
from ray_jobs.worker import make_measure, train_loop

MAX_FAILURES = 3  # a worker that dies while it starts counts as the controller's failure
DESCRIPTION = "run.yaml"
KEY_TAG = "phisam.key"


def prepared(config: RunConfig) -> Dataset:
    """What the first of a command's runs needs before Ray is there: its data set, checked, and the tracking store.

    Raises:
        ConfigError, RunError: as `train`.
    """
    dataset = checked(config)
    open_store(tracking_uri(config.tracking, made(runs_folder())))
    return dataset


def train(config: RunConfig, console: Console, dataset: Dataset | None = None) -> Summary:
    """A new run, on the Ray that `connected` started or joined.

    Args:
        dataset: its own, from `prepared`, if that was called.

    Raises:
        ConfigError: the description asks for what the data, the model or the cluster cannot give.
        RunError: the run failed.
    """
    dataset = dataset or checked(config)
    use_gpu = checked_resources(config)
    runs = runs_folder()
    storage = config.checkpoint.storage or runs
    for folder in (runs, storage):
        made(folder)
    tags = {**provenance(dataset.fingerprint), "device": "cuda" if use_gpu else "cpu"}
    tracker = Tracker.start(tracking_uri(config.tracking, runs), runs, config, tags)
    folder = made(storage / tracker.run_id)
    (folder / DESCRIPTION).write_text(dump_yaml(config), encoding="utf-8")
    return _fit(config, dataset, tracker, folder, use_gpu, console)


@dataclass(frozen=True)
class Unfinished:
    """A run that can go on: its description, its MLflow run, and the folder with its checkpoints."""

    config: RunConfig
    run_id: str
    fingerprint: str | None
    folder: Path


def unfinished(name_or_id: str) -> Unfinished:
    """The run that `--resume` names.

    Raises:
        RunError: there is no such run, its files are gone, or it is finished.
    """
    runs = runs_folder()
    here = [path.parent for path in runs.glob(f"*/{DESCRIPTION}") if path.parent.name.startswith(name_or_id)]
    if len(name_or_id) >= 8 and len(here) == 1:  # its description says which MLflow it is in
        folder = here[0]
        run = find_run(tracking_uri(load(str(folder / DESCRIPTION)).tracking, runs), folder.name)
    else:
        run = find_run(tracking_uri(TrackingConfig(), runs), name_or_id)
        folder = Path(run.data.tags.get("phisam.folder", str(runs / run.info.run_id)))
    if not (folder / DESCRIPTION).exists():
        raise RunError(f"run {run.info.run_id}: {folder / DESCRIPTION} is missing, so it cannot be resumed from here")
    config = load(str(folder / DESCRIPTION))
    if run.data.tags.get("phisam.kind") == "trial":
        sweep = run.data.tags.get("mlflow.parentRunId")
        raise RunError(f"run {run.info.run_id} is a trial of a sweep: phisam sweep --resume {sweep}")
    if run.info.status == "FINISHED":
        raise RunError(f"run {run.info.run_id} ({config.name}) is finished: there is nothing to resume")
    return Unfinished(config, run.info.run_id, run.data.tags.get("data.fingerprint"), folder)


def with_key(config: RunConfig, key: str) -> RunConfig:
    """The run with a key of its own, by which `begun` finds it again; the key is a tag of it in MLflow too."""
    tags = {**config.tracking.tags, KEY_TAG: key}
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"tags": tags})})


def begun(config: RunConfig) -> str | None:
    """The id of the run that was begun with the key of `config`; None if there is none.

    Raises:
        ConfigError: it has another description.
    """
    key = config.tracking.tags[KEY_TAG]
    for path in (config.checkpoint.storage or runs_folder()).glob(f"*/{DESCRIPTION}"):
        if f"{KEY_TAG}: {key}" not in path.read_text(encoding="utf-8"):
            continue  # without reading it as a description: it may be of another version of phisam
        other = load(str(path))
        if other.tracking.tags.get(KEY_TAG) != key:
            continue
        if other != config:
            raise ConfigError(
                f"train --key: run {path.parent.name} was begun with this key and has another description, {path}: "
                "give another key, or that description"
            )
        return path.parent.name
    return None


def is_finished(config: RunConfig, run_id: str) -> bool:
    """Whether a run has come to its end."""
    status: str = find_run(tracking_uri(config.tracking, runs_folder()), run_id).info.status
    return status == "FINISHED"


def resume(run: Unfinished, console: Console, dataset: Dataset | None = None) -> Summary:
    """Goes on from the newest checkpoint of a run and ends as the undisturbed run would, bit for bit.

    Args:
        dataset: its own, from `prepared`, if that was called.

    Raises:
        RunError: the data changed, or the run failed.
    """
    config = run.config
    dataset = dataset or checked(config)
    use_gpu = checked_resources(config)
    if run.fingerprint != dataset.fingerprint:
        raise RunError(
            f"run {run.run_id} began on data with fingerprint {run.fingerprint}, but {config.data.name} is "
            f"{dataset.fingerprint} now: the data files changed, so it cannot go on as if they had not"
        )
    tracker = Tracker.resume(tracking_uri(config.tracking, runs_folder()), run.run_id)
    return _fit(config, dataset, tracker, run.folder, use_gpu, console)


def _fit(
    config: RunConfig, dataset: Dataset, tracker: Tracker, folder: Path, use_gpu: bool, console: Console
) -> Summary:
    """Trains to the end, whatever was done before; leaves MLflow with a true status."""
    started = time.monotonic()
    with alone(folder, "run"), _true_status(tracker, folder):
        tracker.set_tags({"phisam.folder": str(folder)})
        tracker.reconcile(saved_history(folder))
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        trainer = make_trainer(
            train_loop,
            config,
            {"board": board},
            folder,
            [EpochCallback(board)],
            use_gpu=use_gpu,
            loopback=only_loopback(),
            max_failures=MAX_FAILURES,
        )
        writer = EpochWriter(tracker.uri, tracker.run_id, tracker.logged_epochs())

        def read(events_seen: int) -> tuple[Metrics, list[Metrics | str]]:
            word: tuple[Metrics, list[Metrics | str]] = ray.get(board.read.remote(events_seen), timeout=10)
            for event in word[1]:
                if not isinstance(event, str):
                    writer.put(event)
            return word

        with ProgressView(console, config.name, config.training.epochs, read):
            result = fit(trainer)
        if result.checkpoint is None:
            raise RunError(f"run {tracker.run_id}: Ray Train ended without a checkpoint")
        with result.checkpoint.as_directory() as newest:
            state, history = checkpoint.load(Path(newest)), checkpoint.load_history(Path(newest))
        tracker.reconcile(history)
        log_models(config, dataset, tracker, state)
        if config.sharpness is not None:
            from ray_jobs.sharpness.pictures import log_curves  # matplotlib takes a second: for those who need it

            log_curves(tracker, config.name, history)
    measure = make_measure(config.optimizer)
    n_samples = measure.n_points(config.optimizer.n_samples)
    return Summary(config.name, tracker.run_id, measure.name, n_samples, history, time.monotonic() - started)


def fit(trainer: TorchTrainer, what: str = "training") -> ray.train.Result:
    """`fit`, with a worker's own error in place of a traceback through Ray, and Ctrl-C as everywhere in Python.

    what: was done, for the words of a failure.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:  # Ray's way out of Ctrl-C
        raise KeyboardInterrupt from None
    except WorkerGroupError as error:
        raise _told(what, next(iter(error.worker_failures.values()), error)) from error
    except ControllerError as error:
        raise _told(what, error.controller_failure) from error
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise _told(what, error) from error
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray's handler would stay, and swallow Ctrl-C from here on


def _told(what: str, error: BaseException) -> Exception:
    """The user's mistake as it was raised in a worker, else a failure in one line."""
    if isinstance(error, ConfigError | RunError):
        return error
    return RunError(f"{what} failed ({type(error).__name__}): {first_line(error)}; --verbose shows all of it")


def checked(config: RunConfig) -> Dataset:
    """The data set, loaded (and downloaded) once before workers start; everything that must fit together does."""
    dataset = load_dataset(config.data, config.training.seed)
    check_fit(config, dataset)
    return dataset


def check_fit(config: RunConfig, dataset: Dataset) -> None:
    """Model, batch and workers against the data.

    Raises:
        ConfigError: they do not fit.
    """
    model = make_model(config.model, dataset.input_shape, dataset.num_classes, config.training.seed)
    if config.sharpness is not None:
        check_measurable(model, dataset, config.sharpness)
    optimizer, training, workers = config.optimizer, config.training, config.scaling.num_workers
    measure = make_measure(optimizer)
    sample_size = phisam.sample_size(workers, optimizer.n_samples, optimizer.sample_parallel, measure)
    check_batch_size(training.batch_size, len(dataset.train), workers // sample_size, training.micro_batches)


def log_models(config: RunConfig, dataset: Dataset, tracker: Tracker, state: dict[str, Any]) -> None:
    """The last model, and the best by validation, as MLflow models on the CPU."""
    dtype = torch.float64 if config.training.precision == "float64" else torch.float32
    example = dataset.normalizer(dtype)(dataset.validation.images[:1].repeat(2, 1, 1, 1))  # 2: a batch of any size
    best = state["best"]
    for name, weights, epoch in (("last", state["model"], state["epoch"]), ("best", best["model"], best["epoch"])):
        model = make_model(config.model, dataset.input_shape, dataset.num_classes, config.training.seed).to(dtype)
        checkpoint.load_model(model, weights, f"run {tracker.run_id}")
        metadata = {"epoch": epoch, "mean": dataset.mean.tolist(), "std": dataset.std.tolist()}
        tracker.log_model(name, model, example, metadata)


@contextlib.contextmanager
def _true_status(tracker: Tracker, folder: Path) -> Iterator[None]:
    """FINISHED at the end, KILLED on Ctrl-C and SIGTERM, FAILED on any error, with the epochs that were trained."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ConfigError):
            error.add_note(f"to go on with it: phisam train --resume {tracker.run_id}")
        with contextlib.suppress(RunError):  # if MLflow is the trouble, the error says so already
            tracker.reconcile(saved_history(folder))
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    else:
        tracker.finish("FINISHED")
    finally:
        signal.signal(signal.SIGTERM, previous)
