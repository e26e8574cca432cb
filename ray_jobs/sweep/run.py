"""A sweep from its file to its winner, and again from where it was killed."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import ray
from rich.console import Console

from ray_jobs import source
from ray_jobs.cluster import beside_driver
from ray_jobs.disk import write_whole
from ray_jobs.errors import RunError
from ray_jobs.jobs import heartbeat
from ray_jobs.journal import Journal
from ray_jobs.paths import runs_folder
from ray_jobs.sweep import executor
from ray_jobs.sweep.begun import Found, check_name
from ray_jobs.sweep.conclusion import conclude
from ray_jobs.sweep.config import SweepConfig, dump_sweep
from ray_jobs.sweep.driver import Driver, sigterm_as_interrupt
from ray_jobs.sweep.journal import DESCRIPTION, JOURNAL
from ray_jobs.sweep.ledger import Ledger, Trial
from ray_jobs.sweep.prepare import Checks, concurrency
from ray_jobs.sweep.progress import SweepBoard, SweepView
from ray_jobs.sweep.search import Search, make_search
from ray_jobs.sweep.stopping import make_stopping
from ray_jobs.sweep.variety import variety
from ray_jobs.tracking import provenance, tracking_uri
from ray_jobs.tracking.sweep import SweepTracker
from ray_jobs.tracking.writer import INTERRUPTED_PATIENCE, Writer
from ray_jobs.trainer import alone, made


def start(sweep: SweepConfig, console: Console, max_concurrent: int | None, register: str | None) -> None:
    """A new sweep, on the Ray that `connected` started or joined.

    Raises:
        ConfigError: it asks for what the data, the models or the cluster cannot give.
        RunError: it failed, or no trial came to its end.
    """
    check_name(sweep)
    checks, runs = Checks(), made(runs_folder())
    shapes = variety(sweep, "scaling")
    at_once = concurrency(shapes, checks, max_concurrent or sweep.max_concurrent)
    search = make_search(sweep, at_once)
    at_once = min(at_once, search.n_trials)
    fingerprints = checks.data(sweep)
    checks.known_trials(sweep, search)
    first = shapes[0]
    made(first.checkpoint.storage or runs)
    data = fingerprints[0] if len(fingerprints) == 1 else f"{len(fingerprints)} data sets: see the trials"
    tags = {**provenance(data), "mlflow.note.content": sweep.description}
    uri = tracking_uri(first.tracking, runs)
    tracker = SweepTracker.start(uri, runs, first.tracking.experiment, sweep.name, tags)
    with sigterm_as_interrupt(), _true_end(tracker):
        folder = made(runs / tracker.run_id)
        write_whole(folder / DESCRIPTION, dump_sweep(sweep))
        with alone(folder, "sweep"):
            journal = Journal(folder / JOURNAL)
            journal.append({"event": "begin", "max_concurrent": at_once, "register": register, "time": time.time()})
            trouble = _go(Found(sweep, folder), journal, tracker, checks, console, at_once)
    if trouble is not None:
        raise RunError(trouble)


def resume(found: Found, console: Console, max_concurrent: int | None, register: str | None) -> None:
    """Goes on with a sweep and ends as the undisturbed one would.

    Raises:
        ConfigError: the cluster, or the data folder, cannot give any more what it needs.
        RunError: another process drives it, it is over, its data changed, or it failed.
    """
    with alone(found.folder, "sweep"):
        journal = Journal(found.folder / JOURNAL)
        if not journal.events:
            raise RunError(f"{found.folder / JOURNAL} is empty: the sweep had not begun; start it anew")
        over = found.over
        if over and register is None:
            raise RunError(f"sweep {found.sweep.name} ({found.folder.name}) is over: there is nothing to resume")
        sweep, checks = found.sweep, Checks()
        shapes = variety(sweep, "scaling")
        if max_concurrent is None:
            max_concurrent = min(journal.events[0]["max_concurrent"], concurrency(shapes, checks, None))
        at_once = concurrency(shapes, checks, max_concurrent)
        if not over:
            checks.data(sweep)
            checks.same_data(sweep, journal.events)
            if warning := checks.changed_code(sweep, journal.events):
                console.print(f"{sweep.name}: {warning}", highlight=False, soft_wrap=True)
        tracker = SweepTracker(tracking_uri(shapes[0].tracking, runs_folder()), found.folder.name)
        ending: AbstractContextManager[None] = contextlib.nullcontext() if over else _true_end(tracker)
        with sigterm_as_interrupt(), ending:
            if not over:
                tracker.reopen()
            if register is not None:
                journal.append({"event": "register", "register": register})
            trouble = _go(found, journal, tracker, checks, console, at_once)
    if trouble is not None:
        raise RunError(trouble)


def _go(
    found: Found, journal: Journal, tracker: SweepTracker, checks: Checks, console: Console, at_once: int
) -> str | None:
    """All of a sweep that is not done yet; what went wrong, though it is over."""
    sweep, folder = found.sweep, found.folder
    search = make_search(sweep, journal.events[0]["max_concurrent"])
    tracker.describe(
        _parameters(sweep, search),
        {"phisam.folder": str(folder)},
        {DESCRIPTION: dump_sweep(sweep), **source.carried()[1]},
    )
    ledger = Ledger(search, make_stopping(sweep))
    board = beside_driver(SweepBoard)

    def read(lines_seen: int) -> Any:
        return ray.get(board.read.remote(lines_seen), timeout=10)

    def trials() -> list[Trial]:
        return list(ledger.trials.values())

    heartbeat.watch_sweep(folder.name, sweep.name, lambda: [trial.status for trial in trials()], search.n_trials)
    epochs: dict[int, int] = {}
    view = SweepView(console, sweep.name, sweep.metric, search.n_trials, epochs, trials, read)
    view.say(f"sweep {folder.name}: {search.n_trials} trials, {at_once} at once")
    writer = Writer(tracker.uri, folder, view.say)
    driver = Driver(
        sweep,
        folder,
        runs_folder(),
        journal,
        ledger,
        search,
        tracker,
        writer,
        checks,
        view.say,
        at_once,
        board=board,
        epochs=epochs,
    )
    with _trials_ended(driver):
        driver.replay()
        if not driver.over:
            driver.view = view
            with view:
                shutil.rmtree(folder / "tune", ignore_errors=True)  # what an earlier driver's Tune left
                executor.run(driver, folder / "tune")
        writer.close()
        status, trouble = conclude(driver, console)
    shutil.rmtree(folder / "tune", ignore_errors=True)
    tracker.finish(status)
    if not found.over:  # after MLflow: a sweep that is over is never looked at again
        journal.append({"event": "end", "time": time.time()})
    return trouble


def _parameters(sweep: SweepConfig, search: Search) -> dict[str, str]:
    """What the parent run says of the sweep."""
    told = sweep.model_dump(mode="json")
    params = {key: str(told[key]) for key in ("search", "stopping", "metric", "resource")}
    return {**params, "trials": str(search.n_trials), **{f"space.{k}": str(part) for k, part in told["space"].items()}}


@contextlib.contextmanager
def _trials_ended(driver: Driver) -> Iterator[None]:
    """MLflow does not say that trials of a sweep run that was stopped."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RunError):  # if MLflow is the trouble, the error says so already
            driver.interrupted()
            driver.writer.close(INTERRUPTED_PATIENCE)
        raise


@contextlib.contextmanager
def _true_end(tracker: SweepTracker) -> Iterator[None]:
    """MLflow says that a sweep was stopped or failed, and the person how to go on with it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"to go on with it: phisam sweep --resume {tracker.run_id}")
        with contextlib.suppress(RunError):
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
