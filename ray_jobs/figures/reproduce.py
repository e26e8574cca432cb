"""What `phisam reproduce figure1` does: trains every run that no earlier call finished, then writes the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ray_jobs import cluster, train
from ray_jobs.config import RunConfig
from ray_jobs.errors import RunError
from ray_jobs.figures import figure1
from ray_jobs.figures.figure1 import Setting
from ray_jobs.figures.figure1_pictures import pictures
from ray_jobs.figures.figure1_table import Curves, table, write_csv
from ray_jobs.tracking.made import Made, made_from
from ray_jobs.tracking.read import read_run


class Asked(NamedTuple):
    """The command's arguments."""

    data: str
    seeds: int
    strengths: Sequence[float]
    overrides: Sequence[str]
    quick: bool
    folder: Path


def reproduce_figure1(asked: Asked, address: str | None, verbose: bool, console: Console) -> None:
    """Seed by seed, so that each seed that is done gives a whole picture. Runs are found again in MLflow.

    Raises:
        ConfigError: an override that the run descriptions do not take, or data that is not there.
        RunError: a run failed. What is done stays; the same command goes on from there.
    """
    settings = figure1.settings(asked.strengths)
    runs = {
        (setting, seed): figure1.description(setting, asked.data, seed, asked.overrides, asked.quick)
        for seed in range(asked.seeds)
        for setting in settings
    }
    missing = [config for config in runs.values() if not _finished(made_from(config))]
    console.print(f"figure1 on {asked.data}: {len(runs)} runs, {len(runs) - len(missing)} of them finished before")
    if missing:
        _train_all(missing, address, verbose, console)
    seeds = range(asked.seeds)
    curves = {setting.key: _curves(setting, [runs[setting, seed] for seed in seeds]) for setting in settings}
    written = [asked.folder / f"figure1-{asked.data}.csv", asked.folder / f"figure1-{asked.data}.md"]
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_csv(list(curves.values()), written[0])
    written[1].write_text(f"{table(list(curves.values()))}\n", encoding="utf-8")
    written += pictures(curves, asked.strengths, asked.data, asked.folder)
    console.print("\n".join(["", "Written:", *map(str, written)]), highlight=False)


def _train_all(missing: Sequence[RunConfig], address: str | None, verbose: bool, console: Console) -> None:
    with cluster.connected(address, max(config.scaling.most_workers for config in missing), verbose):
        for number, config in enumerate(missing, 1):
            place = f"run {number} of {len(missing)}"
            console.print(f"{place}: {config.name}, seed {config.training.seed}", highlight=False)
            try:
                _train(config, console)
            except (RunError, KeyboardInterrupt) as error:
                error.add_note("or give the same command again: it trains what is missing")
                raise


def _train(config: RunConfig, console: Console) -> None:
    made = made_from(config)
    if made is not None:
        try:
            unfinished = train.unfinished(made.run_id)
        except RunError:  # its checkpoints are gone
            made = None
        else:
            train.resume(unfinished, console)
    if made is None:
        train.train(config, console)


def _curves(setting: Setting, configs: Sequence[RunConfig]) -> Curves:
    made = [made_from(config) for config in configs]
    return Curves(setting, [read_run(run.uri, run.run_id) for run in made if run is not None and _finished(run)])


def _finished(made: Made | None) -> bool:
    return made is not None and made.status == "FINISHED"
