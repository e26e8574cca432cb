"""One run, described: a YAML file or a recipe's name -> a frozen, strictly validated object, and back.

    config = load("mnist5k-frob", ["optimizer.rho=0.05", "training.epochs=3"])

Unknown keys are refused. Relative paths (data.root, checkpoint.storage) are taken from the current directory and made
absolute, since workers run elsewhere. `yaml_source.py` reads, `explain.py` turns what pydantic finds into errors with
file and line. The optimizer's sections are in `optimizer_config.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, WrapValidator, model_serializer

from ray_jobs import paper
from ray_jobs.errors import ConfigError
from ray_jobs.explain import nearest, refusal, validated
from ray_jobs.optimizer_config import ConstantSchedule, OptimizerConfig, ScheduleConfig
from ray_jobs.redaction import redacted, without_secrets
from ray_jobs.section import (
    NAME_PATTERN,
    OWN,
    AbsolutePath,
    ByName,
    Count,
    Options,
    OwnName,
    Positive,
    Section,
    is_own,
    told_secrets,
)
from ray_jobs.sharpness.config import SharpnessConfig
from ray_jobs.yaml_source import Source, read_file, read_override, read_yaml, shown, write_yaml

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "SharpnessConfig",
    "TrackingConfig",
    "changed",
    "dump_yaml",
    "from_dict",
    "json_schema",
    "load",
    "read",
    "recipe_names",
    "recipe_text",
]

# data and model


DataName = Literal["digits", "mnist5k", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder"]


class DataConfig(Section):
    """Which images, how many of them, and how they are changed."""

    name: DataName | OwnName
    options: Options = Field(default_factory=dict)
    root: AbsolutePath | None = Field(None, strict=False, description="folder of the data set's files")
    download: bool = Field(False, description="let torchvision download what is missing into root")
    fraction: float = Field(1.0, gt=0, le=1, description="first part of the training examples; 0.1 is Table 2's -S")
    label_noise: float = Field(0.0, ge=0, lt=1, description="part of the training labels moved to another class")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="part of the training set kept for model selection")
    augment: Literal["none", "crop_flip"] = Field("none", description="crop_flip: padding 4, random crop, mirror")
    image_size: Count | None = Field(None, description="imagefolder: height and width that images are resized to")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        folders = self.name == "imagefolder"
        yield from _unused_options(self.name, self.options)
        if self.download and folders:
            yield "download", "must be false: imagefolder is read from your own folder, data.root"
        if self.download and is_own(self.name):
            yield "download", f"must be false: {self.name} does itself what it needs"
        if self.image_size is None and folders:
            yield "image_size", "missing; imagefolder needs it, for example 64"
        if self.image_size is not None and not folders:
            yield "image_size", f"belongs to imagefolder; the images of {self.name} have their own size"

    @model_serializer(mode="wrap")
    def _own_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = handler(self)
        return settings if is_own(self.name) else {k: v for k, v in settings.items() if k != "options"}


TorchvisionName = Annotated[str, Field(pattern="^torchvision/[a-z0-9_]+$", examples=["torchvision/resnet50"])]


class ModelConfig(Section):
    """A model by name: mlp, convnet, transformer, resnet18 (CIFAR form), torchvision/<name>, or your own function's."""

    name: Literal["mlp", "convnet", "transformer", "resnet18"] | TorchvisionName | OwnName
    options: Options = Field(default_factory=dict)
    width: Count = Field(128, description="mlp: units of a hidden layer")
    depth: Count = Field(6, description="mlp: linear layers before the last one")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _unused_options(self.name, self.options)
        if self.name != "mlp":
            for key in sorted({"width", "depth"} & self.model_fields_set):
                yield key, f"belongs to mlp, not to {self.name}; leave it out"

    @model_serializer(mode="wrap")
    def _own_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = handler(self)
        own = ("options",) if is_own(self.name) else ("width", "depth") if self.name == "mlp" else ()
        return {key: settings[key] for key in ("name", *own)}


