"""YAML that remembers its lines, and pydantic's findings told as mistakes in a file.

    run.yaml:14: optimizer.rhoo: unknown key (did you mean 'rho'?), value 0.1; allowed here: base, measure, rho, ...

Reading is safe (no tags, no objects), bounded (1 MiB, 20 levels, 10,000 nodes) and strict (no key twice).
"""

from __future__ import annotations

import copy
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ray_jobs.errors import ConfigError, first_line

Path = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 20, 10_000


@dataclass(frozen=True)
class Source:
    """Plain values, and where each came from: "run.yaml:14" or "--set optimizer.rho=0.1"."""

    value: Any
    origin: str
    places: dict[Path, str]

    def place(self, path: Path) -> str:
        """Where a path came from: an override in it, else its line, else the line of the nearest part around it."""
        overrides = [place for known, place in self.places.items() if known[: len(path)] == path and "--set" in place]
        if overrides:
            return overrides[-1]
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, self.origin)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str | bytes, origin: str) -> Source:
    """Values and lines of a YAML mapping.

    Raises:
        ConfigError: it is not YAML, not a mapping, too large or too deep, or gives a key twice.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin}: {len(text)} bytes; a run description has at most {MAX_BYTES}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            places: dict[Path, str] = {}
            value = _Reader(loader, origin, places).read(node, ()) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{origin}: not valid YAML: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: a run description is a mapping of sections, got {value!r}")
    return Source(value, origin, places)


class _Reader:
    def __init__(self, loader: _Loader, origin: str, places: dict[Path, str]) -> None:
        self._loader = loader
        self._origin = origin
        self._places = places
        self._nodes = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        where = f"{self._origin}:{node.start_mark.line + 1}"
        self._nodes += 1
        if len(path) > MAX_DEPTH or self._nodes > MAX_NODES:
            raise ConfigError(f"{where}: more than {MAX_DEPTH} levels or {MAX_NODES} entries")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            raise ConfigError(f"{where}: not valid YAML here: the tag {node.tag!r}")
        self._places.setdefault(path, where)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(part, (*path, i)) for i, part in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{self._origin}:{line}: a key must be a word, got {key_node.value!r}")
            if key in mapping:
                first = self._places[(*path, key)].rpartition(":")[2]
                raise ConfigError(f"{self._origin}:{line}: {_dotted((*path, key))}: given twice, first in line {first}")
            self._places[(*path, key)] = f"{self._origin}:{line}"
            mapping[key] = self.read(value_node, (*path, key))
        return mapping


def read_override(source: Source, override: str) -> Source:
    """The source with one `key.path=value` on top; the value is YAML.

    Raises:
        ConfigError: there is no "=", the value is not YAML, or a part of the path is no section.
    """
    where = f"--set {override}"
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"{where}: write it as key.path=value, for example --set optimizer.rho=0.05")
    parsed = read_yaml(f"value: {text.strip() or 'null'}", where).value["value"]
    value = copy.deepcopy(source.value)
    section = value
    for depth, part in enumerate(path[:-1], 1):
        child = section.setdefault(part, {})
        if isinstance(child, str):  # `measure: frobenius` is short for a section with that name
            child = section[part] = {"name": child}
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {_dotted(path[:depth])} is {child!r}, it has no setting {path[depth]!r}")
        section = child
    section[path[-1]] = parsed
    places = {known: place for known, place in source.places.items() if known[: len(path)] != path}
    return Source(value, source.origin, {**places, path: where})


def validated(model: type[Model], source: Source) -> Model:
    """The source as a model.

    Raises:
        ConfigError: one line for each mistake.
    """
    try:
        return model.model_validate(source.value)
    except ValidationError as error:
        lines: dict[Path, list[str]] = {}
        for detail in error.errors(include_url=False):
            path = _path_in(source.value, detail["loc"])
            lines.setdefault(path, []).append(_finding(model, source, path, detail))
        told = [
            f"{source.place(path)}: {_dotted(path)}: {', or '.join(dict.fromkeys(findings))}"
            for path, findings in lines.items()
        ]
        raise ConfigError("\n".join(told)) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'rho'?)", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path) or "the whole description"


def _path_in(value: Any, loc: Sequence[str | int]) -> Path:
    """pydantic's location without the names of union members that it puts between the keys."""
    path: Path = ()
    for i, part in enumerate(loc):
        if isinstance(value, dict):
            if part in value:
                value = value[part]
            elif i < len(loc) - 1 or part == value.get("name"):
                continue  # a union member's tag
            else:
                value = None  # a missing key
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue  # which alternative of a union a plain value was tried as
        path = (*path, part)
    return path


def _finding(model: type[BaseModel], source: Source, path: Path, detail: ErrorDetails) -> str:
    """One mistake in words: the value, what is allowed, the nearest known word."""
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(model, source, path, value)
    if kind == "missing":
        return "is missing, and has no default"
    if kind in ("union_tag_invalid", "literal_error"):
        allowed = re.findall(r"'([^']*)'", str(context.get("expected_tags", context.get("expected"))))
        given = context.get("tag", value)
        return f"{given!r} is not known{nearest(str(given), allowed)}; allowed: {', '.join(allowed)}"
    if kind in ("union_tag_not_found", "model_type", "model_attributes_type"):
        names = [name for choice in _models(model, path) for name in _tags(choice)]
        return f"{value!r} is no section" + (f" with a name; allowed names: {', '.join(names)}" if names else "")
    if kind == "value_error":
        return str(context["error"])
    rule = re.sub("^(Input|String|Value) should", "it must", detail["msg"])
    return f"{value!r} is not allowed: {rule}"


def _unknown_key(model: type[BaseModel], source: Source, path: Path, value: Any) -> str:
    *parent, key = path
    choices = _models(model, tuple(parent))
    name = _at(source.value, tuple(parent)).get("name")
    here = [choice for choice in choices if len(choices) == 1 or name in _tags(choice)]
    allowed = [field for choice in here for field in choice.model_fields]
    owners = [tag for choice in choices if key in choice.model_fields for tag in _tags(choice)]
    if owners:
        return f"belongs to {' and '.join(owners)}, not to {name} (value {value!r}); allowed here: {', '.join(allowed)}"
    return f"unknown key{nearest(str(key), allowed)}, value {value!r}; allowed here: {', '.join(allowed)}"


def _at(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value


def _models(model: type[BaseModel], path: Path) -> list[type[BaseModel]]:
    """The section classes that the value at a path could be an object of."""
    choices: list[type[BaseModel]] = [model]
    for part in path:
        fields = [choice.model_fields[str(part)].annotation for choice in choices if part in choice.model_fields]
        choices = [found for annotation in fields for found in _sections(annotation)]
    return choices


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections(part)]


def _tags(choice: type[BaseModel]) -> list[str]:
    field = choice.model_fields.get("name")
    return [str(tag) for tag in typing.get_args(field.annotation)] if field else []
