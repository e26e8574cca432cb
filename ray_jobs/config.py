"""One run, described: a YAML file or a recipe's name -> a frozen, strictly validated object, and back.

    config = load("mnist5k-frob", ["optimizer.rho=0.05", "training.epochs=3"])

Unknown keys are refused. Relative paths (data.root, checkpoint.storage) are taken from the current directory and made
absolute, since workers run elsewhere. `yaml_source.py` reads, `explain.py` turns what pydantic finds into errors with
file and line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ray_jobs.errors import ConfigError
from ray_jobs.explain import nearest, validated
from ray_jobs.section import AbsolutePath, ByName, Count, Finite, Fraction, NonNegative, Positive, Section
from ray_jobs.yaml_source import MAX_BYTES, Source, read_override, read_yaml, write_yaml

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


# optimizer


class SGDConfig(Section):
    """torch.optim.SGD."""

    name: Literal["sgd"]
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.nesterov and self.momentum == 0:
            yield "nesterov", "must be false where momentum is 0"


class AdamConfig(Section):
    """torch.optim.Adam, or AdamW with decoupled weight decay."""

    name: Literal["adam", "adamw"]
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), strict=False)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0


class PlainMeasure(Section):
    """A measure without settings of its own."""

    name: Literal["trace", "determinant", "log_determinant", "sgd"]


class FrobeniusMeasure(Section):
    """Frob-SAM: Algorithm 3 if unbiased, else equation (105)."""

    name: Literal["frobenius"]
    unbiased: bool = True


class ExpProductMeasure(Section):
    """prod_i (1 - sigma lambda_i)."""

    name: Literal["exp_product"]
    sigma: Finite

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.sigma == 0:
            yield "sigma", "must be a number other than 0, not 0"


class EigenPowerMeasure(Section):
    """psi(t) = t^k."""

    name: Literal["eigen_power"]
    k: Count


class PlainNoise(Section):
    """mu without settings of its own."""

    name: Literal["gaussian", "sphere", "rademacher"]


class HypercubeNoise(Section):
    """mu = Uniform([-half_width, half_width]^d)."""

    name: Literal["hypercube"]
    half_width: Positive = 0.01


Base = Annotated[SGDConfig | AdamConfig, Field(discriminator="name"), ByName()]
MeasureConfig = Annotated[
    PlainMeasure | FrobeniusMeasure | ExpProductMeasure | EigenPowerMeasure,
    Field(discriminator="name"),
    ByName(),
]
NoiseConfig = Annotated[PlainNoise | HypercubeNoise, Field(discriminator="name"), ByName()]


class OptimizerConfig(Section):
    """(phi, psi, mu) around a base optimizer. The strength of the sharpness term is s = lam rho^2."""

    base: Base = SGDConfig(name="sgd")
    measure: MeasureConfig
    noise: NoiseConfig | None = Field(None, description="mu in place of the measure's own")
    rho: Positive = Field(0.01, description="perturbation radius")
    lam: Finite = Field(1.0, description="factor on the sharpness term; 1 is the paper, 0 the base optimizer")
    n_samples: Count = Field(2, description="draws of mu a step; a step costs n + 1 gradient evaluations")
    sample_parallel: Literal["auto"] | Count = Field("auto", description="S: ranks that share the points of a step")
    scope: Literal["global", "shard"] = Field("global", description="losses: mean over the data ranks, or each its own")

    @property
    def strength(self) -> float:
        """s = lam rho^2, the factor on S; 0 for measure sgd, where neither acts."""
        return 0.0 if self.measure.name == "sgd" else self.lam * self.rho**2

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.measure, FrobeniusMeasure) and self.measure.unbiased and self.n_samples < 2:
            yield (
                "n_samples",
                f"must be 2 or more for frobenius, not {self.n_samples}: its unbiased estimate (Algorithm 3) "
                "divides by n_samples - 1. Or set optimizer.measure.unbiased to false",
            )
        if not 1e-100 < self.rho < 1e100:
            yield "rho", f"must be between 1e-100 and 1e100, not {self.rho:g}: delta divides by its square"


# schedule


class Schedule(Section):
    """Learning-rate schedules start with warmup_epochs of linear warm-up."""

    warmup_epochs: int = Field(0, ge=0)


class ConstantSchedule(Schedule):
    """lr."""

    name: Literal["constant"]


class CosineSchedule(Schedule):
    """Half a cosine from lr to min_factor lr over the run, step by step."""

    name: Literal["cosine"]
    min_factor: float = Field(0.0, ge=0, le=1)


class StepSchedule(Schedule):
    """lr gamma^(epoch // every)."""

    name: Literal["step"]
    every: Count
    gamma: Positive


class MultistepSchedule(Schedule):
    """lr gamma^(number of milestones that are over); milestones in epochs, counted from 0."""

    name: Literal["multistep"]
    milestones: tuple[Count, ...] = Field(strict=False, min_length=1)
    gamma: Positive

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if list(self.milestones) != sorted(set(self.milestones)):
            yield "milestones", f"must grow from one to the next, not {list(self.milestones)}"


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | StepSchedule | MultistepSchedule,
    Field(discriminator="name"),
    ByName(),
]


