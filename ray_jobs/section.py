"""What the sections of a run description are made of: strict, frozen, and with kinds of values that say their range."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import core_schema

from ray_jobs.explain import refusal


def _absolute(path: Any) -> Any:
    if not isinstance(path, str):
        return path
    if not path or "://" in path:
        found = refusal([("", f"must be the path of a folder, such as ~/data, not {path!r}")])
        assert found
        raise found
    return os.path.abspath(os.path.expanduser(path))


class ByName:
    """`measure: trace` is short for `measure: {name: trace}`, in YAML and in the JSON Schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def by_name(value: Any) -> Any:
            return {"name": value} if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(by_name, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        section = handler(schema)
        variants = section["discriminator"]["mapping"]
        alone = [n for n, ref in variants.items() if handler.resolve_ref_schema({"$ref": ref})["required"] == ["name"]]
        return {"anyOf": [{"enum": alone}, section]}


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


AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
