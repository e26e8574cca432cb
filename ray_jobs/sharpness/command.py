"""What `phisam sharpness` does: finds a model and its data, measures, prints a table, and logs to the model's run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ray_jobs import cluster
from ray_jobs.config import RunConfig, changed, load
from ray_jobs.data import load_dataset
from ray_jobs.errors import ConfigError
from ray_jobs.explain import validated
from ray_jobs.sharpness.config import SharpnessConfig
from ray_jobs.sharpness.job import Job
from ray_jobs.sharpness.measuring import Measured, check_measurable, has_batch_norm, measuring_batches
from ray_jobs.tracking import Tracker
from ray_jobs.tracking.models import Found, find_model
from ray_jobs.whole_table import print_whole
from ray_jobs.yaml_source import read_yaml, write_yaml

POLL_SECONDS = 0.25
Place = tuple[str, int, int] | None


@dataclass(frozen=True)
class Asked:
    """The command's arguments. settings: of SharpnessConfig, those that were given."""

    model: str
    which: str
    run: str | None
    overrides: Sequence[str]
    settings: Mapping[str, Any]
    budget: float | None
    num_workers: int
    address: str | None
    verbose: bool


def measure_model(asked: Asked, console: Console) -> Measured:
    """The whole command.

    Raises:
        ConfigError: a mistake in what was asked for.
        RunError: there is no such model, or it cannot be measured.
    """
    found = find_model(asked.model, asked.which, load(asked.run) if asked.run else None)
    workers = [f"scaling.num_workers={asked.num_workers}", "optimizer.sample_parallel=auto"]
    config = changed(found.config, [*asked.overrides, *workers])
    wanted = _wanted(config, asked.settings)
    dataset = load_dataset(config.data, config.training.seed)
    if config.data == found.config.data:
        found.check_data(dataset)
    model = replace(found, config=config).model(dataset)
    check_measurable(model, dataset, wanted)
    dtype = torch.float64 if config.training.precision == "float64" else torch.float32
    batches = measuring_batches(dataset, wanted.examples, config.training.seed, dtype)
    job = Job(model, batches, wanted, config.optimizer, config.training.seed, asked.budget)
    if has_batch_norm(model):
        console.print("BatchNorm: measured in evaluation mode, with its running statistics", highlight=False)
    started = time.monotonic()
    result = _measured(config, job, asked, console)
    examples = sum(len(labels) for _, labels in batches)
    d = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _print(found, result, f"{examples} training examples of {dataset.name}, d = {d:,}", console)
    for remark in result.remarks:
        console.print(f"note: {remark}", highlight=False)
    console.print(f"{time.monotonic() - started:.1f} s on {asked.num_workers} worker(s)", highlight=False)
    _log(found, result, console)
    return result


def _wanted(config: RunConfig, settings: Mapping[str, Any]) -> SharpnessConfig:
    """The arguments over the run's own section, if it has one."""
    own = config.sharpness or SharpnessConfig()
    source = read_yaml(write_yaml({**own.model_dump(mode="json"), **settings}), "phisam sharpness")
    wanted = validated(SharpnessConfig, source)
    if "measure" in wanted.measures and config.optimizer.measure.name == "sgd":
        raise ConfigError(
            "sharpness: measure is S(x) of the run's own measure, and sgd has none: --set optimizer.measure=NAME"
        )
    return wanted


def _measured(config: RunConfig, job: Job, asked: Asked, console: Console) -> Measured:
    with _bar(console) as show:
        if asked.num_workers == 1 and asked.address is None:
            use_gpu = torch.cuda.is_available() and config.scaling.use_gpu is not False
            device = torch.device("cuda" if use_gpu else "cpu")
            return job.measured(device, None, lambda *place: show(place))
        from ray_jobs.sharpness.on_ray import measured_on_ray

        with cluster.connected(asked.address, asked.num_workers, asked.verbose):
            return measured_on_ray(config, job, lambda read: _polled(read, show))


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[Place], None]]:
    """A bar for each measure, drawn in a terminal alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(place: Place) -> None:
            if place is not None:
                what, done, total = place
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done, total=total)

        yield show


@contextmanager
def _polled(read: Callable[[], Place], show: Callable[[Place], None]) -> Iterator[None]:
    """Reads the workers' place now and then while the driver waits for them."""
    stop = Event()

    def poll() -> None:
        while not stop.wait(POLL_SECONDS):
            try:
                show(read())
            except Exception:  # a desk that does not answer yet, or no more: the driver will say why
                continue

    thread = Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _print(found: Found, result: Measured, what: str, console: Console) -> None:
    at = "" if found.epoch is None else f", epoch {found.epoch}"
    console.print(f"{found.where}{at}\n{what}, loss {result.loss:.4g}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("measure", no_wrap=True)
    for name in ("value", "standard error", "relative", "probes"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in result.estimates:
        relative = f"{estimate.standard_error / abs(estimate.value):.1%}" if estimate.value else "-"
        probes = str(estimate.probes) if estimate.probes else "exact"
        table.add_row(estimate.name, f"{estimate.value:.6g}", f"{estimate.standard_error:.2g}", relative, probes)
    if result.estimates:
        print_whole(table, console)


def _log(found: Found, result: Measured, console: Console) -> None:
    """Into the model's run, at the model's epoch."""
    if found.uri is None or found.run_id is None:
        console.print("not logged: no MLflow run is known for this model", highlight=False)
    tracker = None if found.uri is None or found.run_id is None else Tracker(found.uri, found.run_id)
    if tracker is not None:
        step = {"epoch": found.epoch or 0, "timestamp_ms": round(time.time() * 1000)}
        if result.estimates:
            tracker.log_epoch({**step, **result.metrics()})
            console.print(f"logged to run {found.run_id} as hessian/... at step {step['epoch']}", highlight=False)
    if result.density is None:
        return
    from ray_jobs.sharpness.pictures import FOLDER, write_density

    name = "spectral_density" if found.epoch is None else f"spectral_density-epoch{found.epoch}"
    if tracker is None:
        paths = write_density(result.density, found.where, Path.cwd(), name)
        console.print("\n".join(["Written:", *map(str, paths)]), highlight=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = write_density(result.density, found.where, Path(folder), name)
        tracker.log_files(paths, FOLDER)
    names = ", ".join(path.name for path in paths)
    console.print(f"logged to run {found.run_id}: {FOLDER}/{{{names}}}", highlight=False, soft_wrap=True)
