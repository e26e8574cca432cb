"""The end of a sweep: settings over seeds, the winner on each data set and its model, cost and report.

All of it may be done again after a crash in its middle.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ray_jobs import checkpoint, checkpoints
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.sweep import outcome
from ray_jobs.sweep.config import dump_sweep
from ray_jobs.sweep.driver import Driver
from ray_jobs.sweep.ledger import Trial
from ray_jobs.sweep.outcome import Setting, Winner
from ray_jobs.sweep.trials import data_title
from ray_jobs.tracking import Tracker, provenance
from ray_jobs.tracking.server import is_deleted
from ray_jobs.train import log_models
from ray_jobs.whole_table import print_whole

MODEL_TAG, MODEL_EPOCH_TAG = "phisam.model", "phisam.model_epoch"
"""Tags of a winner's run: which of its models stands for the epoch at which it was judged, and the model's epoch."""


def conclude(driver: Driver, console: Console) -> tuple[str, str | None]:
    """The parent's end, FINISHED or FAILED, and what went wrong: there is no winner, or none that can be registered.

    Raises:
        RunError: MLflow does not answer.
    """
    sweep, tracker = driver.sweep, driver.tracker
    trials = sorted(driver.ledger.trials.values(), key=lambda trial: trial.index)
    found = {title: outcome.settings(group, driver.search.setting) for title, group in _by_data(driver, trials).items()}
    winners = {title: best for title, group in found.items() if (best := outcome.winner(group, sweep.better))}
    counts = {f"trials/{s}": float(sum(t.status == s for t in trials)) for s in ("finished", "cut", "failed")}
    tracker.attach([], {"settings.csv": outcome.as_csv(found, sweep.metric)})
    if not winners:
        tracker.summarize({}, counts)
        reasons = "; ".join(sorted({t.reason for t in trials if t.status == "failed" and t.reason})[:3])
        return "FAILED", f"sweep {sweep.name}: no trial came to its end ({reasons or 'all were cut'})"
    won = [winner.trial for winner in winners.values()]
    tags = {"phisam.winner": ",".join(trial.run_id for trial in won)}
    tags["phisam.winner.trial"] = ",".join(str(trial.index) for trial in won)
    for title, winner in winners.items():
        own_tags, own_metrics = winner.told(sweep.metric, title if len(found) > 1 else "")
        tags, counts = tags | own_tags, counts | own_metrics
    tracker.summarize(tags, counts)
    missing = {trial.index: why for trial in won if (why := _keep_models(driver, trial, console)) is not None}
    name = next((event["register"] for event in reversed(driver.journal.events) if event.get("register")), None)
    if name is not None and not missing:
        _register(driver, won[0], name, console)
    _report(driver)
    _print(found, winners, driver, console)
    for index, why in missing.items():
        console.print(f"the model of trial {index} is not kept: {why}", highlight=False)
    if name is not None and missing:
        return "FINISHED", f"--register {name}: the winner's model is gone ({next(iter(missing.values()))})"
    return "FINISHED", None


def _print(
    found: Mapping[str, Sequence[Setting]], winners: Mapping[str, Winner], driver: Driver, console: Console
) -> None:
    """The best settings on each data set, and who won there."""
    for title, settings in found.items():
        on = f" on {title}" if len(found) > 1 else ""
        if on:
            console.print(f"\n{title}:", highlight=False)
        print_whole(outcome.best_table(settings, driver.sweep.metric, driver.sweep.better), console)
        best = winners.get(title)
        told = (
            "none: no trial came to its end" if best is None else f"trial {best.trial.index}, run {best.trial.run_id}"
        )
        console.print(f"\nwinner{on}: {told}", highlight=False, soft_wrap=True)


def _by_data(driver: Driver, trials: list[Trial]) -> dict[str, list[Trial]]:
    """Trials by what they are on; those whose values make no run are on nothing, and stand with the first."""
    groups: dict[str, list[Trial]] = {}
    broken = []
    for trial in trials:
        try:
            groups.setdefault(data_title(driver.config(trial).data), []).append(trial)
        except ConfigError:
            broken.append(trial)
    if broken:
        groups.setdefault(next(iter(groups), ""), []).extend(broken)
    return groups


def _keep_models(driver: Driver, trial: Trial, console: Console) -> str | None:
    """A winner's models in MLflow, as those of all trials would cost seconds of export each; why not, or None.

    They are of the epoch at which the trial was judged. With a budget of seconds a trial trains on beyond it, and its
    checkpoint of that epoch may be gone; then the newest one's best model stands for it, if that is not later.
    """
    config, tracker = driver.config(trial), Tracker(driver.tracker.uri, trial.run_id)
    if is_deleted(tracker.uri, trial.run_id):
        return f"run {trial.run_id} was deleted in MLflow; its checkpoints are in {driver.leg_folder(trial)}"
    if {"last", "best"} <= tracker.models().keys():
        return None
    folder, judged = driver.leg_folder(trial), trial.stopped or trial.points[-1].epoch
    found = checkpoints.at_epoch(folder, judged) or checkpoints.usable(folder)
    if found is None:
        return f"there is no checkpoint of it in {folder} that can be read"
    state = checkpoint.load(found)
    last, best = int(state["epoch"]), int(state["best"]["epoch"])
    model, epoch = ("best", best) if best <= judged < last else ("last", last)
    if epoch != judged:
        console.print(
            f"trial {trial.index} was judged at epoch {judged}, of which there is no checkpoint any more: its "
            f"{model} model, of epoch {epoch}, stands for it",
            highlight=False,
        )
    tracker.set_tags({MODEL_TAG: model, MODEL_EPOCH_TAG: str(epoch)})
    log_models(config, driver.checks.dataset(config), tracker, state)
    tracker.finish("FINISHED")  # logging a model opened the run again
    return None


def _register(driver: Driver, trial: Trial, name: str, console: Console) -> None:
    sweep, config = driver.sweep, driver.config(trial)
    kept = driver.tracker.tags_of(trial.run_id)
    model = kept.get(MODEL_TAG, "last")
    told = {"sweep": sweep.name, "sweep.id": driver.tracker.run_id, "trial": str(trial.index), "run": trial.run_id}
    told |= {sweep.metric: repr(trial.value), **{key: str(value) for key, value in trial.values.items()}}
    told |= {"model": model, "epoch": kept.get(MODEL_EPOCH_TAG, "?")}
    told |= provenance(driver.checks.dataset(config).fingerprint)
    version = driver.tracker.register(name, trial.run_id, model, told)
    console.print(f"registered as {name} version {version}, alias champion", highlight=False)


def _report(driver: Driver) -> None:
    """Cost, and the report's page and pictures on the parent. A report that fails takes no sweep with it."""
    from ray_jobs import report
    from ray_jobs.report import content
    from ray_jobs.tracking.read import read_children, read_run

    uri, run_id, sweep = driver.tracker.uri, driver.tracker.run_id, driver.sweep
    with _unimportant("the report"), tempfile.TemporaryDirectory() as folder:
        parent, trials = read_run(uri, run_id), read_children(uri, run_id)
        spent = content.cost(trials)
        cost = {"gradient_evaluations": spent.gradient_evaluations, "device_hours": spent.device_hours}
        driver.tracker.summarize({}, {f"cost/{key}": value for key, value in cost.items()})
        page = report.page(parent, trials, sweep.metric, sweep.mode, dump_sweep(sweep))
        pictures = report.summary_plots(parent, trials, sweep.metric, sweep.mode, Path(folder))
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
