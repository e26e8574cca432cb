"""pydantic's findings told as mistakes in a file, with the help of the model's JSON Schema.

run.yaml:14: optimizer.rhoo: unknown key (value 0.1). Did you mean 'rho'? Allowed: base, measure, noise, rho, ...
run.yaml:19: training.epochs: must be an integer >= 1, not 0
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from ray_jobs.errors import ConfigError
from ray_jobs.redaction import MASK, is_secret
from ray_jobs.yaml_source import Path, Problem, Source, shown

Model = TypeVar("Model", bound=BaseModel)
Schema = dict[str, Any]


class Spot(NamedTuple):
    """Where in file and schema a finding is: `node` describes the value, `owner` the section that it stands in."""

    path: Path
    node: Schema
    owner: Schema
    union: Schema | None  # the choice by name that `owner` is one of


def validated(model: type[Model], source: Source) -> Model:
    """The source as a model.

    Raises:
        ConfigError: one line for each mistake, in the order of the file's lines.
    """
    config, problems = checked(model, source)
    if problems or config is None:
        raise ConfigError(told(problems))
    return config


def checked(model: type[Model], source: Source) -> tuple[Model | None, list[Problem]]:
    """The source as a model, None if it is none, and the mistakes in it."""
    config, problems = None, list(source.problems)
    try:
        config = model.model_validate(source.value)
    except ValidationError as error:
        explainer = _Explainer(model.model_json_schema(), source)
        known = {problem.path for problem in problems}
        for detail in error.errors(include_url=False):
            for problem in explainer.problems(detail):
                if problem.path not in known:  # one for each key: a union finds the same value wrong in several ways
                    known.add(problem.path)
                    problems.append(problem)
    return config, problems


def told(problems: Iterable[Problem]) -> str:
    """One line for each mistake, in the order of the file's lines."""
    return "\n".join(str(problem) for problem in sorted(problems, key=lambda problem: problem.place.order))


def refusal(findings: Iterable[tuple[str, str]]) -> PydanticCustomError | None:
    """What a validator raises: (key, what is wrong with it) for each finding; None if there is none."""
    found = list(findings)
    text = "; ".join(f"{key}: {what}" if key else what for key, what in found)
    return PydanticCustomError("refusal", "{text}", {"text": text, "findings": found}) if found else None


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'rho'?", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


