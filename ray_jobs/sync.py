"""What MLflow missed while it was away, told now: from the journals of runs and sweeps that nobody is training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ray_jobs import checkpoints
from ray_jobs.config import load
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.paths import runs_folder
from ray_jobs.sweep.begun import is_over
from ray_jobs.sweep.config import load_sweep
from ray_jobs.sweep.journal import DESCRIPTION as SWEEP_DESCRIPTION
from ray_jobs.sweep.variety import variety
from ray_jobs.tracking import tracking_uri
from ray_jobs.tracking.outbox import journals
from ray_jobs.tracking.sweep import SweepTracker
from ray_jobs.tracking.writer import Writer
from ray_jobs.train import DESCRIPTION, log_results
from ray_jobs.trainer import HeldError, alone
from ray_jobs.yaml_source import name_in

Say = Callable[[str], None]


def sync(names: list[str], say: Say) -> None:
    """Runs and sweeps by id (eight letters do), by name or by folder; all of the runs folder if none is named.

    A run that says that it is RUNNING and that no process holds was killed: MLflow is told so.

    Args:
        say: takes a line for the person at the terminal.

    Raises:
        RunError: there is no such run, or something could not be told; all that could be told was.
    """
    troubles = []
    for folder in [_folder(name) for name in names] or _all():
        is_sweep = (folder / SWEEP_DESCRIPTION).exists()
        try:
            with alone(folder, "sweep" if is_sweep else "run"):
                (_sync_sweep if is_sweep else _sync_run)(folder, say)
        except HeldError as error:
            say(f"{error}, which tells MLflow of it")
        except (ConfigError, RunError) as error:
            troubles.append(str(error))
        except OSError as error:
            troubles.append(f"{folder} cannot be read or written ({error.strerror})")
    if troubles:
        raise RunError("\n".join(troubles))


def _sync_run(folder: Path, say: Say) -> None:
    config = load(str(folder / DESCRIPTION))
    uri = tracking_uri(config.tracking, runs_folder())
    writer = Writer(uri, folder, say, lambda tracker: log_results(config, folder, tracker))
    run_id = folder.name
    if writer.status(run_id) in (None, "RUNNING"):
        say(f"run {run_id} was killed; phisam train --resume {run_id} goes on with it")
        writer.end(run_id, "KILLED", {}, checkpoints.saved_history(folder), writer.newest_ms(run_id))
    _deliver(writer, [run_id], say)


def _sync_sweep(folder: Path, say: Say) -> None:
    sweep = load_sweep(str(folder / SWEEP_DESCRIPTION))
    uri = tracking_uri(variety(sweep, "scaling")[0].tracking, runs_folder())
    writer = Writer(uri, folder, say)
    trials = [path.stem for path in journals(folder)]
    for run_id in trials:
        if writer.status(run_id) in (None, "RUNNING"):
            writer.end(run_id, "KILLED", {}, [], writer.newest_ms(run_id))
    _deliver(writer, trials, say)
    parent = SweepTracker(uri, folder.name)
    if not is_over(folder) and parent.status() == "RUNNING":
        say(f"sweep {folder.name} was killed; phisam sweep --resume {folder.name} goes on with it")
        parent.finish("KILLED")


def _deliver(writer: Writer, run_ids: list[str], say: Say) -> None:
    """All that the journals have for MLflow; asked once, since whoever waits for a server can ask again.

    Raises:
        RunError: not all could be told.
    """
    untold = {run_id: writer.untold(run_id) for run_id in run_ids}
    for run_id, events in untold.items():
        if events:
            writer.deliver(run_id)
    writer.close(patience=0)
    for run_id, events in untold.items():
        if events:
            epochs = sum(event["event"] == "epoch" for event in events)
            say(f"run {run_id} is {writer.status(run_id)}; MLflow was told of it, with {epochs} epochs that it lacked")
    if not any(untold.values()):
        say(f"{', '.join(run_ids)}: MLflow was told all")


def _all() -> list[Path]:
    return sorted(path for path in runs_folder().glob("*") if journals(path))


def _folder(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    if journals(path):
        return path
    found = [folder for folder in _all() if folder.name.startswith(name)] if len(name) >= 8 else []
    found = found or [
        folder for folder in _all() if name in (name_in(folder / DESCRIPTION), name_in(folder / SWEEP_DESCRIPTION))
    ]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(folder.name for folder in found)
    told = f"{len(found)} are called {name!r}; say which by its id: {ids}" if found else f"no run or sweep {name!r}"
    raise RunError(f"{told} in {runs_folder()}. One that lies elsewhere is named by its folder")
