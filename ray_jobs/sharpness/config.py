"""The section `sharpness:` of a run description: what is measured, on how many examples, how exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema

from ray_jobs.explain import refusal
from ray_jobs.section import Count, Positive, Section

Name = Literal[
    "frobenius_squared",
    "trace",
    "measure",
    "top_eigenvalues",
    "log_determinant",
    "ggn_log_determinant",
    "spectral_density",
]
NAMES: tuple[Name, ...] = get_args(Name)
OF_PROBES = ("frobenius_squared", "trace", "measure")  # means over `probes` products with H
GRAM_LIMIT = 4096  # examples x classes that ggn_log_determinant takes: its time grows with the square


def _epochs(value: Any) -> Any:
    """ "5 epochs" -> 5."""
    if not isinstance(value, str):
        return value
    told = re.fullmatch(r"(\d+) epochs?", value.strip())
    if told is None:
        found = refusal([("", f"must be a number of epochs, such as 1 epoch or 5 epochs, not {value!r}")])
        assert found
        raise found
    return int(told[1])


_EPOCHS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": "^[1-9][0-9]* epochs?$", "examples": ["5 epochs"]},
    ]
}
Epochs = Annotated[int, BeforeValidator(_epochs), Field(ge=1), WithJsonSchema(_EPOCHS_SCHEMA)]


class SharpnessConfig(Section):
    """Measures the Hessian of the training loss while a run trains; the training itself is not touched."""

    every: Epochs = Field(1, description="epochs from one measurement to the next; the last epoch is always measured")
    measures: list[Name] = Field(
        ["frobenius_squared", "trace"],
        min_length=1,
        description="of H: squared Frobenius norm, trace, largest eigenvalues, sum log(1 + |lambda| / delta); of the "
        "Gauss-Newton matrix: its log-pseudo-determinant; measure: S(x) of Definition 1 with the run's (phi, psi, mu)",
    )
    probes: int = Field(100, ge=3, description="random vectors of frobenius_squared, trace and measure")
    lanczos_probes: int = Field(10, ge=2, description="random vectors of log_determinant and spectral_density")
    examples: Count = Field(1280, description="training examples to measure on, chosen by the seed; never augmented")
    top_k: Count = Field(1, description="how many eigenvalues top_eigenvalues gives, from the largest down")
    delta: list[Positive] = Field([1e-6, 1e-4, 1e-2, 1.0], min_length=1, description="of log_determinant")
    precision: Literal["float32", "float64"] = Field("float64", description="float32 is 6e-4 off near zero loss")
    chunk: Count = Field(25, description="random vectors that share a forward pass: fewer need less memory")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key in ("measures", "delta"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                yield key, f"must name each once, not {', '.join(map(str, values))}"
