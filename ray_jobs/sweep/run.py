"""A sweep from its file to its winner, and again from where it was killed."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from ray_jobs import checkpoint
from ray_jobs.config import RunConfig
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.paths import runs_folder
from ray_jobs.sweep import executor, outcome
from ray_jobs.sweep.config import SweepConfig, dump_sweep, load_sweep
from ray_jobs.sweep.driver import DESCRIPTION, JOURNAL, Driver, sigterm_as_interrupt
from ray_jobs.sweep.journal import Journal, read_journal
from ray_jobs.sweep.ledger import Ledger, Trial
from ray_jobs.sweep.prepare import Checks, concurrency
from ray_jobs.sweep.progress import SweepBoard, SweepView
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.stopping import make_stopping
from ray_jobs.tracking import Tracker, provenance, tracking_uri
from ray_jobs.tracking.sweep import SweepTracker, Writer
from ray_jobs.train import log_models
from ray_jobs.trainer import alone, made, newest_checkpoint


@dataclass(frozen=True)
class Found:
    """A sweep that was begun: its description, and the folder that is named by its id."""

    sweep: SweepConfig
    folder: Path

    @property
    def over(self) -> bool:
        """Its winner is told."""
        return any(event["event"] == "end" for event in read_journal(self.folder / JOURNAL))


def begun(name_or_id: str) -> Found:
    """The sweep that `--resume` names: by its id, eight letters of it, or its name if that is unique.

    Raises:
        RunError: there is none here, or several.
    """
    found = [one for one in _all() if len(name_or_id) >= 8 and one.folder.name.startswith(name_or_id)]
    found = found or [one for one in _all() if one.sweep.name == name_or_id]
    if not found:
        raise RunError(f"no sweep {name_or_id!r} in {runs_folder()}; a sweep prints its id when it starts")
    if len(found) > 1:
        ids = ", ".join(one.folder.name for one in found)
        raise RunError(f"{len(found)} sweeps are called {name_or_id!r}; say which by its id: {ids}")
    return found[0]


def _all() -> Iterator[Found]:
    for path in sorted(runs_folder().glob(f"*/{DESCRIPTION}")):
        if read_journal(path.parent / JOURNAL):  # else it had not begun
            yield Found(load_sweep(str(path)), path.parent)


def begun_before(sweep: SweepConfig) -> Found | None:
    """The sweep of this name that was begun here, an unfinished one before one that is over; None if there is none.

    Raises:
        ConfigError: it has other settings.
    """
    found = sorted((one for one in _all() if one.sweep.name == sweep.name), key=lambda one: one.over)
    if not found:
        return None
    check_same(found[0], sweep)
    return found[0]


def check_name(sweep: SweepConfig) -> None:
    """A new sweep must not be taken for another of its name.

    Raises:
        ConfigError: there is one of another space.
        RunError: there is the same one, unfinished.
    """
    for other in _all():
        if other.sweep.name != sweep.name:
            continue
        check_same(other, sweep)
        if not other.over:
            raise RunError(
                f"sweep {sweep.name} was begun: phisam sweep --resume {other.folder.name} goes on with it; "
                "for another one, set name="
            )


def check_same(found: Found, sweep: SweepConfig) -> None:
    """A sweep goes on as it began.

    Raises:
        ConfigError: the file asks for something else now.
    """
    if differences := found.sweep.differences(sweep):
        raise ConfigError(
            f"sweep {found.sweep.name} ({found.folder.name}) was begun with other settings: {'; '.join(differences)}. "
            "Start a new one under another name, with --set name=..."
        )


def workers_at_once(sweep: SweepConfig, max_concurrent: int | None) -> int:
    """CPUs that a local Ray needs, so that as many trials as were asked for share this machine."""
    scaling = sweep.trial(make_search(sweep, 1).suggest(0, {}), 0).scaling
    return math.ceil(scaling.num_workers * scaling.cpus_per_worker * (max_concurrent or 1))


def start(sweep: SweepConfig, console: Console, max_concurrent: int | None, register: str | None) -> None:
    """A new sweep, on the Ray that `connected` started or joined.

    Raises:
        ConfigError: it asks for what the data, the models or the cluster cannot give.
        RunError: it failed, or no trial came to its end.
    """
    check_name(sweep)
    checks = Checks()
    first = sweep.trial(make_search(sweep, 1).suggest(0, {}), 0)
    at_once = concurrency([first], checks, max_concurrent or sweep.max_concurrent)
    search = make_search(sweep, at_once)
    at_once = min(at_once, search.n_trials)
    checks.known_trials(sweep, search)
    runs = made(runs_folder())
    made(first.checkpoint.storage or runs)
    params = {
        "search": str(sweep.search.model_dump(mode="json")),
        "stopping": str(sweep.stopping.model_dump(mode="json")),
    }
    params |= {"metric": sweep.metric, "resource": sweep.resource, "trials": str(search.n_trials)}
    params |= {f"space.{key}": str(part) for key, part in sweep.model_dump(mode="json")["space"].items()}
    tags = {**provenance(checks.dataset(first).fingerprint), "mlflow.note.content": sweep.description}
    tracker = SweepTracker.start(
        tracking_uri(first.tracking, runs), runs, first.tracking.experiment, sweep.name, params, tags
    )
    folder = made(runs / tracker.run_id)
    tracker.summarize({"phisam.folder": str(folder)}, {})
    tracker.attach([], {DESCRIPTION: dump_sweep(sweep)})
    (folder / DESCRIPTION).write_text(dump_sweep(sweep), encoding="utf-8")
    with alone(folder, "sweep"):
        journal = Journal(folder / JOURNAL)
        journal.append({"event": "begin", "max_concurrent": at_once, "register": register, "time": time.time()})
        _go(Found(sweep, folder), journal, tracker, checks, console, at_once)


def resume(found: Found, console: Console, max_concurrent: int | None, register: str | None) -> None:
    """Goes on with a sweep and ends as the undisturbed one would.

    Raises:
        RunError: another process drives it, it is over, or it failed.
    """
    with alone(found.folder, "sweep"):
        journal = Journal(found.folder / JOURNAL)
        if not journal.events:
            raise RunError(f"{found.folder / JOURNAL} is empty: the sweep had not begun; start it anew")
        if found.over and register is None:
            raise RunError(f"sweep {found.sweep.name} ({found.folder.name}) is over: there is nothing to resume")
        sweep, checks = found.sweep, Checks()
        first = sweep.trial(make_search(sweep, 1).suggest(0, {}), 0)
        if max_concurrent is None:
            max_concurrent = min(journal.events[0]["max_concurrent"], concurrency([first], checks, None))
        at_once = concurrency([first], checks, max_concurrent)
        tracker = SweepTracker(tracking_uri(first.tracking, runs_folder()), found.folder.name)
        tracker.reopen(tracker.run_id)
        if register is not None:
            journal.append({"event": "register", "register": register})
        _go(found, journal, tracker, checks, console, at_once)


def _go(found: Found, journal: Journal, tracker: SweepTracker, checks: Checks, console: Console, at_once: int) -> None:
    sweep, folder = found.sweep, found.folder
    search = make_search(sweep, journal.events[0]["max_concurrent"])
    ledger = Ledger(search, make_stopping(sweep))
    driver = Driver(sweep, folder, runs_folder(), journal, ledger, search, tracker, checks, at_once)
    board = ray.remote(num_cpus=0)(SweepBoard).remote()
    driver.board = board

    def read(lines_seen: int) -> Any:
        return ray.get(board.read.remote(lines_seen), timeout=10)  # type: ignore[attr-defined]

    def trials() -> list[Trial]:
        return list(ledger.trials.values())

    view = SweepView(console, sweep.name, sweep.metric, search.n_trials, driver.epochs, trials, read)
    view.say(f"sweep {folder.name}: {search.n_trials} trials, {at_once} at once")
    driver.writer = writer = Writer(tracker.uri, view.say)
    with _true_end(driver, writer), sigterm_as_interrupt():
        driver.replay()
        if not driver.over:
            driver.view = view
            with view:
                shutil.rmtree(folder / "tune", ignore_errors=True)  # what an earlier driver's Tune left
                executor.run(driver, folder / "tune")
        writer.close()
        _conclude(driver, console)
        shutil.rmtree(folder / "tune", ignore_errors=True)


@contextlib.contextmanager
def _true_end(driver: Driver, writer: Writer) -> Iterator[None]:
    """MLflow says how the sweep ended; a sweep that was stopped says how to go on."""
    tracker = driver.tracker
    try:
        yield
    except BaseException as error:
        error.add_note(f"to go on with it: phisam sweep --resume {tracker.run_id}")
        with contextlib.suppress(RunError):  # if MLflow is the trouble, the error says so already
            driver.interrupted()
            writer.close()
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    tracker.finish("FINISHED")


def _conclude(driver: Driver, console: Console) -> None:
    """Settings over seeds, the winner and its model, the report. May be done again after a crash in its middle."""
    sweep, tracker = driver.sweep, driver.tracker
    trials = sorted(driver.ledger.trials.values(), key=lambda trial: trial.index)
    found = outcome.settings(trials, driver.search.setting)
    best = outcome.winner(found, sweep.better)
    counts = {f"trials/{s}": float(sum(t.status == s for t in trials)) for s in ("finished", "cut", "failed")}
    tracker.attach([], {"settings.csv": outcome.table(found, sweep.metric)})
    if best is None:
        tracker.summarize({}, counts)
        _say_it_is_over(driver, None)
        reasons = "; ".join(sorted({t.reason for t in trials if t.status == "failed" and t.reason})[:3])
        raise RunError(f"sweep {sweep.name}: no trial came to its end ({reasons or 'all were cut'})")
    setting, trial = best
    assert setting.score is not None
    score = {"winner/mean": setting.score.mean, "winner/seeds": float(setting.score.n)}
    if setting.score.n > 1:
        score |= {"winner/low": setting.score.low, "winner/high": setting.score.high}
    tags = {"phisam.winner": trial.run_id, "phisam.winner.trial": str(trial.index)}
    tags |= {f"phisam.winner.{key}": str(value) for key, value in trial.values.items()}
    assert trial.value is not None, "a setting has a score from its trials' values"
    tracker.summarize(tags, {**counts, **score, f"winner/{sweep.metric}": trial.value})
    config = driver.config(trial)
    _keep_model(driver, trial, config)
    registered = next((e["register"] for e in reversed(driver.journal.events) if e.get("register")), None)
    if registered is not None:
        version = tracker.register(registered, trial.run_id, "last", _provenance(driver, trial, config))
        console.print(f"registered as {registered} version {version}, alias champion", highlight=False)
    _report(driver)
    _say_it_is_over(driver, trial.index)
    console.print(outcome.best_table(found, sweep.metric, sweep.better))
    console.print(f"\nwinner: trial {trial.index}, run {trial.run_id}", highlight=False)


def _say_it_is_over(driver: Driver, winner: int | None) -> None:
    if not any(event["event"] == "end" for event in driver.journal.events):
        driver.journal.append({"event": "end", "winner": winner, "time": time.time()})


def _keep_model(driver: Driver, trial: Trial, config: RunConfig) -> None:
    """The winner's models in MLflow: those of all trials would cost seconds of export each."""
    tracker = Tracker(driver.tracker.uri, trial.run_id)
    if {"last", "best"} <= tracker.models().keys():
        return
    newest = newest_checkpoint(driver.leg_folder(trial, config))
    if newest is None:
        raise RunError(f"trial {trial.index}: its checkpoint is gone from {driver.leg_folder(trial, config)}")
    log_models(config, driver.checks.dataset(config), tracker, checkpoint.load(newest))
    tracker.finish("FINISHED")  # logging a model opened the run again
    tracker.finish("FINISHED")  # logging a model leaves its run RUNNING


