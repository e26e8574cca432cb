"""One run, described: a YAML file or a recipe's name -> a frozen, strictly validated object, and back.

    config = load("mnist5k-frob", ["optimizer.rho=0.05", "training.epochs=3"])

Unknown keys are refused. Relative paths (data.root, checkpoint.storage) are taken from the current directory and made
absolute, since workers run elsewhere. `yaml_source.py` turns what pydantic finds into errors with file and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ray_jobs.errors import ConfigError
from ray_jobs.yaml_source import Source, nearest, read_override, read_yaml, validated


def _absolute(path: Any) -> Any:
    return os.path.abspath(os.path.expanduser(path)) if isinstance(path, str) else path


def _by_name(value: Any) -> Any:
    """`measure: trace` is short for `measure: {name: trace}`."""
    return {"name": value} if isinstance(value, str) else value


AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Frozen; unknown keys are refused; no number is made from a string."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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

    @model_validator(mode="after")
    def _image_size_belongs_to_folders(self) -> DataConfig:
        if (self.name == "imagefolder") != (self.image_size is not None):
            raise ValueError(
                "imagefolder needs image_size, for example 64"
                if self.name == "imagefolder"
                else f"image_size is for imagefolder alone; the images of {self.name} have their own size"
            )
        return self


class ModelConfig(Section):
    """A model by name: mlp, convnet, resnet18 (CIFAR form), or torchvision/<name>."""

    name: str = Field(description="mlp, convnet, resnet18, or torchvision/<any classification model>")
    width: Count = Field(128, description="mlp: units of a hidden layer")
    depth: Count = Field(6, description="mlp: linear layers before the last one")

    @model_validator(mode="after")
    def _known(self) -> ModelConfig:
        known = ["mlp", "convnet", "resnet18"]
        if self.name not in known and not self.name.startswith("torchvision/"):
            raise ValueError(
                f"unknown model {self.name!r}{nearest(self.name, known)}; "
                f"allowed: {', '.join(known)}, torchvision/<name>"
            )
        extra = {"width", "depth"} & self.model_fields_set
        if extra and self.name != "mlp" and (self.width, self.depth) != (128, 6):
            raise ValueError(f"{' and '.join(sorted(extra))} belong to model mlp, not to {self.name}")
        return self


# optimizer


class SGDConfig(Section):
    """torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    momentum: NonNegative = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0


class AdamConfig(Section):
    """torch.optim.Adam, or AdamW with decoupled weight decay."""

    name: Literal["adam", "adamw"]
    lr: Positive = 1e-3
    betas: tuple[NonNegative, NonNegative] = Field((0.9, 0.999), strict=False)
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


Base = Annotated[SGDConfig | AdamConfig, Field(discriminator="name"), BeforeValidator(_by_name)]
MeasureConfig = Annotated[
    PlainMeasure | FrobeniusMeasure | ExpProductMeasure | EigenPowerMeasure,
    Field(discriminator="name"),
    BeforeValidator(_by_name),
]
NoiseConfig = Annotated[PlainNoise | HypercubeNoise, Field(discriminator="name"), BeforeValidator(_by_name)]


class OptimizerConfig(Section):
    """(phi, psi, mu) around a base optimizer. The strength of the sharpness term is s = lam rho^2."""

    base: Base = SGDConfig()
    measure: MeasureConfig
    noise: NoiseConfig | None = Field(None, description="mu in place of the measure's own")
    rho: Positive = Field(0.01, description="perturbation radius")
    lam: Finite = Field(1.0, description="factor on the sharpness term; 1 is the paper, 0 the base optimizer")
    n_samples: Count = Field(2, description="draws of mu a step; a step costs n + 1 gradient evaluations")
    sample_parallel: Literal["auto"] | Count = Field("auto", description="S: ranks that share the points of a step")
    scope: Literal["global", "shard"] = Field("global", description="losses: mean over the data ranks, or each its own")

    @property
    def strength(self) -> float:
        """s = lam rho^2, the factor on S."""
        return self.lam * self.rho**2

    @model_validator(mode="after")
    def _enough_samples(self) -> OptimizerConfig:
        if isinstance(self.measure, FrobeniusMeasure) and self.measure.unbiased and self.n_samples < 2:
            raise ValueError(
                "frobenius with unbiased: true (Algorithm 3) divides by n_samples - 1: "
                f"n_samples is {self.n_samples}, use 2 or more, or unbiased: false"
            )
        return self


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
    milestones: tuple[Count, ...] = Field(strict=False)
    gamma: Positive


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | StepSchedule | MultistepSchedule,
    Field(discriminator="name"),
    BeforeValidator(_by_name),
]


# the rest


class TrainingConfig(Section):
    """How long, in what batches, in what precision, from what seed."""

    epochs: Count
    batch_size: Count = Field(128, description="GLOBAL batch: split over the data ranks")
    precision: Literal["float32", "float64", "bf16"] = Field("float32", description="bf16: autocast")
    seed: int = Field(0, description="initial weights, order of examples, augmentation, noise, dropout, splits")
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
    tags: dict[str, str] = {}


class CheckpointConfig(Section):
    """What is kept to resume from."""

    storage: AbsolutePath | None = Field(None, strict=False, description="null: the runs folder")
    every_epochs: Count = 1
    keep: Count = 2


class RunConfig(Section):
    """A complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=100)
    description: str = ""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ConstantSchedule(name="constant")
    training: TrainingConfig
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


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
        raise ConfigError(f"no recipe {name!r}{nearest(name, recipe_names())}; recipes: {', '.join(recipe_names())}")
    text: str = (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")
    return text


def _read(source: str) -> Source:
    if source in recipe_names():
        return read_yaml(recipe_text(source), f"recipe {source}")
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml") or path.exists():
        try:
            return read_yaml(path.read_bytes(), source)
        except OSError as error:
            raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    raise ConfigError(
        f"{source!r} is neither a recipe nor a file{nearest(source, recipe_names())}; "
        f"recipes: {', '.join(recipe_names())}"
    )


def _recipes() -> Any:
    return resources.files("ray_jobs") / "recipes"
