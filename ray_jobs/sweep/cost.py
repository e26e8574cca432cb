"""What a run costs in gradient evaluations, told from its description alone.

A gradient evaluation is a forward and a backward pass over one global batch. The metric `gradient_evaluations` of a run
counts the same.
"""

from __future__ import annotations

import math
from typing import Literal

from ray_jobs.config import DataConfig, RunConfig
from ray_jobs.errors import ConfigError
from ray_jobs.optimizer_config import ALONG_THE_GRADIENT, OptimizerConfig

Resource = Literal["epochs", "gradient_evaluations", "seconds"]

TRAINING_EXAMPLES = {
    "digits": 1438,  # of 1,797, without the fifth that is the test set
    "mnist5k": 4000,
    "mnist": 60000,
    "fashion_mnist": 60000,
    "cifar10": 50000,
    "cifar100": 50000,
    "svhn": 73257,
}
"""Of the data sets that are the same everywhere, before `fraction` and `validation_fraction`."""


def evaluations_per_step(optimizer: OptimizerConfig) -> float:
    """n + 1, or 1 + n / k with every = k; a symmetric pair counts twice; the mean over steps."""
    measure, noise = optimizer.measure.name, optimizer.noise
    if measure == "sgd":
        return 1.0
    points = 1 if measure in ALONG_THE_GRADIENT else optimizer.n_samples
    perturbed = 2 * points if noise is not None and noise.symmetric else points
    part = optimizer.perturb_fraction
    return 1 + (perturbed if part == 1 else part * (1 + perturbed)) / optimizer.every


def steps_per_epoch(config: RunConfig) -> int:
    """Whole global batches in the training split, 0 where there is not one.

    Raises:
        ConfigError: an imagefolder that cannot be counted.
    """
    examples = round(config.data.fraction * _training_examples(config.data))
    validation = max(1, round(config.data.validation_fraction * examples))
    return (examples - validation) // config.training.batch_size


def evaluations_per_epoch(config: RunConfig) -> float:
    """Gradient evaluations."""
    return steps_per_epoch(config) * evaluations_per_step(config.optimizer)


def epochs_within(config: RunConfig, resource: Resource, budget: float | None) -> int:
    """The whole epochs that a budget pays; without one, those of the run, paid at the base optimizer's price.

    So with `resource = gradient_evaluations` and no budget every method gets what `training.epochs` cost the base
    optimizer, one evaluation a step. Seconds are not known beforehand: all epochs of the run.
    """
    epochs = config.training.epochs
    match resource:
        case "epochs":
            return epochs if budget is None else math.floor(budget)
        case "gradient_evaluations":
            whole = epochs * steps_per_epoch(config) if budget is None else budget
            return math.floor(whole / evaluations_per_epoch(config) * (1 + 1e-12))
        case "seconds":
            return epochs


def last_rung(config: RunConfig, resource: Resource, budget: float | None) -> float:
    """The level of the resource that a trial passes before its last epoch, beyond which a rung would save nothing."""
    match resource:
        case "epochs":
            return config.training.epochs - 1
        case "gradient_evaluations":
            return (config.training.epochs - 1) * evaluations_per_epoch(config)
        case "seconds":
            return math.inf if budget is None else budget


def _training_examples(data: DataConfig) -> int:
    if data.name in TRAINING_EXAMPLES:
        return TRAINING_EXAMPLES[data.name]
    from torchvision.datasets import ImageFolder  # seconds to import, and imagefolder alone needs it

    assert data.root is not None, "config.py requires it for imagefolder"
    try:
        return len(ImageFolder(data.root / "train"))
    except OSError as error:
        raise ConfigError(f"data.root = {data.root}: the images of an imagefolder cannot be counted: {error}") from None