def _provenance(driver: Driver, trial: Trial, config: RunConfig) -> dict[str, str]:
    sweep = driver.sweep
    told = {"sweep": sweep.name, "sweep.id": driver.tracker.run_id, "trial": str(trial.index), "run": trial.run_id}
    told |= {sweep.metric: repr(trial.value), **{key: str(value) for key, value in trial.values.items()}}
    return {**told, **provenance(driver.checks.dataset(config).fingerprint)}


def _report(driver: Driver) -> None:
    """The report's page and pictures on the parent. A report that fails takes no sweep with it."""
    from ray_jobs import report
    from ray_jobs.tracking.read import read_children, read_run

    uri, run_id = driver.tracker.uri, driver.tracker.run_id
    with _unimportant("the report"), tempfile.TemporaryDirectory() as folder:
        parent, trials = read_run(uri, run_id), read_children(uri, run_id)
        total: Callable[[str], float] = lambda key: sum(trial.spent.get(key, 0.0) for trial in trials)  # noqa: E731
        workers = float(driver.config(driver.ledger.trials[0]).scaling.num_workers)
        cost = {
            "cost/gradient_evaluations": total("gradient_evaluations"),
            "cost/device_hours": workers * total("seconds") / 3600,
        }
        driver.tracker.summarize({}, cost)
        page = report.page(parent, trials, driver.sweep.metric, driver.sweep.mode, dump_sweep(driver.sweep))
        pictures = report.summary_plots(parent, trials, driver.sweep.metric, driver.sweep.mode, Path(folder))
        driver.tracker.attach(pictures, {"report.html": page})


@contextlib.contextmanager
def _unimportant(what: str) -> Iterator[None]:
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        Console(stderr=True).print(
            f"{what} could not be made ({type(error).__name__}: {first_line(error)})", highlight=False
        )
