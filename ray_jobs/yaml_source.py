"""YAML that remembers its lines: reading, `--set` overrides, writing. `explain.py` tells the mistakes.

Reading is safe (no tags, no objects), bounded (1 MiB, 20 levels, 20,000 values) and strict (no key twice, no aliases).
Which text is a number follows YAML 1.2, not PyYAML's 1.1: 1e-3 is a number, while no, off, 1:30, 2026-01-01 are text.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from ray_jobs.errors import ConfigError
from ray_jobs.redaction import without_secrets

Path = tuple[str | int, ...]

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 20, 20_000
TOO_DEEP = f"nested far too deeply; a run description has at most {MAX_DEPTH} levels"

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")


class Place(NamedTuple):
    """Where a value came from: "run.yaml:14" or "--set optimizer.rho=0.1"; `order` sorts mistakes by line."""

    order: int
    text: str


class Problem(NamedTuple):
    """One mistake: where, at which key, what."""

    place: Place
    path: Path
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place.text, dotted(self.path), self.text) if part)


@dataclass(frozen=True)
class Source:
    """Plain values, where each came from, and the mistakes found so far."""

    value: dict[str, Any]
    places: dict[Path, Place]
    problems: tuple[Problem, ...] = ()

    def place(self, path: Path) -> Place:
        """Where a path came from; for a key that is missing, where the section around it did."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places[path]


