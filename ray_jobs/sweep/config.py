"""A sweep, described: a YAML file or a sweep recipe's name -> a frozen object that was checked to the last trial.

    sweep = load_sweep("small/table2", ["seeds=[0]", "data.root=~/data"])

Nothing is started for a sweep that has a mistake anywhere: `check.py` builds the run of every trial that is known
beforehand, and of every value that a trial may have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from ray_jobs import config
from ray_jobs.errors import ConfigError
from ray_jobs.explain import checked, nearest, told
from ray_jobs.sweep.check import mistakes
from ray_jobs.sweep.sections import SEED, SweepConfig
from ray_jobs.sweep.space import KINDS, RUN
from ray_jobs.sweep.trials import grounded
from ray_jobs.yaml_source import (
    Path,
    Place,
    Problem,
    Source,
    put,
    read_file,
    read_override,
    read_yaml,
    shown,
    split,
    write_yaml,
)

__all__ = ["SweepConfig", "dump_sweep", "load_sweep", "sweep_names"]


def load_sweep(source: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep that a YAML file or a recipe describes, with `key.path=value` overrides.

    A key of the sweep changes the sweep (`search.trials=4`); one of a run is short for `set` (`data.root=~/data`).

    Raises:
        ConfigError: names file, line, key, value and what is allowed, for all mistakes at once.
    """
    described = _read(source)
    for override in overrides:
        described = read_override(described, override, _override_path, "search.trials=4 or data.root=~/data")
    described = _with_seeds(described)
    described, short = _spread(described)
    sweep, problems = checked(SweepConfig, described)
    if sweep is not None and not problems:
        described, bases, problems = _with_runs(described, sweep)
        sweep = SweepConfig.model_validate(described.value)
        problems = problems or mistakes(sweep, described, bases)
    if problems or sweep is None:
        raise ConfigError(told(_without_index(problem, short) for problem in problems))
    return sweep


def dump_sweep(sweep: SweepConfig) -> str:
    """YAML with every setting resolved and the base runs inside; `load_sweep` reads it back to an equal object."""
    return write_yaml(sweep.model_dump(mode="json"))


def sweep_names() -> list[str]:
    """Complete sweeps that come with the package."""
    return sorted(_recipes())


def sweep_text(name: str) -> str:
    """A sweep recipe's YAML, with its comments.

    Raises:
        ConfigError: there is no such sweep; names the nearest.
    """
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"there is no sweep {name!r}.{_near(name)}")
    return recipes[name]()


def _read(source: str) -> Source:
    if source in _recipes():
        return read_yaml(sweep_text(source), f"sweep {source}")
    found = read_file(source)
    if found is not None:
        return found
    if source in config.recipe_names():
        raise ConfigError(f"{source!r} is a run, not a sweep: phisam train {source}. A sweep names it under `run`")
    raise ConfigError(f"{source!r} is neither a sweep recipe nor a file in {os.getcwd()}.{_near(source)}")


def _near(name: str) -> str:
    word = name.removesuffix(".yaml").removesuffix(".yml")
    return f"{nearest(word, sweep_names())} Sweeps: {', '.join(sweep_names())}"


def _recipes() -> dict[str, Callable[[], str]]:
    def files(folder: Traversable, prefix: str) -> Iterator[tuple[str, Callable[[], str]]]:
        for file in folder.iterdir():
            if file.is_dir():
                yield from files(file, f"{prefix}{file.name}/")
            elif file.name.endswith(".yaml"):
                yield prefix + file.name.removesuffix(".yaml"), partial(file.read_text, encoding="utf-8")

    return dict(files(resources.files("ray_jobs") / "recipes" / "sweeps", ""))


def _override_path(key: str) -> tuple[str, ...]:
    """set.data.root -> (set, data.root), and data.root too; search.trials -> (search, trials)."""
    first, _, rest = key.partition(".")
    if first in ("set", "space") and rest:
        return first, rest
    if first in config.RunConfig.model_fields and first not in SweepConfig.model_fields:
        return "set", key
    return split(key)


