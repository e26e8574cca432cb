"""The paper's seven methods side by side, at equal epochs and at equal gradient evaluations, over seeds.

    python benchmarks/methods.py
    python benchmarks/methods.py --set data.name=fashion_mnist --set data.root=FOLDER --set data.fraction=0.1

Each method is the recipe mnist5k-NAME with the settings that it ships with; none is tuned to the data. Equal
evaluations: every method trains until it has spent what the costliest one spends in --epochs epochs. Numbers are those
of the last epoch, mean ± standard deviation over seeds. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import phisam
from ray_jobs import config, worker
from ray_jobs.data import Batches, load_dataset
from ray_jobs.models import make_model

METHODS = ("sgd", "frob", "det", "trace", "sam", "asam", "ssam")


class Result(NamedTuple):
    """The last epoch of one run."""

    train_loss: float
    test_loss: float
    test_accuracy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of every method, and of the costliest one's budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run description")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()

    costs = {method: cost(method, arguments.set) for method in METHODS}
    budget = arguments.epochs * max(costs.values())
    epochs = {method: (arguments.epochs, round(budget / costs[method])) for method in METHODS}
    runs = [
        (method, n, seed) for method in METHODS for n in sorted(set(epochs[method])) for seed in range(arguments.seeds)
    ]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        results = dict(
            zip(runs, pool.map(partial(train, overrides=arguments.set), *zip(*runs, strict=True)), strict=True)
        )

    print(
        "| method | evaluations a step | epochs | cost in epochs of SGD | training loss | test loss | test accuracy |"
    )
    print("|---|---|---|---|---|---|---|")
    for title, which in (("equal epochs", 0), ("equal evaluations", 1)):
        print(f"| **{title}** | | | | | | |")
        for method in METHODS:
            n = epochs[method][which]
            columns = zip(*(results[method, n, seed] for seed in range(arguments.seeds)), strict=True)
            train_loss, test_loss, accuracy = (list(column) for column in columns)
            numbers = [spread(train_loss, ".2g"), spread(test_loss, ".3f"), spread(accuracy, ".2%")]
            print(f"| {method} | {costs[method]:g} | {n} | {n * costs[method]:g} | {' | '.join(numbers)} |")


def cost(method: str, overrides: list[str]) -> float:
    """Gradient evaluations of a step."""
    settings = config.load(f"mnist5k-{method}", overrides).optimizer
    measure = worker.make_measure(settings)
    return float(sum(measure.evaluations(settings.n_samples)))


def train(method: str, epochs: int, seed: int, overrides: list[str]) -> Result:
    """One run, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not dist.is_initialized():  # what worker.py's functions are written for; of one process here
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        return _train(
            config.load(f"mnist5k-{method}", [*overrides, f"training.epochs={epochs}", f"training.seed={seed}"])
        )


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
    return Result(float(torch.stack(losses).mean()), test_loss, test_accuracy)


def spread(values: list[float], form: str) -> str:
    """mean ± standard deviation over seeds."""
    return f"{mean(values):{form}} ± {stdev(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


if __name__ == "__main__":
    main()