class _Explainer:
    def __init__(self, schema: Schema, source: Source) -> None:
        self._root = schema
        self._source = source

    def problems(self, detail: ErrorDetails) -> Iterator[Problem]:
        """One of pydantic's findings, at its place in the file and in words."""
        spot = self._find(detail["loc"])
        value = MASK if any(is_secret(str(part)) for part in spot.path) else detail["input"]
        if detail["type"] == "refusal":
            for key, what in detail["ctx"]["findings"]:
                yield self._problem((*spot.path, *(key.split(".") if key else ())), what)
        elif detail["type"] == "extra_forbidden":
            yield self._problem(spot.path, self._unknown_key(spot, value))
        elif detail["type"] == "missing":
            yield self._problem(spot.path, f"missing; it must be {self._allowed(spot.node)}")
        elif "discriminator" in spot.node:
            yield self._choice(spot)
        else:
            yield self._problem(spot.path, self._wrong_value(spot.node, value))

    def _problem(self, path: Path, text: str) -> Problem:
        return Problem(self._source.place(path), path, text)

    def _find(self, loc: tuple[str | int, ...]) -> Spot:
        """Follows pydantic's location, which puts the name of a choice between the keys, through the schema."""
        path: Path = ()
        node = owner = self._root
        chosen_from: Schema | None = None  # the choice by name that `node` is one of
        union: Schema | None = None
        for part in loc:
            if "discriminator" in node:
                chosen_from, node = node, self._variant(node, str(part))
                continue
            if part in node.get("properties", {}):
                following = node["properties"][part]
            elif isinstance(part, int) and node.get("type") == "array":
                items = node.get("prefixItems", [])
                following = items[part] if part < len(items) else node.get("items", {})
            elif node.get("type") == "object":  # an unknown key, or one of a section with free keys
                following = node.get("additionalProperties") or {}
            else:
                break  # the alternative of a union without names that pydantic tried
            path, owner, union = (*path, part), node, chosen_from
            node, chosen_from = self._resolve(following), None
        return Spot(path, node, owner, union)

    def _resolve(self, node: Schema) -> Schema:
        """Through references, and through `null` and the short form by name to the section that is meant."""
        while "$ref" in node:
            node = self._root["$defs"][node["$ref"].rpartition("/")[2]]
        sections = [self._resolve(part) for part in node.get("anyOf", [])]
        sections = [part for part in sections if "discriminator" in part or part.get("type") == "object"]
        return sections[0] if sections else node

    def _variant(self, union: Schema, name: str) -> Schema:
        return self._resolve({"$ref": union["discriminator"]["mapping"][name]})

    def _unknown_key(self, spot: Spot, value: Any) -> str:
        key, allowed = str(spot.path[-1]), list(spot.owner.get("properties", {}))
        told = f"unknown key (value {shown(value)})."
        others = self._names_with(spot.union, key) if spot.union else []
        elsewhere = [section for section in self._sections_with(key, self._root, "") if key != "name"]
        if others:
            told = f"belongs to {' and '.join(others)}, not to {self._name_at(spot.path[:-1])} (value {shown(value)})."
        elif elsewhere and not difflib.get_close_matches(key, allowed, n=1, cutoff=0.8):
            told += f" It belongs to {' or '.join(elsewhere[:3])}."
        else:
            told += nearest(key, allowed)
        return f"{told} Allowed: {', '.join(allowed)}"

    def _names_with(self, union: Schema, key: str) -> list[str]:
        names = union["discriminator"]["mapping"]
        return [name for name in names if key in self._variant(union, name)["properties"]]

    def _name_at(self, path: Path) -> str:
        value: Any = self._source.value
        for part in path:
            value = value[part]
        return str(value["name"])

    def _sections_with(self, key: str, node: Schema, at: str) -> Iterator[str]:
        """The dotted sections below a node that have a key."""
        if "discriminator" in node:
            names = self._names_with(node, key)
            if names:
                yield f"{at} ({', '.join(names)})"
            return
        if at and key in node.get("properties", {}):
            yield at
        for name, child in node.get("properties", {}).items():
            yield from self._sections_with(key, self._resolve(child), f"{at}.{name}".removeprefix("."))

    def _choice(self, spot: Spot) -> Problem:
        """A section chosen by name, without a name or with an unknown one."""
        value: Any = self._source.value
        for part in spot.path:
            value = value[part]
        names = list(spot.node["discriminator"]["mapping"])
        if isinstance(value, dict) and "name" not in value:
            return self._problem((*spot.path, "name"), f"missing; it must be one of {', '.join(names)}")
        path, name = ((*spot.path, "name"), value["name"]) if isinstance(value, dict) else (spot.path, value)
        return self._problem(path, self._wrong_value({"enum": names}, name))

    def _wrong_value(self, node: Schema, value: Any) -> str:
        allowed = self._allowed(node)
        if isinstance(value, float) and not math.isfinite(value):
            allowed += ", and finite"
        told = f"must be {allowed}, not {shown(value)}."
        if isinstance(value, str):
            told += nearest(value, self._words(node))
            if any(kind in ("integer", "number") for kind in self._kinds(node)) and _is_number(value):
                told += " Write it without quotes."
        elif self._kinds(node) == ["string"] and isinstance(value, int | float):
            told += " Write it in quotes."
        return told.removesuffix(".")

    def _kinds(self, node: Schema) -> list[str]:
        return [part["type"] for part in node.get("anyOf", [node]) if part.get("type", "null") != "null"]

    def _words(self, node: Schema) -> list[str]:
        parts = node.get("anyOf", [node])
        return [str(word) for part in parts for word in part.get("enum", [part["const"]] if "const" in part else [])]

    def _allowed(self, node: Schema) -> str:
        """What a value must be, in words."""
        if "discriminator" in node:
            return f"one of {', '.join(node['discriminator']['mapping'])}"
        if "anyOf" in node:
            return " or ".join(self._allowed(part) for part in node["anyOf"])
        if "enum" in node:
            return f"one of {', '.join(map(str, node['enum']))}"
        if "const" in node:
            return str(node["const"])
        bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        limits = " and ".join(f"{sign} {node[name]}" for name, sign in bounds.items() if name in node)
        match node.get("type"):
            case "integer" | "number" as kind:
                return f"{'an integer' if kind == 'integer' else 'a number'} {limits}".strip()
            case "boolean":
                return "true or false"
            case "null":
                return "null"
            case "array" if "prefixItems" in node:
                return f"a list of {len(node['prefixItems'])} numbers"
            case "array":
                least = f" of at least {node['minItems']}" if "minItems" in node else ""
                return f"a list{least}, each {self._allowed(node['items'])}"
            case "object" if "properties" in node:
                return f"a section with the keys {', '.join(node['properties'])}"
            case "object":
                texts = node["additionalProperties"].get("type") == "string"
                return f"a section of names and {'texts' if texts else 'values'}"
            case _:
                example = f" such as {node['examples'][0]}" if "examples" in node else ""
                kind = "the path of a folder" if node.get("format") == "path" else "text"
                return f"{kind}{example}{' that is not empty' if 'minLength' in node else ''}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
