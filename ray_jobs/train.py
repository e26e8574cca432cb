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
from rich.text import Text

import phisam
from ray_jobs import attempts, checkpoint, checkpoints, divergence, source
from ray_jobs.callback import EpochCallback
from ray_jobs.cluster import beside_driver, checked_resources, only_loopback
from ray_jobs.config import RunConfig, TrackingConfig, dump_yaml, load
from ray_jobs.data import Dataset, check_batch_size, load_dataset
from ray_jobs.disk import write_whole
from ray_jobs.errors import ConfigError, RunError, Terminated, first_line
from ray_jobs.grace import saved_on_sigterm
from ray_jobs.jobs import heartbeat
from ray_jobs.models import make_model
from ray_jobs.paths import runs_folder
from ray_jobs.progress import Board, Metrics, ProgressView, Summary
from ray_jobs.sharpness.measuring import check_measurable
from ray_jobs.tracking import Tracker, find_run, open_store, provenance, tracking_uri
from ray_jobs.tracking.writer import INTERRUPTED_PATIENCE, Writer
from ray_jobs.trainer import alone, made, make_trainer
from ray_jobs.user_code import CODE_TAG, OwnCode, changed
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
    tags = {**provenance(dataset.fingerprint), **OwnCode.of(config).tags(), "device": "cuda" if use_gpu else "cpu"}
    tracker = Tracker.start(tracking_uri(config.tracking, runs), runs, config, tags)
    folder = storage / tracker.run_id
    try:
        write_whole(made(folder) / DESCRIPTION, dump_yaml(config))
        tracker.log_texts(source.carried()[1])
    except BaseException as error:  # it has no journal yet, from which its end would be told
        with contextlib.suppress(RunError):
            tracker.finish("FAILED")
        if isinstance(error, OSError):
            raise RunError(f"{folder / DESCRIPTION} cannot be written ({error.strerror})") from None
        raise
    return _fit(config, dataset, tracker, folder, use_gpu, console)


@dataclass(frozen=True)
class Unfinished:
    """A run that can go on: its description, its MLflow run, and the folder with its checkpoints."""

    config: RunConfig
    run_id: str
    fingerprint: str | None
    code: str | None
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
        if folder.name != run.info.run_id:  # MLflow's word, which others may write
            raise RunError(f"run {run.info.run_id}: its tag phisam.folder names {folder}, which is no run's folder")
    if not (folder / DESCRIPTION).exists():
        raise RunError(f"run {run.info.run_id}: {folder / DESCRIPTION} is missing, so it cannot be resumed from here")
    config = load(str(folder / DESCRIPTION))
    if run.data.tags.get("phisam.kind") == "trial":
        sweep = run.data.tags.get("mlflow.parentRunId")
        raise RunError(f"run {run.info.run_id} is a trial of a sweep: phisam sweep --resume {sweep}")
    if run.info.status == "FINISHED":
        raise RunError(f"run {run.info.run_id} ({config.name}) is finished: there is nothing to resume")
    tags = run.data.tags
    return Unfinished(config, run.info.run_id, tags.get("data.fingerprint"), tags.get(CODE_TAG), folder)


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
    tracker = Tracker(tracking_uri(config.tracking, runs_folder()), run.run_id)
    if warning := changed(run.code, OwnCode.of(config).fingerprint):
        console.print(f"{config.name}: {warning}", highlight=False, soft_wrap=True)
    return _fit(config, dataset, tracker, run.folder, use_gpu, console)


