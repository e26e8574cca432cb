"""The sweep file as an object: what `config.load_sweep` reads and checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_serializer, model_validator

from ray_jobs.config import RunConfig
from ray_jobs.errors import ConfigError
from ray_jobs.explain import told
from ray_jobs.redaction import is_secret, redacted, without_secrets
from ray_jobs.section import NAME_PATTERN, ByName, Count, Positive, Section
from ray_jobs.sweep.cost import Resource, last_rung
from ray_jobs.sweep.space import Dimension, Picks, Space, values_of
from ray_jobs.sweep.trials import Trials, with_settings
from ray_jobs.yaml_source import Path, Place, Source, shown, split

SEED = "training.seed"
CORNERS = 2000
"""Combinations that are looked at where all of them are more."""

# search


class GridSearch(Section):
    """All combinations."""

    name: Literal["grid"]


class RandomSearch(Section):
    """Settings drawn independently of each other: setting i depends on (seed, i) alone."""

    name: Literal["random"]
    trials: Count = Field(description="settings that are drawn, for each combination of grids")
    seed: int = 0


class TpeSearch(Section):
    """Optuna's tree-structured Parzen estimator."""

    name: Literal["tpe"]
    trials: Count = Field(description="settings that are drawn, for each combination of grids")
    seed: int = 0
    startup: Count = Field(10, description="settings that are drawn as by random search before it learns")


SearchConfig = Annotated[GridSearch | RandomSearch | TpeSearch, Field(discriminator="name"), ByName()]

# stopping


class NoStopping(Section):
    """Every trial gets all of its budget."""

    name: Literal["none"]


class AshaStopping(Section):
    """Asynchronous successive halving, in trial order."""

    name: Literal["asha"]
    first_rung: Positive = Field(description="of the resource: where trials are compared first")
    eta: int = Field(3, ge=2, description="one trial in eta goes on; the next rung is eta times as far")


class MedianStopping(Section):
    """Cuts trials that more than half of the earlier ones were better than, in trial order."""

    name: Literal["median"]
    first_rung: Positive = Field(description="of the resource: where trials are compared first")
    every: Positive | None = Field(None, description="of the resource: from rung to rung; null: first_rung")
    grace_trials: Count = Field(5, description="the first trials, which are never cut")


class PbtStopping(Section):
    """Population-based training: the worst go on from the best, with rho and lam perturbed."""

    name: Literal["pbt"]
    every: Positive = Field(description="of the resource: length of a generation")
    quantile: float = Field(0.25, gt=0, le=0.5, description="part of the population that goes on from others")
    seed: int = 0


StoppingConfig = Annotated[
    NoStopping | AshaStopping | MedianStopping | PbtStopping, Field(discriminator="name"), ByName()
]

# all of it


class SweepConfig(Section):
    """A complete sweep. Only `config.load_sweep` makes one that was checked."""

    name: str = Field(
        pattern=NAME_PATTERN,
        max_length=90,
        examples=["rho-of-sam, of letters, digits, '.', '_', '-' and '/', at most 90"],
    )
    description: Annotated[str, AfterValidator(redacted)] = ""
    run: str | None = Field(None, description="recipe or file of the base run; or a dimension of the space")
    runs: Annotated[dict[str, dict[str, Any]], AfterValidator(without_secrets)] = Field(
        default_factory=dict, description="base runs by name, written out; they go before recipes and files"
    )
    set: Annotated[dict[str, Any], AfterValidator(without_secrets)] = Field(
        default_factory=dict, description="dotted key -> value, in every trial"
    )
    space: dict[str, Annotated[tuple[Dimension, ...], Field(strict=False)]] = Field(
        default_factory=dict, description="dotted key -> its values; a list of them where conditions tell them apart"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (), strict=False, description="each setting is run with each of them; none: the run's own"
    )
    search: SearchConfig = GridSearch(name="grid")
    stopping: StoppingConfig = NoStopping(name="none")
    metric: str = Field("accuracy/validation", description="what trials are judged by, at their last epoch")
    mode: Literal["max", "min"] = Field("max", description="default: max for accuracy, else min")
    resource: Resource = Field("epochs", description="what trials get equally, and rungs are measured in")
    budget: Positive | None = Field(None, description="of the resource, a trial; null: what the run's epochs cost")
    max_concurrent: Count | None = Field(None, description="trials at once; null: as many as the cluster takes")
    in_process: bool = Field(
        False, description="trials of one CPU worker share processes: for many small ones, whose start is their cost"
    )
    retries: int = Field(2, ge=0, description="how often a trial that failed is tried again")

    @field_serializer("space")
    def _short_form(self, space: dict[str, tuple[Dimension, ...]]) -> dict[str, Any]:
        written = {
            key: [dimension.model_dump(mode="json") for dimension in alternatives]
            for key, alternatives in space.items()
        }
        return {key: all_ if len(all_) > 1 else all_[0] for key, all_ in written.items()}

    @model_validator(mode="before")
    @classmethod
    def _mode_of_metric(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "mode" not in settings and "metric" in settings:
            return {**settings, "mode": "max" if str(settings["metric"]).startswith("accuracy") else "min"}
        return settings

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key in filter(is_secret, self.space):
            yield f"space.{key}", "looks like a secret, and a sweep tells its values to everyone: leave it out"

    def better(self, a: float, b: float) -> bool:
        """Whether a is strictly better than b; NaN is worse than every number."""
        if math.isnan(a) or math.isnan(b):
            return not math.isnan(a)
        return a > b if self.mode == "max" else a < b

    def trial(self, values: Mapping[str, Any], index: int) -> RunConfig:
        """The run of trial `index` with the values that `search.suggest` gave.

        Raises:
            ConfigError: they make no valid run; names the trial and its values.
        """
        shown_values = ", ".join(f"{key}={shown(value)}" for key, value in values.items())
        place = Place(0, f"{self.name}: trial {index} ({shown_values})")
        config, problems = self.trials.config(values, index, {}, place)
        if problems or config is None:
            raise ConfigError(told(problems))
        return config

    def differences(self, other: SweepConfig) -> list[str]:
        """What decides trials and verdicts, and is not the same in the other sweep, in words."""
        free = {"name", "description", "max_concurrent", "in_process", "retries"}
        mine, others = (sweep.model_dump(mode="json", exclude=free) for sweep in (self, other))
        return [
            f"{key}: {shown(value)} here, {shown(others[key])} there"
            for key, value in mine.items()
            if value != others[key]
        ]

    @cached_property
    def walk(self) -> Space:
        """The space over the base runs."""
        bases = {name: base.value for name, base in self.trials.bases.items()}
        return Space(self.space, bases, self.run)

    @cached_property
    def trials(self) -> Trials:
        """How a setting becomes a run."""
        here = Place(0, self.name)
        settings: dict[str, dict[Path, Place]] = {key: {split(key): here} for key in self.set}
        bases = {
            name: with_settings(Source(settings_, {(): here}), self.set, settings)
            for name, settings_ in self.runs.items()
        }
        return Trials(self.name, self.run, bases, self.resource, self.budget)

    def corners(self) -> list[Picks]:
        """Combinations of finite values and ends of intervals, CORNERS at most."""
        return list(itertools.islice(self.walk.corners(), CORNERS))

    @cached_property
    def last_rung(self) -> float:
        """The level of the resource beyond which no trial has an epoch left to save."""
        configs = [self.trial(values_of(picks), 0) for picks in self.corners()]
        return max(last_rung(config, self.resource, self.budget) for config in configs)
