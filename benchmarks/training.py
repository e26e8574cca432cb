"""A run description trained in this process, without Ray: what the comparisons of this folder are made of."""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from statistics import geometric_mean, mean, stdev
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import phisam
from ray_jobs import config, worker
from ray_jobs.data import Batches, load_dataset
from ray_jobs.models import make_model

EXAMPLES, PROBES = 1280, 100  # Appendix O's estimate of the Frobenius norm


class Run(NamedTuple):
    """A recipe with settings, for a budget of gradient evaluations, counted in epochs of the base optimizer."""

    recipe: str
    settings: tuple[str, ...]
    budget: float
    seed: int

    def described(self) -> config.RunConfig:
        """The run description; its epochs are the whole number that comes nearest to the budget."""
        epochs = max(1, round(self.budget / cost(self.recipe, self.settings)))
        return config.load(self.recipe, [*self.settings, f"training.epochs={epochs}", f"training.seed={self.seed}"])


class Result(NamedTuple):
    """The last epoch of one run. frobenius: ‖H‖_F^2 of the training loss at its end."""

    train_loss: float
    test_loss: float
    test_accuracy: float
    frobenius: float


def cost(recipe: str, settings: tuple[str, ...]) -> float:
    """Gradient evaluations of a step, the mean over steps."""
    optimizer = config.load(recipe, settings).optimizer
    model = nn.Linear(1, 1)
    return phisam.PhiSAM(
        model,
        torch.optim.SGD(model.parameters()),
        worker.make_measure(optimizer),
        n_samples=optimizer.n_samples,
        every=optimizer.every,
        perturb_fraction=optimizer.perturb_fraction,
    ).gradient_evaluations_per_step


def train_all(runs: list[Run], processes: int) -> dict[Run, Result]:
    """Every run once, in processes of one thread."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return dict(zip(runs, pool.map(train, runs), strict=True))


def train(run: Run) -> Result:
    """One run, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not dist.is_initialized():  # what worker.py's functions are written for; of one process here
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        return _train(run.described())


def _train(run: config.RunConfig) -> Result:
    seed = run.training.seed
    dataset = load_dataset(run.data, seed)
    normalize = dataset.normalizer(torch.float32)
    batches = Batches(dataset.train, run.training.batch_size, seed, normalize, run.data.augment)
    model = DistributedDataParallel(make_model(run.model, dataset.input_shape, dataset.num_classes, seed))
    optimizer = worker.make_optimizer(run, model, batches.steps_per_epoch)

    def loss_on(images: Tensor, labels: Tensor, part: phisam.Part) -> Tensor:
        return cross_entropy(model(part(images)), part(labels))

    for epoch in range(run.training.epochs):
        model.train()
        losses = []
        for step, batch in enumerate(batches.epoch(epoch)):
            worker.follow_schedules(optimizer, run, epoch, step, batches.steps_per_epoch)
            losses.append(optimizer.step(partial(loss_on, *batch)))
    test_loss, test_accuracy = worker.evaluate(model.module, dataset.test, normalize, nullcontext)
    images, labels = normalize(dataset.train.images[:EXAMPLES]), dataset.train.labels[:EXAMPLES]
    return Result(
        float(torch.stack(losses).mean()), test_loss, test_accuracy, frobenius_squared(model.module, images, labels)
    )


def frobenius_squared(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """‖H‖_F^2 = E ‖Hz‖^2, z ~ N(0, I): the paper's estimator (section 4), from one graph of the gradient."""
    model.eval()
    x = list(model.parameters())
    gradient = torch.autograd.grad(cross_entropy(model(images), labels), x, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(PROBES):
        z = [torch.randn(p.shape, generator=generator) for p in x]
        Hz = torch.autograd.grad(gradient, x, z, retain_graph=True)
        squares.append(sum(float(part.double().square().sum()) for part in Hz))
    return mean(squares)


def table(rows: dict[str, list[Result]], leading: dict[str, list[str]]) -> list[str]:
    """Markdown rows: name, leading cells, then mean ± standard deviation over seeds; geometric mean of the norms."""
    lines = []
    for name, results in rows.items():
        train_loss, test_loss, accuracy, frobenius = (list(column) for column in zip(*results, strict=True))
        cells = [spread(train_loss, ".2g"), spread(test_loss, ".3f"), spread(accuracy, ".2%")]
        norms = f"{geometric_mean(frobenius):.3g} ({min(frobenius):.2g} to {max(frobenius):.2g})"
        lines.append(f"| {' | '.join([name, *leading[name], *cells, norms])} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """mean ± standard deviation over seeds."""
    return f"{mean(values):{form}} ± {stdev(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"
