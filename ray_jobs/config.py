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

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ray_jobs import paper
from ray_jobs.errors import ConfigError
from ray_jobs.explain import nearest, validated
from ray_jobs.optimizer_config import ConstantSchedule, OptimizerConfig, ScheduleConfig
from ray_jobs.section import AbsolutePath, Count, Positive, Section
from ray_jobs.sharpness.config import SharpnessConfig
from ray_jobs.yaml_source import Source, read_file, read_override, read_yaml, write_yaml

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


class DataConfig(Section):
    """Which images, how many of them, and how they are changed."""

    name: Literal["digits", "mnist5k", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder"]
    root: AbsolutePath | None = Field(None, strict=False, description="folder of the data set's files")
    download: bool = Field(False, description="let torchvision download what is missing into root")
    fraction: float = Field(1.0, gt=0, le=1, description="first part of the training examples; 0.1 is Table 2's -S")
    label_noise: float = Field(0.0, ge=0, lt=1, description="part of the training labels moved to another class")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="part of the training set kept for model selection")
    augment: Literal["none", "crop_flip"] = Field("none", description="crop_flip: padding 4, random crop, mirror")
    image_size: Count | None = Field(None, description="imagefolder: height and width that images are resized to")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        folders = self.name == "imagefolder"
        if self.download and folders:
            yield "download", "must be false: imagefolder is read from your own folder, data.root"
        if self.image_size is None and folders:
            yield "image_size", "missing; imagefolder needs it, for example 64"
        if self.image_size is not None and not folders:
            yield "image_size", f"belongs to imagefolder; the images of {self.name} have their own size"


TorchvisionName = Annotated[str, Field(pattern="^torchvision/[a-z0-9_]+$", examples=["torchvision/resnet50"])]


class ModelConfig(Section):
    """A model by name: mlp, convnet, resnet18 (CIFAR form), or torchvision/<name>."""

    name: Literal["mlp", "convnet", "resnet18"] | TorchvisionName
    width: Count = Field(128, description="mlp: units of a hidden layer")
    depth: Count = Field(6, description="mlp: linear layers before the last one")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.name != "mlp":
            for key in sorted({"width", "depth"} & self.model_fields_set):
                yield key, f"belongs to mlp, not to {self.name}; leave it out"

    @model_serializer(mode="wrap")
    def _own_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = handler(self)
        return settings if self.name == "mlp" else {"name": self.name}


# the rest


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


class ScalingConfig(Section):
    """Ray Train workers."""

    num_workers: Count = 1
    use_gpu: Literal["auto"] | bool = Field("auto", description="auto: if the cluster has a GPU for each worker")
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: float = Field(1.0, gt=0, le=1, description="below 1, trials of one worker share a GPU")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            told = f"must be 1 with num_workers = {self.num_workers}: workers of one run cannot share a GPU (NCCL)"
            yield "gpus_per_worker", told


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="null: MLFLOW_TRACKING_URI, else the store in the runs folder")
    experiment: str = Field("phisam", min_length=1)
    tags: dict[str, str] = Field(default_factory=dict)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.uri is not None and re.search("//[^/@]*:[^/@]*@", self.uri):
            yield "uri", "must not carry a password, since descriptions are logged: set MLFLOW_TRACKING_URI instead"


class CheckpointConfig(Section):
    """What is kept to resume from."""

    storage: AbsolutePath | None = Field(None, strict=False, description="null: the runs folder")
    every_epochs: Count = 1
    keep: Count = 2


class RunConfig(Section):
    """A complete run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
        max_length=100,
        examples=["mnist5k-frob, of letters, digits, '.', '_', '-' and '/', at most 100"],
    )
    description: str = ""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ConstantSchedule(name="constant")
    training: TrainingConfig
    sharpness: SharpnessConfig | None = Field(None, description="null: not measured in training")
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(dotted key, what it must be) for what does not fit between sections."""
        if self.data.root is None and self.data.name not in ("digits", "mnist5k"):
            yield (
                "data.root",
                f"missing; {self.data.name} is read from a folder, or downloaded to it with download: true",
            )
        workers, sample_ranks = self.scaling.num_workers, self.optimizer.sample_parallel
        if sample_ranks != "auto" and workers % sample_ranks:
            yield (
                "optimizer.sample_parallel",
                f"must divide scaling.num_workers = {workers} (workers = data ranks x sample ranks), "
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