def _with_seeds(source: Source) -> Source:
    """`training.seed: {grid: [0, 1]}` in the space is `seeds: [0, 1]`: settings are grouped over them."""
    space = source.value.get("space")
    dimension = space.get(SEED) if isinstance(space, dict) else None
    if not isinstance(space, dict) or not isinstance(dimension, dict) or set(dimension) != {"grid"}:
        return source
    place = source.place(("space", SEED, "grid"))
    if "seeds" in source.value:
        twice = Problem(place, ("space", SEED), "says the same as seeds: keep one of them")
        return Source(source.value, source.places, (*source.problems, twice))
    others = {key: value for key, value in space.items() if key != SEED}
    source = put(source, ("space",), others, source.places)
    return put(source, ("seeds",), dimension["grid"], {("seeds",): place})


def _spread(source: Source) -> tuple[Source, set[str]]:
    """The space with a list of alternatives under each key, and the keys that were written without one."""
    space = source.value.get("space")
    if not isinstance(space, dict):
        return source, set()
    short = {key for key, value in space.items() if isinstance(value, dict)}
    lists: dict[str, Any] = {key: [value] if key in short else value for key, value in space.items()}
    places = {_indexed(path, short): place for path, place in source.places.items()} | {
        ("space", key): source.place(("space", key)) for key in short
    }
    problems = list(source.problems)
    for key, value in list(lists.items()):
        if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
            path = ("space", key)
            kinds = ", ".join(KINDS)
            what = f"must be a section with one of {kinds}, such as {{grid: [1, 2]}}, not {shown(value)}"
            problems.append(Problem(source.place(path), path, what))
            del lists[key]
    return Source({**source.value, "space": lists}, places, tuple(problems)), short


def _indexed(path: Path, short: set[str]) -> Path:
    inside = len(path) >= 2 and path[0] == "space" and path[1] in short
    return (*path[:2], 0, *path[2:]) if inside else path


def _without_index(problem: Problem, short: set[str]) -> Problem:
    """As the person wrote it."""
    path = problem.path
    if len(path) > 2 and path[0] == "space" and path[1] in short and path[2] == 0:
        path = (*path[:2], *path[3:])
    return problem._replace(path=path)


def _with_runs(source: Source, sweep: SweepConfig) -> tuple[Source, dict[str, Source], list[Problem]]:
    """The sweep with its base runs inside and its paths absolute; the runs with their places; those not found."""
    wanted: dict[str, Path] = {} if sweep.run is None else {sweep.run: ("run",)}
    for number, dimension in enumerate(sweep.space.get(RUN, ())):
        for position, name in enumerate(dimension.finite):
            wanted.setdefault(str(name), ("space", RUN, number, dimension.kind, position))
    bases: dict[str, Source] = {}
    problems: list[Problem] = []
    for name, path in wanted.items():
        if name in sweep.runs:
            bases[name] = Source(sweep.runs[name], _below(source, ("runs", name)))
            continue
        try:
            bases[name] = config.read(name)
            problems.extend(bases[name].problems)
        except ConfigError as error:
            problems.append(Problem(source.place(path), (RUN,), str(error)))
    runs = {name: grounded((), base.value) for name, base in bases.items()}
    settings = {key: grounded(split(key), value) for key, value in sweep.set.items()}
    space = {
        key: [_grounded_dimension(split(key), dimension) for dimension in alternatives]
        for key, alternatives in source.value.get("space", {}).items()
    }
    value = {**source.value, "runs": runs, "set": settings, "space": space}
    return Source(value, source.places), bases, problems


def _grounded_dimension(path: tuple[str, ...], dimension: dict[str, Any]) -> dict[str, Any]:
    def ground(kind: str, given: Any) -> Any:
        return [grounded(path, value) for value in given] if kind in ("grid", "choice") else given

    return {kind: ground(kind, given) for kind, given in dimension.items()}


def _below(source: Source, prefix: Path) -> dict[Path, Place]:
    """The places of what is at a path, as those of a source of its own."""
    n = len(prefix)
    inside = {path[n:]: place for path, place in source.places.items() if path[:n] == prefix}
    return {(): source.place(prefix), **inside}
