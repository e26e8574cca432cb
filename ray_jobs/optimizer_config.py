"""The sections of a run description that say how parameters move: base optimizer, (phi, psi, mu), schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ray_jobs.section import ByName, Count, Finite, Fraction, NonNegative, Positive, Section

# base optimizer


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


# (phi, psi)


class PlainMeasure(Section):
    """A measure without settings of its own."""

    name: Literal["trace", "determinant", "log_determinant", "sam", "sgd"]


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


class AsamMeasure(Section):
    """ASAM: v = T^2 grad L / ‖T grad L‖ with T = |x| + eta."""

    name: Literal["asam"]
    eta: NonNegative = Field(0.01, description="what T adds to |x|")
    scaled: Literal["all", "weight"] = Field(
        "all", description="weight: T = 1 for tensors without weight in their name"
    )


class FisherMask(Section):
    """Perturbs the parameters with the largest Fisher information alone; made anew each epoch."""

    sparsity: Fraction = Field(0.5, description="part of the parameters that the mask leaves unperturbed")
    fisher_samples: Count = Field(16, description="examples of a batch that the Fisher information is estimated from")


class SsamMeasure(FisherMask):
    """SSAM-F: v = mask * grad L / ‖grad L‖."""

    name: Literal["ssam"]


# mu


class NoiseOptions(Section):
    """Options that compose with every noise."""

    name: str
    antithetic: bool = Field(False, description="draws come in pairs v, -v; n_samples counts draws")
    symmetric: bool = Field(
        False, description="delta from L(x + rho v) and L(x - rho v), free of the gradient; n_samples counts pairs"
    )
    adaptive: NonNegative | None = Field(None, description="eta: v is scaled by |x| + eta, elementwise")
    scaled: Literal["all", "weight"] = Field("all", description="adaptive: all tensors, or those named weight")
    fisher_mask: FisherMask | None = Field(None, description="perturb the most informative parameters alone")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.scaled != "all" and self.adaptive is None:
            yield "scaled", 'must be "all" without adaptive, which is what it belongs to'
        if self.antithetic and self.symmetric:
            yield (
                "antithetic",
                "must be false with symmetric: true, which evaluates both v and -v of each draw already; "
                "they would say the same thing twice",
            )


class PlainNoise(NoiseOptions):
    """mu without settings of its own."""

    name: Literal["gaussian", "sphere", "rademacher"]


class HypercubeNoise(NoiseOptions):
    """mu = Uniform([-half_width, half_width]^d)."""

    name: Literal["hypercube"]
    half_width: Positive = 0.01


# schedules


class Schedule(Section):
    """Of lr, rho or lam; begins with warmup_epochs of linear warm-up."""

    name: str
    warmup_epochs: int = Field(0, ge=0)


class ConstantSchedule(Schedule):
    """The value itself."""

    name: Literal["constant"]


class DecaySchedule(Schedule):
    """From the value to min_factor times it over the run, step by step: along half a cosine, or a line."""

    name: Literal["cosine", "linear"]
    min_factor: float = Field(0.0, ge=0, le=1)


class StepSchedule(Schedule):
    """The value times gamma^(epoch // every)."""

    name: Literal["step"]
    every: Count
    gamma: Positive


class MultistepSchedule(Schedule):
    """The value times gamma^(number of milestones that are over); milestones in epochs, counted from 0."""

    name: Literal["multistep"]
    milestones: tuple[Count, ...] = Field(strict=False, min_length=1)
    gamma: Positive

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if list(self.milestones) != sorted(set(self.milestones)):
            yield "milestones", f"must grow from one to the next, not {list(self.milestones)}"


ScheduleConfig = Annotated[
    ConstantSchedule | DecaySchedule | StepSchedule | MultistepSchedule,
    Field(discriminator="name"),
    ByName(),
]


# all of it


BaseConfig = Annotated[SGDConfig | AdamConfig, Field(discriminator="name"), ByName()]
MeasureConfig = Annotated[
    PlainMeasure | FrobeniusMeasure | ExpProductMeasure | EigenPowerMeasure | AsamMeasure | SsamMeasure,
    Field(discriminator="name"),
    ByName(),
]
NoiseConfig = Annotated[PlainNoise | HypercubeNoise, Field(discriminator="name"), ByName()]

ALONG_THE_GRADIENT = ("sam", "asam", "ssam")  # measures whose one point is not drawn


class OptimizerConfig(Section):
    """(phi, psi, mu) around a base optimizer. The strength of the sharpness term is s = lam rho^2."""

    base: BaseConfig = SGDConfig(name="sgd")
    measure: MeasureConfig
    noise: NoiseConfig | None = Field(None, description="mu in place of the measure's own")
    rho: Positive = Field(0.01, description="perturbation radius")
    rho_schedule: ScheduleConfig | None = Field(None, description="what rho is multiplied by; null: constant")
    lam: Finite = Field(1.0, description="factor on the sharpness term; 1 is the paper, 0 the base optimizer")
    lam_schedule: ScheduleConfig | None = Field(None, description="what lam is multiplied by; null: constant")
    n_samples: Count = Field(
        2,
        validate_default=True,
        description="draws of mu a step; a step costs n + 1 gradient evaluations. Always 1 for sam, asam, ssam",
    )
    every: Count = Field(1, description="k: the sharpness term in every k-th step only, there with k lam")
    perturb_fraction: float = Field(
        1.0, gt=0, le=1, description="first part of a batch that the sharpness term is evaluated on"
    )
    max_grad_norm: Positive | None = Field(None, description="clips the combined gradient; null: no clipping")
    sample_parallel: Literal["auto"] | Count = Field("auto", description="S: ranks that share the points of a step")
    scope: Literal["global", "shard"] = Field("global", description="losses: mean over the data ranks, or each its own")

    @field_validator("n_samples")
    @classmethod
    def _what_acts(cls, n_samples: int, info: ValidationInfo) -> int:
        """sam, asam and ssam have one point, whatever was asked for: files and tables shall not say otherwise."""
        measure = info.data.get("measure")  # absent if it was refused
        return 1 if measure is not None and measure.name in ALONG_THE_GRADIENT else n_samples

    @property
    def strength(self) -> float:
        """s = lam rho^2, the factor on S; 0 for measure sgd, where neither acts."""
        return 0.0 if self.measure.name == "sgd" else self.lam * self.rho**2

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key, what it must be) for what measure, noise and numbers do not allow together."""
        measure, noise = self.measure, self.noise
        if isinstance(measure, FrobeniusMeasure) and measure.unbiased and self.n_samples < 2:
            yield (
                "n_samples",
                f"must be 2 or more for frobenius, not {self.n_samples}: its unbiased estimate (Algorithm 3) "
                "divides by n_samples - 1. Or set optimizer.measure.unbiased to false",
            )
        if noise is not None and measure.name == "sgd":
            yield "noise", "must be null for sgd, which has no perturbed point: set a measure, or leave noise out"
        elif noise is not None and measure.name in ALONG_THE_GRADIENT:
            yield (
                "noise",
                f"must be null for {measure.name}: its one point lies along the gradient and is not drawn. "
                "For noise with the same phi and psi set optimizer.measure to trace",
            )
        elif noise is not None and noise.antithetic and self.n_samples % 2:
            yield (
                "n_samples",
                f"must be even with antithetic draws, which come in pairs v, -v, not {self.n_samples}; "
                f"for example {self.n_samples + 1}",
            )
        elif noise is not None and noise.antithetic and self.n_samples == 2 and isinstance(measure, FrobeniusMeasure):
            yield (
                "n_samples",
                "must be 4 or more for frobenius with antithetic draws, not 2: v and -v have the same v^T H v, so the "
                "variance over one pair knows nothing of the Hessian",
            )
        if not 1e-100 < self.rho < 1e100:
            yield "rho", f"must be between 1e-100 and 1e100, not {self.rho:g}: delta divides by its square"
        if isinstance(self.rho_schedule, DecaySchedule) and self.rho_schedule.min_factor == 0:
            yield (
                "rho_schedule.min_factor",
                "must be more than 0, for example 0.1: at its end rho would be 0, and delta divides by its square. "
                "To fade the sharpness term out, schedule lam",
            )