# the rest


class TrainingConfig(Section):
    """How long, in what batches, in what precision, from what seed."""

    epochs: Count
    batch_size: Count = Field(128, description="GLOBAL batch: split over the data ranks")
    precision: Literal["float32", "float64", "bf16"] = Field("float32", description="bf16: autocast")
    seed: int = Field(
        0, ge=0, lt=2**63, description="initial weights, order of examples, augmentation, noise, dropout, splits"
    )
    channels_last: bool = False


class ScalingConfig(Section):
    """Ray Train workers."""

    num_workers: Count = 1
    use_gpu: Literal["auto"] | bool = Field("auto", description="auto: if the cluster has a GPU for each worker")
    cpus_per_worker: Positive = 1.0


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
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        examples=["mnist5k-frob, of letters, digits, '.', '_' and '-', at most 100"],
    )
    description: str = ""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ConstantSchedule(name="constant")
    training: TrainingConfig
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.data.root is None and self.data.name not in ("digits", "mnist5k"):
            yield (
                "data.root",
                f"missing; {self.data.name} is read from a folder, or downloaded to it with download: true",
            )
        workers, sample_ranks = self.scaling.num_workers, self.optimizer.sample_parallel
        warmup, epochs = self.schedule.warmup_epochs, self.training.epochs
        if sample_ranks != "auto" and workers % sample_ranks:
            yield (
                "optimizer.sample_parallel",
                f"must divide scaling.num_workers = {workers} (workers = data ranks x sample ranks), "
                f"not {sample_ranks}. Or set it to auto",
            )
        if warmup >= epochs:
            yield "schedule.warmup_epochs", f"must be less than training.epochs = {epochs}, not {warmup}"

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
    read = _read(source)
    for override in overrides:
        read = read_override(read, override)
    return validated(RunConfig, read)


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
    """Complete runs that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _recipes().iterdir() if path.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A recipe's YAML, with its comments.

    Raises:
        ConfigError: there is no such recipe; names the nearest.
    """
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}.{_recipes_near(name)}")
    text: str = (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")
    return text


def _read(source: str) -> Source:
    if source in recipe_names():
        return read_yaml(recipe_text(source), f"recipe {source}")
    path = os.path.expanduser(source)
    try:
        with open(path, "rb") as file:
            return read_yaml(file.read(MAX_BYTES + 1), source)
    except FileNotFoundError:
        raise ConfigError(
            f"{source!r} is neither a recipe nor a file in {os.getcwd()}.{_recipes_near(source)}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _recipes_near(source: str) -> str:
    word = os.path.basename(source).removesuffix(".yaml").removesuffix(".yml")
    return f"{nearest(word, recipe_names())} Recipes: {', '.join(recipe_names())}"


def _recipes() -> Any:
    return resources.files("ray_jobs") / "recipes"
