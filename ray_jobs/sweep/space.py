"""The space of a sweep: dimensions, the conditions under which they exist, and walks through all of it.

A walk visits the dimensions so that what a condition looks at is settled before it is looked at. A dimension whose
condition does not hold is left out: the base run's own value stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from ray_jobs.explain import refusal
from ray_jobs.section import Finite, Section
from ray_jobs.yaml_source import placed, shown

RUN = "run"
"""The dimension whose values are base runs."""


def _values(value: Any) -> Any:
    if isinstance(value, list | tuple) and value:
        return value
    found = refusal([("", f"must be a list of values, such as [1, 2, 4], not {shown(value)}")])
    assert found
    raise found


def _wanted(value: Any) -> Any:
    return value if isinstance(value, list | tuple) and value else [value]


Values = Annotated[tuple[Any, ...], Field(strict=False), BeforeValidator(_values)]
Wanted = Annotated[tuple[Any, ...], Field(strict=False), BeforeValidator(_wanted)]
Kind = Literal["grid", "choice", "uniform", "log_uniform", "int_uniform"]
KINDS: tuple[Kind, ...] = ("grid", "choice", "uniform", "log_uniform", "int_uniform")


class Dimension(Section):
    """The values of one setting, given in one of five ways, and when the setting is there."""

    grid: Values | None = Field(None, description="all of them are tried")
    choice: Values | None = Field(None, description="one of them is drawn; by grid search all are tried")
    uniform: tuple[Finite, Finite] | None = Field(None, strict=False, description="a number between two")
    log_uniform: tuple[Finite, Finite] | None = Field(
        None, strict=False, description="a number between two, its logarithm uniform"
    )
    int_uniform: tuple[int, int] | None = Field(None, strict=False, description="a whole number, both ends included")
    when: dict[str, Wanted] = Field(
        default_factory=dict, description="dotted key -> values: there where all hold, else the run's own value stays"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key, what it must be) for what makes no dimension."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            yield "", f"needs one of {', '.join(KINDS)}{f', not {len(given)} of them' if given else ''}"
        for kind in set(given) - {"grid", "choice"}:
            low, high = getattr(self, kind)
            if not low < high:
                yield kind, f"must go from a smaller to a greater number, not from {low} to {high}"
            elif kind == "log_uniform" and low <= 0:
                yield kind, f"must be of numbers > 0, which have a logarithm, not from {low} to {high}"
        for kind in set(given) & {"grid", "choice"}:
            values = list(getattr(self, kind))
            twice = [value for i, value in enumerate(values) if value in values[:i]]
            if twice:
                yield kind, f"has {shown(twice[0])} twice"

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None and value != {}}

    @property
    def kind(self) -> Kind:
        """Which of the five."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def finite(self) -> tuple[Any, ...]:
        """All values; () for an interval."""
        return self.grid or self.choice or ()

    @property
    def ends(self) -> tuple[float, float]:
        """Least and greatest value of numbers."""
        values = self.finite or getattr(self, self.kind)
        return min(values), max(values)

    def draw(self, u: float) -> Pick:
        """The value at u in [0, 1). Real numbers are rounded to six digits, so that tables show what was tried."""
        if self.finite:
            position = int(u * len(self.finite))
            return Pick(self.finite[position], position)
        low, high = self.ends
        match self.kind:
            case "int_uniform":
                return Pick(int(low) + int(u * (int(high) - int(low) + 1)))
            case "log_uniform":
                return Pick(rounded(math.exp(math.log(low) + u * (math.log(high) - math.log(low))), low, high))
            case _:
                return Pick(rounded(low + u * (high - low), low, high))


class Pick(NamedTuple):
    """A value of a dimension, and its place in the list of values if there is one."""

    value: Any
    position: int | None = None
    alternative: int = 0


Picks = dict[str, Pick]


def rounded(value: float, low: float, high: float) -> float:
    """To six digits, within bounds."""
    return min(max(float(f"{value:.6g}"), low), high)


@dataclass(frozen=True)
class Entry:
    """A key of the space and its dimensions; the first whose condition holds is the one that is there."""

    key: str
    alternatives: tuple[Dimension, ...]

    @cached_property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))

    def follows(self, other: Entry) -> bool:
        """Whether the other must be settled first: a condition looks at it, or this setting is inside of it."""
        if self is other:
            return False
        looked_at = [key for dimension in self.alternatives for key in dimension.when]
        inside = len(self.path) > len(other.path) and _related(self.path, other.path)
        return other.key == RUN or inside or any(_related(tuple(key.split(".")), other.path) for key in looked_at)


