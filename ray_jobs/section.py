"""What the sections of a run description are made of: strict, frozen, and with kinds of values that say their range."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    model_validator,
)
from pydantic_core import core_schema

from ray_jobs.explain import refusal
from ray_jobs.redaction import secret_options


def _absolute(path: Any) -> Any:
    if not isinstance(path, str):
        return path
    if not path or "://" in path:
        found = refusal([("", f"must be the path of a folder, such as ~/data, not {path!r}")])
        assert found
        raise found
    return os.path.abspath(os.path.expanduser(path))


OWN = "package.module:function"
"""What the name of a user's own function looks like."""

OwnName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", examples=[OWN])]
Options = Annotated[dict[str, JsonValue], Field(description=f"keyword arguments of a function {OWN}")]


def is_own(name: str) -> bool:
    """Whether a name stands for a user's function, `package.module:function`, and not for one of ours."""
    return ":" in name


def told_secrets(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what it is) for what a function of the user's must not be given in a description."""
    for key in secret_options(options):
        yield key, "looks like a secret, and descriptions are logged: let your function read it from the environment"


class ByName:
    """`measure: trace` is short for `measure: {name: trace}`, in YAML and in the JSON Schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def by_name(value: Any) -> Any:
            return {"name": value} if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(by_name, self._section(source, handler))

    def _section(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return handler(source)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        section = handler(schema)
        if "discriminator" not in section:
            return {"anyOf": [handler.resolve_ref_schema(section)["properties"]["name"], section]}
        return {"anyOf": [*_alone(section, handler), section]}


class ByNameOrOwn(ByName):
    """A choice by name of sections, the last of which is for a user's own function and has any OwnName for a name.

    pydantic's own discriminator takes names that are known beforehand alone.
    """

    def _section(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        *known, own = get_args(source)
        choices = {name: handler.generate_schema(kind) for kind in known for name in _names(kind)}
        choices[OWN] = handler.generate_schema(own)

        def choice(value: Any) -> str | None:
            name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
            return OWN if isinstance(name, str) and is_own(name) else name

        return core_schema.tagged_union_schema(choices, choice)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        variants: dict[str, str] = {}
        for ref in handler(schema)["oneOf"]:
            name = handler.resolve_ref_schema(ref)["properties"]["name"]
            variants |= dict.fromkeys(name.get("enum", [name.get("const", OWN)]), ref["$ref"])
        section = {
            "oneOf": [{"$ref": ref} for ref in dict.fromkeys(variants.values())],
            "discriminator": {"mapping": variants, "propertyName": "name"},
        }
        return {"anyOf": [*_alone(section, handler), section]}


def _names(kind: type[BaseModel]) -> tuple[str, ...]:
    """What a section's `name: Literal[...]` allows."""
    return get_args(kind.model_fields["name"].annotation)


def _alone(section: dict[str, Any], handler: GetJsonSchemaHandler) -> list[dict[str, Any]]:
    """The names that need no setting beside them, as JSON Schemas."""
    variants = {
        name: handler.resolve_ref_schema({"$ref": ref}) for name, ref in section["discriminator"]["mapping"].items()
    }
    known = [name for name, variant in variants.items() if variant["required"] == ["name"] and name != OWN]
    return [{"enum": known}, *([variants[OWN]["properties"]["name"]] if OWN in variants else [])]


class Section(BaseModel):
    """Frozen; unknown keys are refused; no number is made from a string."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(dotted key, what is wrong with it) where settings do not fit each other."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if found := refusal(self.conflicts()):
            raise found
        return self


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$"
"""Of a run or a sweep: a path of words, none of which is hidden or leads out, as `..` would."""

AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