def _unused_options(name: str, options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if options and not is_own(name):
        yield "options", f"belong to a function of your own, {OWN}, not to {name}; leave them out"
    yield from told_secrets(options)


# the rest


class DivergenceConfig(Section):
    """What is done when a loss or a gradient is inf or NaN in many steps in a row. Each such step is skipped anyway."""

    after: Count = Field(20, description="steps in a row; looked at every so many steps")
    action: Literal["stop", "roll_back"] = Field(
        "stop", description="stop: end with a diagnosis; roll_back: to the newest checkpoint before, with a lower rate"
    )
    lr_factor: float = Field(0.5, gt=0, lt=1, description="roll_back: what the rate is multiplied by, each time")
    at_most: Count = Field(3, description="roll_back: times; then stop")


class TrainingConfig(Section):
    """How long, in what batches, in what precision, from what seed."""

    epochs: Count
    batch_size: Count = Field(128, description="GLOBAL batch: split over the data ranks")
    micro_batches: Count = Field(
        1, description="gradient accumulation: parts of a data rank's share that are evaluated one after the other"
    )
    precision: Literal["float32", "float64", "bf16", "fp16"] = Field(
        "float32", description="bf16: autocast; fp16: autocast and a GradScaler"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="initial weights, order of examples, augmentation, noise, dropout, splits"
    )
    channels_last: bool = False
    on_divergence: DivergenceConfig = DivergenceConfig()


class WorkerRange(Section):
    """As many workers as the cluster has place for: nodes may come and go."""

    min: Count
    max: Count

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.max < self.min:
            yield "max", f"must be at least min = {self.min}, not {self.max}"


def _workers(value: Any, _: Any) -> int | WorkerRange:
    """In place of pydantic's union, which would say what is wrong with each alternative."""
    if isinstance(value, dict | WorkerRange):
        return WorkerRange.model_validate(value)
    if type(value) is int and value >= 1:
        return value
    found = refusal([("", f"must be an integer >= 1, or a range such as {{min: 1, max: 4}}, not {shown(value)}")])
    assert found
    raise found


Workers = Annotated[Count | WorkerRange, WrapValidator(_workers)]


class ScalingConfig(Section):
    """Ray Train workers."""

    num_workers: Workers = Field(1, description="a number, or {min: 1, max: 4}: as many as the cluster has place for")
    use_gpu: Literal["auto"] | bool = Field("auto", description="auto: if the cluster has a GPU for each worker")
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: float = Field(1.0, gt=0, le=1, description="below 1, trials of one worker share a GPU")

    @property
    def sizes(self) -> range:
        """The numbers of workers that the run may have."""
        workers = self.num_workers
        return range(workers, workers + 1) if isinstance(workers, int) else range(workers.min, workers.max + 1)

    @property
    def most_workers(self) -> int:
        """The number of workers, or the largest."""
        return self.sizes[-1]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.gpus_per_worker < 1 and self.most_workers > 1:
            told = f"must be 1 with num_workers = {self.most_workers}: workers of one run cannot share a GPU (NCCL)"
            yield "gpus_per_worker", told


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="null: MLFLOW_TRACKING_URI, else the store in the runs folder")
    experiment: str = Field("phisam", min_length=1)
    tags: Annotated[dict[str, str], AfterValidator(without_secrets)] = Field(default_factory=dict)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.uri is not None and re.search("//[^/]*@", self.uri):
            yield "uri", "must not carry a password or user, since descriptions are logged: set MLFLOW_TRACKING_URI"


class CheckpointConfig(Section):
    """What is kept to resume from."""

    storage: AbsolutePath | None = Field(None, strict=False, description="null: the runs folder")
    every_epochs: Count = 1
    every_steps: Count | None = Field(None, description="null: at ends of epochs alone, unless every_minutes is set")
    every_minutes: Positive | None = Field(None, description="since the last one, of whatever kind")
    keep: Count = Field(2, description="the newest, and beside them as many at ends of epochs")
    grace_seconds: Positive = Field(20.0, description="within which SIGTERM to phisam saves the run and ends it")


