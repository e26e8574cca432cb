"""A setting -> the description of its run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_jobs.config import DataConfig, RunConfig
from ray_jobs.explain import checked
from ray_jobs.sweep.cost import Resource, epochs_within, steps_per_epoch
from ray_jobs.sweep.space import RUN
from ray_jobs.yaml_source import Path, Place, Problem, Source, put, shown

_PATHS = (("data", "root"), ("checkpoint", "storage"))


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep have in common.

    bases: name -> base run, the sweep's `set` applied. run: the base run's name, None if `run` is a dimension.
    """

    name: str
    run: str | None
    bases: Mapping[str, Source]
    resource: Resource
    budget: float | None

    def config(
        self, values: Mapping[str, Any], index: int, places: Mapping[str, Mapping[Path, Place]], own: Place
    ) -> tuple[RunConfig | None, list[Problem]]:
        """The run with these values, or the mistakes in it. places: by key, where values came from; own: all else."""
        name = values.get(RUN, self.run)
        if name not in self.bases:
            return None, [Problem(own, (RUN,), f"the sweep has no run {shown(name)}")]
        source = put(self.bases[name], ("name",), f"{self.name}/{index}", {("name",): own})
        for key in sorted(set(values) - {RUN}, key=lambda key: key.count(".")):  # a section before what is in it
            path = tuple(key.split("."))
            source = put(source, path, values[key], {path: own, **places.get(key, {})})
        if self.resource == "epochs" and self.budget is not None:
            source = put(source, ("training", "epochs"), int(self.budget), {("training", "epochs"): own})
        config, problems = checked(RunConfig, source)
        if config is None or problems or self.resource != "gradient_evaluations":
            return config, problems
        return self._with_equal_evaluations(config, source, own)

    def _with_equal_evaluations(
        self, config: RunConfig, source: Source, own: Place
    ) -> tuple[RunConfig | None, list[Problem]]:
        key = ("training", "epochs")
        steps = steps_per_epoch(config)
        if steps < 1:
            few = f"{config.training.batch_size} is more than the training split has examples: not one whole batch"
            return None, [Problem(source.place(("training", "batch_size")), ("training", "batch_size"), few)]
        epochs = epochs_within(config, self.resource, self.budget)
        if epochs < 1:
            return None, [Problem(own, ("budget",), f"{self.budget} does not pay one epoch of {steps} steps")]
        return checked(RunConfig, put(source, key, epochs, {key: own}))


def with_settings(base: Source, settings: Mapping[str, Any], places: Mapping[str, Mapping[Path, Place]]) -> Source:
    """A base run with the sweep's `set` on top. places: by key, where each came from."""
    for key in sorted(settings, key=lambda key: key.count(".")):
        path = tuple(key.split("."))
        base = put(base, path, settings[key], places[key])
    return base


def grounded(path: tuple[str, ...], value: Any) -> Any:
    """A value of a run description with its relative paths made absolute, wherever the sweep is resumed from."""
    for known in _PATHS:
        if path == known and isinstance(value, str) and value and "://" not in value:
            return os.path.abspath(os.path.expanduser(value))
        if path == known[: len(path)] and isinstance(value, dict) and known[len(path)] in value:
            inner = known[len(path)]
            value = {**value, inner: grounded((*path, inner), value[inner])}
    return value


def data_title(data: DataConfig) -> str:
    """What a trial is on, in a word that may stand in a metric's name: numbers on two of them are not compared."""
    name = data.name if data.name != "imagefolder" else f"imagefolder {data.root}"
    name = name if not data.options else f"{name} {' '.join(f'{k} {v}' for k, v in data.options.items())}"
    parts = [name, f"{data.fraction:g} of it" if data.fraction < 1 else ""]
    parts.append(f"{data.label_noise:g} of labels wrong" if data.label_noise else "")
    return re.sub(r"[^\w ./-]", "_", " ".join(filter(None, parts)))