class CircularError(ValueError):
    """Conditions that look at each other; `keys` are those that cannot be settled."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(", ".join(keys))
        self.keys = keys


class Space:
    """Walks over the settings of a sweep.

    Args:
        dimensions: dotted key -> its alternatives.
        bases: name -> base run, as plain settings.
        run: the base run's name; None if `run` is a dimension.

    Raises:
        CircularError: conditions look at each other.
    """

    def __init__(
        self, dimensions: Mapping[str, tuple[Dimension, ...]], bases: Mapping[str, dict[str, Any]], run: str | None
    ) -> None:
        self.entries = _in_order([Entry(key, alternatives) for key, alternatives in dimensions.items()])
        self._bases = bases
        self._start = {} if run is None else bases[run]

    def settle(self, choose: Callable[[Entry, int], Pick]) -> Picks:
        """One setting: `choose` is asked for the value of each dimension that is there, given its alternative."""
        picks: Picks = {}
        settings = self._start
        for entry in self.entries:
            alternative = self._active(entry, settings)
            if alternative is not None:
                picks[entry.key] = pick = choose(entry, alternative)._replace(alternative=alternative)
                settings = self._with(settings, entry, pick.value)
        return picks

    def leaves(self, options: Callable[[Dimension], list[Pick]]) -> Iterator[Picks]:
        """All settings, the first dimension slowest; `options` says the values of a dimension, none to leave it out."""

        def walk(depth: int, picks: Picks, settings: dict[str, Any]) -> Iterator[Picks]:
            if depth == len(self.entries):
                yield picks
                return
            entry = self.entries[depth]
            alternative = self._active(entry, settings)
            choices = [] if alternative is None else options(entry.alternatives[alternative])
            if alternative is None or not choices:
                yield from walk(depth + 1, picks, settings)
                return
            for choice in choices:
                pick = choice._replace(alternative=alternative)
                yield from walk(depth + 1, {**picks, entry.key: pick}, self._with(settings, entry, pick.value))

        return walk(0, {}, self._start)

    def grid(self) -> Iterator[Picks]:
        """All combinations of the dimensions that are a grid; the others are left out."""
        return self.leaves(lambda dimension: _all(dimension) if dimension.kind == "grid" else [])

    def everything(self) -> Iterator[Picks]:
        """All combinations of finite dimensions; intervals are left out."""
        return self.leaves(_all)

    def corners(self) -> Iterator[Picks]:
        """All combinations of finite dimensions and the two ends of intervals."""
        return self.leaves(lambda dimension: _all(dimension) or [Pick(end) for end in dimension.ends])

    def _active(self, entry: Entry, settings: dict[str, Any]) -> int | None:
        for number, dimension in enumerate(entry.alternatives):
            if all(holds(said(settings, key), wanted) for key, wanted in dimension.when.items()):
                return number
        return None

    def _with(self, settings: dict[str, Any], entry: Entry, value: Any) -> dict[str, Any]:
        return self._bases[value] if entry.key == RUN else placed(settings, entry.path, value)


def values_of(picks: Picks) -> dict[str, Any]:
    """Dotted key -> value."""
    return {key: pick.value for key, pick in picks.items()}


def said(settings: dict[str, Any], key: str) -> Any:
    """What settings say of a dotted key, None if nothing; `measure: sam` is short for a section with that name."""
    value: Any = settings
    for part in key.split("."):
        if part == "name" and isinstance(value, str):
            return value
        value = value.get(part) if isinstance(value, dict) else None
    return value


def holds(value: Any, wanted: tuple[Any, ...]) -> bool:
    """Whether a value is one of those wanted; a section is also known by its name."""
    candidates = [value]
    if isinstance(value, dict) and "name" in value:
        candidates.append(value["name"])
    return any(c == w and isinstance(c, bool) == isinstance(w, bool) for c in candidates for w in wanted)


def _all(dimension: Dimension) -> list[Pick]:
    return [Pick(value, position) for position, value in enumerate(dimension.finite)]


def _related(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two paths lie on one line."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _in_order(entries: list[Entry]) -> list[Entry]:
    """As they are written, but each after those that it follows."""
    ordered: list[Entry] = []
    waiting = entries
    while waiting:
        free = next((entry for entry in waiting if not any(entry.follows(other) for other in waiting)), None)
        if free is None:
            raise CircularError([entry.key for entry in waiting])
        ordered.append(free)
        waiting = [entry for entry in waiting if entry is not free]
    return ordered