class RunConfig(Section):
    """A complete run."""

    name: str = Field(
        pattern=NAME_PATTERN,
        max_length=100,
        examples=["mnist5k-frob, of letters, digits, '.', '_', '-' and '/', at most 100"],
    )
    description: Annotated[str, AfterValidator(redacted)] = ""
    data: Annotated[DataConfig, ByName()]
    model: Annotated[ModelConfig, ByName()]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ConstantSchedule(name="constant")
    training: TrainingConfig
    sharpness: SharpnessConfig | None = Field(None, description="null: not measured in training")
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(dotted key, what it must be) for what does not fit between sections."""
        if self.data.root is None and self.data.name not in ("digits", "mnist5k") and not is_own(self.data.name):
            yield (
                "data.root",
                f"missing; {self.data.name} is read from a folder, or downloaded to it with download: true",
            )
        sample_ranks = self.optimizer.sample_parallel
        undivided = [] if sample_ranks == "auto" else [W for W in self.scaling.sizes if W % sample_ranks]
        if undivided:
            yield (
                "optimizer.sample_parallel",
                f"must divide scaling.num_workers = {undivided[0]} (workers = data ranks x sample ranks), "
                f"not {sample_ranks}. Or set it to auto",
            )
        schedules = {
            "schedule": self.schedule,
            "optimizer.rho_schedule": self.optimizer.rho_schedule,
            "optimizer.lam_schedule": self.optimizer.lam_schedule,
        }
        epochs = self.training.epochs
        for key, schedule in schedules.items():
            if schedule is not None and schedule.warmup_epochs >= epochs:
                warmup = schedule.warmup_epochs
                yield f"{key}.warmup_epochs", f"must be less than training.epochs = {epochs}, not {warmup}"
        if self.sharpness is not None and "spectral_density" in self.sharpness.measures:
            yield (
                "sharpness.measures",
                "spectral_density is no number to log in an epoch; after the run: "
                "phisam sharpness RUN_ID --measures spectral_density",
            )
        if self.sharpness is not None and "measure" in self.sharpness.measures and self.optimizer.measure.name == "sgd":
            yield "sharpness.measures", "measure is S(x) of the run's own measure, and sgd has none; leave it out"

    def flat(self) -> dict[str, str | float | int | bool]:
        """Every setting under its dotted key, as MLflow's parameters want it; null is left out."""
        flat: dict[str, str | float | int | bool] = {}

        def walk(value: Any, key: str) -> None:
            if isinstance(value, dict):
                for name, part in value.items():
                    walk(part, f"{key}.{name}" if key else name)
            elif value is not None:
                flat[key] = str(value) if isinstance(value, list) else value

        walk(self.model_dump(mode="json"), "")
        return flat


def load(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file or a recipe describes, with `key.path=value` overrides.

    Raises:
        ConfigError: names file, line, key, value, what is allowed and the nearest known key, for all mistakes at once.
    """
    described = read(source)
    for override in overrides:
        described = read_override(described, override)
    return validated(RunConfig, described)


def read(source: str) -> Source:
    """A YAML file or a recipe as it is written, not checked yet.

    Raises:
        ConfigError: it is neither, or cannot be read.
    """
    if source in recipe_names():
        return read_yaml(recipe_text(source), f"recipe {source}")
    found = read_file(source)
    if found is None:
        raise ConfigError(f"{source!r} is neither a recipe nor a file in {os.getcwd()}.{_recipes_near(source)}")
    return found


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run with `key.path=value` overrides.

    Raises:
        ConfigError: as `load`.
    """
    described = read_yaml(dump_yaml(config), config.name)
    for override in overrides:
        described = read_override(described, override)
    return validated(RunConfig, described)


def from_dict(settings: dict[str, Any]) -> RunConfig:
    """What `RunConfig.model_dump(mode="json")` gave, on another machine or day."""
    return RunConfig.model_validate_json(json.dumps(settings))


def dump_yaml(config: RunConfig) -> str:
    """YAML with every setting resolved, in the order of the classes above; `load` reads it back to an equal object."""
    return write_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run description, for editors."""
    return RunConfig.model_json_schema()


def recipe_names() -> list[str]:
    """Complete runs that come with the package; those of a family are called `family/name`."""
    return sorted(_recipes())


def recipe_text(name: str) -> str:
    """A recipe's YAML, with its comments.

    Raises:
        ConfigError: there is no such recipe; names the nearest.
    """
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"there is no recipe {name!r}.{_recipes_near(name)}")
    return recipes[name]()


def _recipes_near(source: str) -> str:
    word = source.removesuffix(".yaml").removesuffix(".yml")
    near = nearest(word, recipe_names()) or nearest(os.path.basename(word), recipe_names())
    families = [name.partition("/") for name in recipe_names()]  # a family is told by its name alone
    told = dict.fromkeys(f"{first}/..." if slash else first for first, slash, _ in families)
    return f"{near} Recipes: {', '.join(told)}"


def _recipes() -> dict[str, Callable[[], str]]:
    """Name -> what gives its text: a file of the package, or the table of `paper.py`."""
    files = [file for file in (resources.files("ray_jobs") / "recipes").iterdir() if file.name.endswith(".yaml")]
    own = {file.name.removesuffix(".yaml"): partial(file.read_text, encoding="utf-8") for file in files}
    return own | paper.recipes()