def dotted(path: Path) -> str:
    """optimizer.base.betas[0]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, without aliases: nothing in a file can grow beyond its size or contain itself."""

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name and kind)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """PyYAML's, for a value without aliases, not too deep and not one too many."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"the alias *{event.anchor} is not accepted here: write the value out"
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        self._nodes += 1
        self._depth += 1
        try:
            if self._nodes > MAX_NODES or self._depth > 2 * MAX_DEPTH:  # depth: `read` says it better, just beyond
                what = f"more than {MAX_NODES} values" if self._nodes > MAX_NODES else TOO_DEEP
                raise yaml.MarkedYAMLError(None, None, what, self.get_mark())
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


for _name, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for a number, so that every reader gets the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True))

_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": lambda text: float(re.sub(r"\.(inf|nan)$", r"\1", text.lower())),
    _TAG + "str": str,
}


def write_yaml(value: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_file(path: str) -> Source | None:
    """What `read_yaml` makes of a file; None if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return read_yaml(file.read(MAX_BYTES + 1), path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def name_in(path: os.PathLike[str]) -> str | None:
    """What a description on disk says of its name, whatever else is in it; None: nothing, or there is no file."""
    try:
        with open(path, encoding="utf-8") as file:
            line = re.search(r"^name:.*$", file.read(MAX_BYTES), re.MULTILINE)
        return None if line is None else str(read_yaml(line[0], str(path)).value["name"])
    except (OSError, ValueError):
        return None


def read_yaml(text: str | bytes, origin: str) -> Source:
    """Values and lines of a YAML mapping; `origin` is what errors call the text.

    Raises:
        ConfigError: it is not YAML, not a mapping, too large or too deep.
    """
    node = _compose(text, lambda line: f"{origin}:{line}" if line else origin)
    reader = _Reader(lambda node: Place(node.start_mark.line, f"{origin}:{node.start_mark.line + 1}"))
    value = reader.read(node, ()) if node is not None else None
    if not isinstance(value, dict):
        held = "it is empty" if node is None else f"it holds {shown(value)}"
        raise ConfigError(f"{origin}: a run description is a mapping of sections such as data and model, but {held}")
    return Source(value, reader.places, tuple(reader.problems))


def split(key: str) -> tuple[str, ...]:
    """The path that a dotted key names."""
    return tuple(key.split("."))


def read_override(
    source: Source,
    override: str,
    path_of: Callable[[str], tuple[str, ...]] = split,
    example: str = "optimizer.rho=0.05",
) -> Source:
    """The source with one `key.path=value` on top; the value is YAML, nothing after the "=" is null.

    What cannot be read is added to the source's problems.
    """
    place = Place(sys.maxsize, f"--set {' '.join(override.split())}")
    key, equals, text = override.partition("=")
    path = path_of(key.strip())
    if not equals or not all(path):
        return _with_problem(source, place, (), f"write it as key.path=value, for example --set {example}")
    reader = _Reader(lambda _: place)
    try:
        node = _compose(text, lambda _: place.text)
    except ConfigError as error:
        return _with_problem(source, place, (), str(error).removeprefix(f"{place.text}: "))
    new = reader.read(node, path) if node is not None else None
    source = put(source, path, new, {path: place, **reader.places})
    return Source(source.value, source.places, (*source.problems, *reader.problems))


def put(source: Source, path: tuple[str, ...], value: Any, places: Mapping[Path, Place]) -> Source:
    """The source with a value on top; `places` says where it came from, and what is in it, beginning with `path`."""
    place = places[path]
    for depth in range(1, len(path)):
        held = _at(source.value, path[:depth])
        if not isinstance(held, dict | str | None):
            problem = f"the value {shown(held)} has no setting {path[depth]!r} in it"
            return _with_problem(source, place, path[:depth], problem)
    kept = {known: at for known, at in source.places.items() if known[: len(path)] != path}
    parents: dict[Path, Place] = {path[:depth]: place for depth in range(1, len(path)) if path[:depth] not in kept}
    return Source(placed(source.value, path, value), {**kept, **parents, **places}, source.problems)


def placed(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """New settings, with a value at a path. `measure: frobenius` is short for a section with that name."""
    first, *rest = path
    if rest:
        section = settings.get(first)
        if isinstance(section, str):
            section = {"name": section}
        value = placed(section if isinstance(section, dict) else {}, tuple(rest), value)
    return {**settings, first: value}


def _at(settings: dict[str, Any], path: Path) -> Any:
    """The value at a path, None where there is none; a value on the way that is no section is the answer itself."""
    value: Any = settings
    for part in path:
        if not isinstance(value, dict):
            return value
        value = value.get(part)
    return value


def shown(value: Any, key: str = "") -> str:
    """A value as YAML has it, without secrets, cut to a length that fits a line of text.

    Args:
        key: what it stands under.
    """
    value = without_secrets(value, key)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _with_problem(source: Source, place: Place, path: Path, text: str) -> Source:
    return Source(source.value, source.places, (*source.problems, Problem(place, path, text)))


def _compose(text: str | bytes, where: Callable[[int], str]) -> yaml.Node | None:
    """The nodes of a text with one YAML document; `where` makes a line, or 0 for none, into a place."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where(0)}: {len(text)} bytes; a run description has at most {MAX_BYTES}")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where(line)}: not valid YAML: {problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where(0)}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{where(0)}: {TOO_DEEP}") from None


class _Reader:
    """Nodes -> plain values; collects places and problems."""

    def __init__(self, place: Callable[[yaml.Node], Place]) -> None:
        self._place = place
        self.places: dict[Path, Place] = {}
        self.problems: list[Problem] = []

    def read(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node; what it must not be goes to `problems`, with its place."""
        self.places.setdefault(path, self._place(node))
        if len(path) > MAX_DEPTH:
            return self._refuse(node, path[:3], f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(part, (*path, i)) for i, part in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            return self._refuse(node, path, f"the YAML tag {node.tag.replace(_TAG, '!!')} is not accepted")
        try:
            node.value.encode()
            return _SCALARS[node.tag](node.value)
        except ValueError:  # an explicit tag that does not fit, an endless integer, half a surrogate pair
            held = shown(node.value, str(path[-1]) if path else "")
            return self._refuse(node, path, f"{held} cannot be read as {node.tag.removeprefix(_TAG)}")

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, path, "a key must be a word")
                continue
            key = (*path, key_node.value)
            if key_node.value in mapping:
                self._refuse(key_node, key, f"given twice, first at {self.places[key].text}; keep one")
                continue
            self.places[key] = self._place(key_node)
            mapping[key_node.value] = self.read(value_node, key)
        return mapping

    def _refuse(self, node: yaml.Node, path: Path, text: str) -> None:
        self.problems.append(Problem(self._place(node), path, text))