def _fit(
    config: RunConfig, dataset: Dataset, tracker: Tracker, folder: Path, use_gpu: bool, console: Console
) -> Summary:
    """Trains to the end, whatever was done before; leaves MLflow with a true status."""
    started = time.monotonic()
    with alone(folder, "run"), _told_to_mlflow(config, dataset, tracker, folder, console) as writer:
        writer.tag(tracker.run_id, {"phisam.folder": str(folder)})
        for metrics in checkpoints.saved_history(folder):
            writer.epoch(tracker.run_id, metrics)
        board = beside_driver(Board)
        trainer = make_trainer(
            train_loop,
            config,
            {"board": board, "own": OwnCode.of(config).settings(), "fingerprint": dataset.fingerprint},
            folder,
            [EpochCallback(board)],
            use_gpu=use_gpu,
            loopback=only_loopback(),
            max_failures=MAX_FAILURES,
        )

        def read(events_seen: int) -> tuple[Metrics, list[Metrics | str]]:
            word: tuple[Metrics, list[Metrics | str]] = ray.get(board.read.remote(events_seen), timeout=10)
            heartbeat.tell_run(tracker.run_id, config.name, config.training.epochs, *word)
            for event in word[1]:
                if not isinstance(event, str):
                    writer.epoch(tracker.run_id, event)
            return word

        told_to_end = False
        try:
            with (
                ProgressView(console, config.name, config.training.epochs, read),
                saved_on_sigterm(board.stop.remote, config.checkpoint.grace_seconds),
            ):
                fit(trainer)
        except Terminated:  # Ray takes seconds to end workers that are done
            if len(checkpoints.saved_history(folder)) < config.training.epochs:
                raise
            told_to_end = True
        if diagnosis := divergence.why_ended(folder):
            writer.tag(tracker.run_id, {divergence.FAILURE_TAG: diagnosis})
            raise RunError(f"run {tracker.run_id}: {diagnosis}. Its checkpoints are kept in {folder}")
        newest = checkpoints.newest(folder)
        if newest is None:
            raise RunError(f"run {tracker.run_id}: Ray Train ended without a checkpoint")
        history = checkpoint.load_history(newest)
        ends_with = fault_tags(folder) | divergence.tags(checkpoint.load(newest))
        writer.end(tracker.run_id, "FINISHED", ends_with, history)
    if told_to_end:  # no other run begins after this one
        raise Terminated(f"told to end (SIGTERM); run {tracker.run_id} had trained all its epochs and is finished")
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
    optimizer, training = config.optimizer, config.training
    measure = make_measure(optimizer)
    for workers in config.scaling.sizes:
        sample_size = phisam.sample_size(workers, optimizer.n_samples, optimizer.sample_parallel, measure)
        check_batch_size(training.batch_size, len(dataset.train), workers // sample_size, training.micro_batches)


def log_models(config: RunConfig, dataset: Dataset, tracker: Tracker, state: dict[str, Any]) -> None:
    """The last model, and the best by validation, as MLflow models on the CPU, unless it has them."""
    dtype = torch.float64 if config.training.precision == "float64" else torch.float32
    example = dataset.normalizer(dtype)(dataset.validation.images[:1].repeat(2, 1, 1, 1))  # 2: a batch of any size
    best = state["best"]
    logged = tracker.models()
    for name, weights, epoch in (("last", state["model"], state["epoch"]), ("best", best["model"], best["epoch"])):
        if name in logged:
            continue
        model = make_model(config.model, dataset.input_shape, dataset.num_classes, config.training.seed).to(dtype)
        checkpoint.load_model(model, weights, f"run {tracker.run_id}")
        metadata = {"epoch": epoch, "mean": dataset.mean.tolist(), "std": dataset.std.tolist()}
        tracker.log_model(name, model, example, metadata)


def fault_tags(folder: Path) -> dict[str, str]:
    """What faults cost the run in a folder, for MLflow; nothing if there were none."""
    told, aside = attempts.read(folder), [path.name for path in checkpoints.damaged(folder)]
    tags = {"phisam.damaged_checkpoints": ", ".join(aside)} if aside else {}
    if told is not None and told.restarts:
        tags |= {"phisam.restarts": str(told.restarts), "phisam.wasted_steps": str(told.wasted_steps)}
    return tags


def log_results(config: RunConfig, folder: Path, tracker: Tracker, dataset: Dataset | None = None) -> None:
    """What a finished run leaves in MLflow beside its epochs, from its newest checkpoint. May be done again.

    Args:
        dataset: its own, if that is loaded.

    Raises:
        ConfigError, RunError: the data or the checkpoint is gone, or MLflow does not answer.
    """
    newest = checkpoints.usable(folder)
    if newest is None:
        raise RunError(f"run {tracker.run_id}: there is no checkpoint in {folder} whose models could be logged")
    log_models(config, dataset or checked(config), tracker, checkpoint.load(newest))
    if config.sharpness is not None:
        from ray_jobs.sharpness.pictures import log_curves  # matplotlib takes a second: for those who need it

        log_curves(tracker, config.name, checkpoint.load_history(newest))


@contextlib.contextmanager
def _told_to_mlflow(
    config: RunConfig, dataset: Dataset, tracker: Tracker, folder: Path, console: Console
) -> Iterator[Writer]:
    """Who tells MLflow. A run ends FINISHED, KILLED on Ctrl-C and SIGTERM, or FAILED on any error; its journal says so
    where MLflow is away, and nothing here waits for it longer than the writer's patience.
    """

    def interrupt(*_: object) -> None:
        raise Terminated("told to end (SIGTERM)")

    def say(line: str) -> None:
        console.print(Text(f"{config.name}: {line}"), soft_wrap=True)

    run_id = tracker.run_id

    def new_writer() -> Writer:
        return Writer(tracker.uri, folder, say, lambda of: log_results(config, folder, of, dataset))

    writer, closed = new_writer(), False
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        writer.reopen(run_id)
        yield writer
        try:
            writer.close()
        except RunError:
            if not writer.is_away:
                closed = True
                raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        if not (interrupted and writer.status(run_id) == "FINISHED"):
            if not isinstance(error, ConfigError):
                error.add_note(f"to go on with it: phisam train --resume {run_id}")
            last = new_writer() if closed else writer
            status, history = "KILLED" if interrupted else "FAILED", []
            with contextlib.suppress(RunError):  # a disk that fails has told of the epochs before, or --resume will
                history = checkpoints.saved_history(folder)
            with contextlib.suppress(RunError):  # a full disk's words must not stand in place of the run's own
                last.end(run_id, status, fault_tags(folder), history)
                last.close(INTERRUPTED_PATIENCE)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        if writer.untold(run_id) and not closed:
            say(f"MLflow was not told all of it; it is kept: phisam sync {run_id} tells it once MLflow answers")
