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
from ray_jobs.section import is_own

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


def evaluations_per_step(optimizer: OptimizerConfig, n_samples: int | None = None) -> float:
    """n + 1, or 1 + n / k with every = k; a symmetric pair counts twice; the mean over steps.

    n_samples: in place of the description's.
    """
    measure, noise = optimizer.measure.name, optimizer.noise
    if measure == "sgd":
        return 1.0
    n = optimizer.n_samples if n_samples is None else n_samples
    points = 1 if measure in ALONG_THE_GRADIENT else n
    perturbed = 2 * points if noise is not None and noise.symmetric else points
    if is_own(measure):  # it may have several noises, and pairs among them
        from ray_jobs.worker import make_measure

        perturbed = sum(make_measure(optimizer).evaluations(n)[1:])
    part = optimizer.perturb_fraction
    return 1 + (perturbed if part == 1 else part * (1 + perturbed)) / optimizer.every


def steps_per_epoch(config: RunConfig) -> int:
    """Whole global batches in the training split, 0 where there is not one.

    Raises:
        ConfigError: an imagefolder that cannot be counted, or a user's own data that cannot be loaded.
    """
    data = config.data
    if is_own(data.name):
        from ray_jobs.own_data import sizes  # torch, which the names below can do without

        own = sizes(data.model_dump_json(), config.training.seed)
        examples = round(data.fraction * own.train)
        if own.validation is not None:
            return examples // config.training.batch_size
    else:
        examples = round(data.fraction * _training_examples(data))
    validation = max(1, round(data.validation_fraction * examples))
    return (examples - validation) // config.training.batch_size


def evaluations(config: RunConfig, epochs: int | None = None, of: int | None = None) -> float:
    """Gradient evaluations of the first `epochs` (None: all) of a run of so many epochs (None: its own)."""
    of = config.training.epochs if of is None else of
    epochs = of if epochs is None else epochs
    optimizer = config.optimizer
    early = 0 if optimizer.n_early is None else min(epochs, of // 2)
    a_step = early * evaluations_per_step(optimizer, optimizer.n_early) if early else 0.0
    return steps_per_epoch(config) * (a_step + (epochs - early) * evaluations_per_step(optimizer))


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
            whole = (epochs * steps_per_epoch(config) if budget is None else budget) * (1 + 1e-12)
            dearest = max(evaluations(config, of=1), evaluations(config, of=2) / 2)
            paid = math.floor(whole / dearest)  # never too many; more where n_early is less than n_samples
            while evaluations(config, of=paid + 1) <= whole:
                paid += 1
            return paid
        case "seconds":
            return epochs


def last_rung(config: RunConfig, resource: Resource, budget: float | None) -> float:
    """The level of the resource that a trial passes before its last epoch, beyond which a rung would save nothing."""
    match resource:
        case "epochs":
            return config.training.epochs - 1
        case "gradient_evaluations":
            return evaluations(config, config.training.epochs - 1)
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
