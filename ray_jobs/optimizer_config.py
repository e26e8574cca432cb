"""The sections of a run description that say how parameters move: base optimizer, (phi, psi, mu), schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ray_jobs.section import (
    ByName,
    ByNameOrOwn,
    Count,
    Finite,
    Fraction,
    NonNegative,
    Options,
    OwnName,
    Positive,
    Section,
    told_secrets,
)

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


class OwnMeasure(Section):
    """A phisam.Measure that your own function makes."""

    name: OwnName
    options: Options = Field(default_factory=dict)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What looks like a secret."""
        yield from told_secrets(self.options)


# mu


class Preconditioning(Section):
    """v is scaled by the base optimizer's own diagonal, its length unchanged on average."""

    power: Positive = Field(1.0, description="1: as Adam scales its steps; 0.5: the square root of that")
    damping: Positive = Field(0.1, description="of the root mean square: bounds what has no gradient")


class NoiseOptions(Section):
    """Options that compose with every noise."""

    name: str
    antithetic: bool = Field(False, description="draws come in pairs v, -v; n_samples counts draws")
    symmetric: bool = Field(
        False, description="delta from L(x + rho v) and L(x - rho v), free of the gradient; n_samples counts pairs"
    )
    adaptive: NonNegative | None = Field(None, description="eta: v is scaled by |x| + eta, elementwise")
    scaled: Literal["all", "weight"] = Field("all", description="adaptive: all tensors, or those named weight")
    preconditioned: Preconditioning | None = Field(None, description="v is scaled by Adam's second moment")
    fisher_mask: FisherMask | None = Field(None, description="perturb the most informative parameters alone")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.scaled != "all" and self.adaptive is None:
            yield "scaled", 'must be "all" without adaptive, which is what it belongs to'
        if self.preconditioned is not None and self.adaptive is not None:
            yield "preconditioned", "must be null with adaptive: each says how far a parameter is moved"
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
    PlainMeasure
    | FrobeniusMeasure
    | ExpProductMeasure
    | EigenPowerMeasure
    | AsamMeasure
    | SsamMeasure
    | OwnMeasure,  # the last: ByNameOrOwn
    ByNameOrOwn(),
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
    n_early: Count | None = Field(
        None, description="draws a step in the first half of the epochs, where the sharpness term is coarse anyway"
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

    def n_in(self, epoch: int, epochs: int) -> int:
        """Draws a step in epoch 0, 1, ... of so many."""
        return self.n_early if self.n_early is not None and epoch < epochs // 2 else self.n_samples

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key, what it must be) for what measure, noise and numbers do not allow together."""
        measure, noise = self.measure, self.noise
        yield from self._draws_conflicts("n_samples", self.n_samples)
        if self.n_early is not None:
            if measure.name == "sgd" or measure.name in ALONG_THE_GRADIENT:
                yield "n_early", f"must be null for {measure.name}, which draws nothing"
            else:
                yield from self._draws_conflicts("n_early", self.n_early)
        if noise is not None and measure.name == "sgd":
            yield "noise", "must be null for sgd, which has no perturbed point: set a measure, or leave noise out"
        elif noise is not None and measure.name in ALONG_THE_GRADIENT:
            yield (
                "noise",
                f"must be null for {measure.name}: its one point lies along the gradient and is not drawn. "
                "For noise with the same phi and psi set optimizer.measure to trace",
            )
        elif noise is not None and noise.preconditioned is not None and self.base.name == "sgd":
            yield "noise.preconditioned", "must be null with base sgd, which has no second moment: use adam or adamw"
        if not 1e-100 < self.rho < 1e100:
            yield "rho", f"must be between 1e-100 and 1e100, not {self.rho:g}: delta divides by its square"
        if isinstance(self.rho_schedule, DecaySchedule) and self.rho_schedule.min_factor == 0:
            yield (
                "rho_schedule.min_factor",
                "must be more than 0, for example 0.1: at its end rho would be 0, and delta divides by its square. "
                "To fade the sharpness term out, schedule lam",
            )

    def _draws_conflicts(self, key: str, n: int) -> Iterator[tuple[str, str]]:
        measure, noise = self.measure, self.noise
        if isinstance(measure, FrobeniusMeasure) and measure.unbiased and n < 2:
            yield (
                key,
                f"must be 2 or more for frobenius, not {n}: its unbiased estimate (Algorithm 3) "
                "divides by n_samples - 1. Or set optimizer.measure.unbiased to false",
            )
        if noise is None or not noise.antithetic or measure.name == "sgd" or measure.name in ALONG_THE_GRADIENT:
            return
        if n % 2:
            yield key, f"must be even with antithetic draws, which come in pairs v, -v, not {n}; for example {n + 1}"
        elif n == 2 and isinstance(measure, FrobeniusMeasure):
            yield (
                key,
                "must be 4 or more for frobenius with antithetic draws, not 2: v and -v have the same v^T H v, so the "
                "variance over one pair knows nothing of the Hessian",
            )
