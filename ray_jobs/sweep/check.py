"""Everything that can be wrong with a sweep before it starts, found at its line in the file."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

from ray_jobs.config import RunConfig
from ray_jobs.early import EARLY
from ray_jobs.errors import ConfigError
from ray_jobs.explain import nearest
from ray_jobs.sweep.cost import last_rung
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.sections import (
    CORNERS,
    AshaStopping,
    GridSearch,
    MedianStopping,
    NoStopping,
    PbtStopping,
    RandomSearch,
    SweepConfig,
    TpeSearch,
)
from ray_jobs.sweep.space import RUN, CircularError, Pick, Picks, Space, holds, said, values_of
from ray_jobs.sweep.trials import Trials, data_title, with_settings
from ray_jobs.yaml_source import Path, Place, Problem, Source, shown, split

MAX_TRIALS = 10_000
MAX_RUNGS = 1000
SHOWN = 20
"""Mistakes that are told at once."""

METRICS = (
    "accuracy/validation",
    "accuracy/test",
    "loss/validation",
    "loss/test",
    "loss/train",
    "ece/validation",
    "ece/test",
    *EARLY.values(),
    "sharpness",
    "lr",
    "rho",
    "lam",
    "strength",
    "gradient_evaluations",
    "skipped_steps",
    "seconds",
    "seconds_per_step",
    "examples_per_second",
)
"""What a run reports after every epoch."""

FIXED = ("name", "description", "tracking", "checkpoint")
"""Sections of a run that are the same in all trials of a sweep."""

PERTURBED = ("optimizer.rho", "optimizer.lam")

DATA = ("data", "data.name", "data.root", "data.fraction", "data.label_noise")
"""What says which data set a trial is on."""


def mistakes(sweep: SweepConfig, source: Source, bases: Mapping[str, Source]) -> list[Problem]:
    """What is wrong with a sweep. bases: the base runs as they were read, with their places."""
    structure = [*_structure(sweep, source), *_keys(sweep, source), *_search(sweep, source), *_stopping(sweep, source)]
    if structure:
        return structure
    try:
        space = sweep.walk
    except CircularError as error:
        path = ("space", error.keys[0])
        return [Problem(source.place(path), path, f"conditions go round in a circle: {', '.join(error.keys)}")]
    return _conditions(sweep, source) or _trials(sweep, source, space, bases)


def _structure(sweep: SweepConfig, source: Source) -> Iterator[Problem]:
    if not sweep.space and len(sweep.seeds) < 2:
        yield _problem(
            source, ("space",), "is empty: name a field and its values, such as optimizer.rho: {grid: [0.01, 0.1]}"
        )
    if sweep.run is None and RUN not in sweep.space:
        yield _problem(source, ("run",), "missing; it must be a recipe or a file that describes the base run")
    if sweep.run is not None and RUN in sweep.space:
        yield _problem(source, ("run",), "stands in the space too: keep one of them")
    for number, dimension in enumerate(sweep.space.get(RUN, ())):
        if dimension.when or not all(isinstance(name, str) for name in dimension.finite or (None,)):
            yield _problem(source, ("space", RUN, number), "must be a list of recipes or files, without a condition")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield _problem(source, ("seeds",), f"must differ, not {list(sweep.seeds)}")
    if sweep.metric not in METRICS:
        near = nearest(sweep.metric, METRICS)
        yield _problem(source, ("metric",), f"no run reports {sweep.metric!r}.{near} Reported: {', '.join(METRICS)}")


def _keys(sweep: SweepConfig, source: Source) -> Iterator[Problem]:
    for where, keys in (("space", sweep.space), ("set", sweep.set)):
        for key in keys:
            first = key.partition(".")[0]
            if not all(split(key)):
                yield _problem(source, (where, key), "must be a dotted key such as optimizer.rho")
            elif where == "space" and first in FIXED:
                yield _problem(source, (where, key), f"{first} is the same in all trials of a sweep: put it under set")
            elif where == "set" and first in ("name", RUN):
                yield _problem(
                    source,
                    (where, key),
                    f"must not be set: trials are named after the sweep, {RUN} is a key of its own",
                )
            elif key == "training.seed" and sweep.seeds:
                yield _problem(source, (where, key), "says the same as seeds: keep one of them")
            elif key == "training.epochs" and sweep.budget is not None and sweep.resource != "seconds":
                yield _problem(
                    source, (where, key), f"follows from budget = {sweep.budget:g} {sweep.resource}: keep one of them"
                )
    if sweep.resource == "epochs" and sweep.budget is not None and sweep.budget % 1:
        yield _problem(source, ("budget",), f"must be a whole number of epochs, not {sweep.budget:g}")


def _search(sweep: SweepConfig, source: Source) -> Iterator[Problem]:
    dimensions = {(key, n): d for key, alternatives in sweep.space.items() for n, d in enumerate(alternatives)}
    if isinstance(sweep.search, GridSearch):
        for (key, number), dimension in dimensions.items():
            if not dimension.finite:
                text = "is an interval, and grid search tries all values: list them, or choose the search random or tpe"
                yield _problem(source, ("space", key, number, dimension.kind), text)
        return
    drawn = [key for (key, _), dimension in dimensions.items() if dimension.kind != "grid"]
    if sweep.space and not drawn:
        text = f"{sweep.search.name} has nothing to draw, as every dimension is a grid: choose the search grid"
        yield _problem(source, ("search",), text)
    for (key, number), dimension in dimensions.items():
        looked_at = [other for other in drawn for k in dimension.when if k == other or k.startswith(f"{other}.")]
        if dimension.kind == "grid" and looked_at:
            text = (
                f"all of a grid is tried, but its condition looks at {looked_at[0]}, which is drawn: make it a choice"
            )
            yield _problem(source, ("space", key, number, "grid"), text)


def _stopping(sweep: SweepConfig, source: Source) -> Iterator[Problem]:
    stopping = sweep.stopping
    if not isinstance(stopping, PbtStopping):
        return
    for key, alternatives in sweep.space.items():
        numbers = all(isinstance(value, int | float) for d in alternatives for value in d.finite)
        if key not in PERTURBED or len(alternatives) > 1 or alternatives[0].when or not numbers:
            text = (
                f"pbt moves numbers of {' and '.join(PERTURBED)} alone, without conditions: members take over weights"
            )
            yield _problem(source, ("space", key), text)
    if isinstance(sweep.search, TpeSearch):
        yield _problem(source, ("search",), "pbt begins with all members at once: choose the search random or grid")
    if len(sweep.seeds) > 1:
        yield _problem(source, ("seeds",), "must be one with pbt: members share their data, split by the seed")
    if sweep.resource == "seconds":
        yield _problem(
            source,
            ("resource",),
            "must be epochs or gradient_evaluations with pbt: generations end at one epoch for all",
        )


def _conditions(sweep: SweepConfig, source: Source) -> list[Problem]:
    """Conditions on keys of which nobody says anything, or on values that they never have."""
    problems = []
    for key, alternatives in sweep.space.items():
        for number, dimension in enumerate(alternatives):
            for looked_at, wanted in dimension.when.items():
                path = ("space", key, number, "when", looked_at)
                found, known = _possible(sweep, looked_at)
                if not found:
                    text = f"neither the space nor the base run says {looked_at}.{nearest(looked_at, known)}"
                    problems.append(_problem(source, path, f"{text} Write it under set, or correct it"))
                    continue
                names = list(dict.fromkeys(str(said({"x": value}, "x.name") or value) for value in found))
                never = [value for value in wanted if not any(holds(possible, (value,)) for possible in found)]
                misspelt = [value for value in never if nearest(str(value), names)]
                for value in misspelt or (never if len(never) == len(wanted) else []):
                    text = f"it never is {shown(value)}.{nearest(str(value), names)} It is one of {', '.join(names)}"
                    problems.append(_problem(source, path, text))
    return problems


def _possible(sweep: SweepConfig, key: str) -> tuple[list[Any], list[str]]:
    """The values that a key may have in a trial, and the keys of which values are known."""
    found = [said(base.value, key) for base in sweep.trials.bases.values()]
    for other, alternatives in sweep.space.items():
        for value in (value for dimension in alternatives for value in dimension.finite):
            if key == other or key.startswith(f"{other}."):
                found.append(said({"x": value}, f"x{key[len(other) :]}"))
            elif other == f"{key}.name":
                found.append(value)
    known = [*sweep.space, *sweep.set, *(key for base in sweep.trials.bases.values() for key in _dotted(base.value))]
    return [value for value in found if value is not None], known


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _trials(sweep: SweepConfig, source: Source, space: Space, bases: Mapping[str, Source]) -> list[Problem]:
    """The trials themselves where they are known beforehand, and the corners of the space."""
    if isinstance(sweep.search, GridSearch):
        n_settings = sum(1 for _ in itertools.islice(space.everything(), MAX_TRIALS + 1))
    else:
        n_settings = sweep.search.trials * sum(1 for _ in itertools.islice(space.grid(), MAX_TRIALS + 1))
    if n_settings * max(1, len(sweep.seeds)) > MAX_TRIALS:
        return [
            _problem(
                source, ("space",), f"makes more than {MAX_TRIALS} trials, with seeds and search: that is too many"
            )
        ]
    search = make_search(sweep, 1)
    corners = sweep.corners()
    seen = _Seen(corners, sweep, source)
    drawn = []
    grid_beyond = isinstance(sweep.search, GridSearch) and len(corners) == CORNERS
    if isinstance(sweep.search, RandomSearch) or grid_beyond:
        drawn = [search.picks(setting, ()) for setting in range(search.n_settings)]
    extra = seen.draws(space)
    problems = list(seen.never())
    builder = _Builder(sweep, source, bases)
    for settings in (corners, extra, drawn):
        for picks in settings if not builder.problems else ():
            if len(builder.problems) < SHOWN:
                builder.add(picks)
    problems = problems or [*builder.problems.values()]
    return problems or list(_of_runs(sweep, source, builder.configs))


class _Seen:
    """Which values of finite dimensions came up in a walk."""

    def __init__(self, corners: list[Picks], sweep: SweepConfig, source: Source) -> None:
        self._source = source
        self._missing = {
            (key, number, position)
            for key, alternatives in sweep.space.items()
            for number, dimension in enumerate(alternatives)
            for position in (range(len(dimension.finite)) if dimension.finite else [None])
        }
        for picks in corners:
            self._came_up(picks)
        self._complete = len(corners) < CORNERS

    def _came_up(self, picks: Picks) -> bool:
        new = {(key, pick.alternative, pick.position) for key, pick in picks.items()} & self._missing
        self._missing -= new
        return bool(new)

    def draws(self, space: Space) -> list[Picks]:
        """Random settings with the values that the walk, which was not complete, left out."""
        generator = random.Random(0)
        found = []
        for _ in range(0 if self._complete else 10 * CORNERS):
            picks = space.settle(lambda entry, number: entry.alternatives[number].draw(generator.random()))
            if self._missing and self._came_up(picks):
                found.append(picks)
        return found

    def never(self) -> Iterator[Problem]:
        """Dimensions that are never there, if the walk was complete."""
        if self._complete:
            for key, number in sorted({(key, number) for key, number, _ in self._missing}):
                text = "is never there: its conditions never hold together, or one before it in the list always does"
                yield _problem(self._source, ("space", key, number), text)


class _Builder:
    """Builds the runs of settings; keeps each mistake once, with a setting in which it shows."""

    def __init__(self, sweep: SweepConfig, source: Source, bases: Mapping[str, Source]) -> None:
        self._sweep, self._source = sweep, source
        places = {key: self._places(split(key), ("set", key)) for key in sweep.set}
        with_set = {name: with_settings(base, sweep.set, places) for name, base in bases.items()}
        self._trials = Trials(sweep.name, sweep.run, with_set, sweep.resource, sweep.budget)
        self.configs: list[RunConfig] = []
        self.problems: dict[tuple[str, Path, str], Problem] = {}

    def add(self, picks: Picks) -> None:
        """One more setting."""
        places = {key: self._places(split(key), self._written(key, pick)) for key, pick in picks.items()}
        own = self._source.place(())
        try:
            config, problems = self._trials.config(values_of(picks), 0, places, own)
        except ConfigError as error:  # data that cannot be counted
            config, problems = None, [Problem(own, ("data",), str(error))]
        if config is not None and not problems:
            self.configs.append(config)
        setting = ", ".join(f"{key} = {shown(pick.value)}" for key, pick in picks.items())
        for problem in problems:
            told = f"{problem.text} (with {setting})" if len(picks) > 1 else problem.text
            self.problems.setdefault((problem.place.text, problem.path, problem.text), problem._replace(text=told))

    def _written(self, key: str, pick: Pick) -> Path:
        kind = self._sweep.space[key][pick.alternative].kind
        path: Path = ("space", key, pick.alternative, kind)
        return path if pick.position is None else (*path, pick.position)

    def _places(self, path: Path, written: Path) -> dict[Path, Place]:
        n = len(written)
        inside = {(*path, *at[n:]): place for at, place in self._source.places.items() if at[:n] == written}
        return {path: self._source.place(written), **inside}


def _of_runs(sweep: SweepConfig, source: Source, configs: list[RunConfig]) -> Iterator[Problem]:
    """What shows when all runs are there."""
    for what, found in (
        ("tracking", {config.tracking.model_dump_json() for config in configs}),
        ("checkpoint", {config.checkpoint.model_dump_json() for config in configs}),
    ):
        if len(found) > 1:
            yield _problem(source, ("space",), f"the base runs have different sections {what}: set it under set")
    yield from _of_data(sweep, source, configs)
    scalings = [config.scaling for config in configs]
    if sweep.in_process and any(scaling.num_workers != 1 or scaling.use_gpu is not False for scaling in scalings):
        yield _problem(
            source, ("in_process",), "needs trials of one worker on the CPU: set scaling.num_workers: 1, use_gpu: false"
        )
    stopping = sweep.stopping
    if isinstance(stopping, PbtStopping) and any(config.checkpoint.every_epochs > 1 for config in configs):
        yield _problem(
            source, ("stopping",), "pbt needs checkpoint.every_epochs = 1: members go on from a generation's end"
        )
    if isinstance(stopping, AshaStopping | MedianStopping | PbtStopping):
        first = stopping.every if isinstance(stopping, PbtStopping) else stopping.first_rung
        key = "every" if isinstance(stopping, PbtStopping) else "first_rung"
        last = max(last_rung(config, sweep.resource, sweep.budget) for config in configs)
        if first > last:
            text = f"must be at most {last:g} {sweep.resource}, not {first:g}: no trial has an epoch left to save there"
            yield _problem(source, ("stopping", key), text)
        every = first if not isinstance(stopping, MedianStopping) else stopping.every or first
        if not isinstance(stopping, AshaStopping) and last / every > MAX_RUNGS and last < float("inf"):
            text = f"makes {last / every:.0f} rungs of {every:g} {sweep.resource} up to {last:g}, more than {MAX_RUNGS}"
            yield _problem(source, ("stopping",), text)


def _of_data(sweep: SweepConfig, source: Source, configs: list[RunConfig]) -> Iterator[Problem]:
    """Results on one data set say nothing about a trial on another."""
    titles = list(dict.fromkeys(data_title(config.data) for config in configs))
    if len(titles) < 2:
        return
    them = f"{len(titles)} data sets ({', '.join(titles)})"
    if not isinstance(sweep.stopping, NoStopping):
        text = f"{sweep.stopping.name} compares trials, and these are on {them}: choose none, or sweep them one by one"
        yield _problem(source, ("stopping",), text)
    if isinstance(sweep.search, TpeSearch):
        bases = {tuple(said(base.value, key) for key in DATA[1:]) for base in sweep.trials.bases.values()}
        telling = (*DATA, RUN) if len(bases) > 1 else DATA
        for key, alternatives in sweep.space.items():
            if key in telling and any(dimension.kind != "grid" for dimension in alternatives):
                text = (
                    f"is drawn, and tpe would learn from results on other data sets; there are {them}: make it a grid"
                )
                yield _problem(source, ("space", key), text)


def _problem(source: Source, path: Path, text: str) -> Problem:
    return Problem(source.place(path), path, text)
