"""The training loop that runs on every Ray Train worker; one worker or many, it is the same.

Read `train_loop` top to bottom: data, model, optimizer, then epochs of steps, an evaluation, a checkpoint, a report.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import phisam
from ray_jobs import checkpoint
from ray_jobs.config import OptimizerConfig, RunConfig, ScheduleConfig, from_dict
from ray_jobs.data import Batches, Normalize, Split, evaluation_batches, load_dataset
from ray_jobs.models import make_model

EVALUATION_BATCH = 512
PROGRESS_SECONDS = 0.5


def train_loop(settings: dict[str, Any]) -> None:
    """Trains one run. settings: "config" (a RunConfig as JSON values), "board" (a handle that takes progress)."""
    config = from_dict(settings["config"])
    training, seed = config.training, config.training.seed
    device = ray.train.torch.get_device()
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    torch.backends.cudnn.deterministic = True  # a resumed run must end with the weights of an undisturbed one
    torch.backends.cudnn.allow_tf32 = False  # delta divides differences of losses by rho^2: float32 must be float32

    dataset = load_dataset(config.data, seed).to(device)
    normalize = _with_memory_format(dataset.normalizer(dtype), training.channels_last)
    batches = Batches(dataset.train, training.batch_size, seed, normalize, config.data.augment)

    model = make_model(config.model, dataset.input_shape, dataset.num_classes, seed).to(device, dtype)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    optimizer = make_optimizer(config, ddp)
    mesh = optimizer.mesh

    history, best, first_epoch = _resume(model, optimizer)
    if dist.get_rank() == 0:
        logging.getLogger("phisam").addHandler(ToBoard(settings["board"]))
    progress = Progress(settings["board"], config, batches.steps_per_epoch)
    autocast = _autocast(config, device)

    for epoch in range(first_epoch, training.epochs):
        model.train()
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # sum of L_0, sum of R_rho, steps with both finite
        started = time.perf_counter()
        for step, (images, labels) in enumerate(batches.epoch(epoch, mesh.data_rank, mesh.data_size)):
            factor = learning_rate_factor(config.schedule, epoch, step, batches.steps_per_epoch, training.epochs)
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.base.lr * factor

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                with autocast():
                    logits = ddp(images)
                return cross_entropy(logits.to(dtype), labels)

            optimizer.step(closure)
            last = optimizer.last_step
            numbers = torch.stack([last.losses[0], last.sharpness])
            finite = torch.isfinite(numbers).all()
            totals += torch.cat([numbers.where(finite, 0), finite.double()[None]])
            progress.tell(epoch, step, totals)
        dist.all_reduce(totals)  # with scope = "shard" each data rank has losses of its own
        loss_sum, sharpness_sum, steps = totals.tolist()
        seconds = time.perf_counter() - started  # the device is done now

        optimizer.sync_buffers()
        validation_loss, validation_accuracy = evaluate(model, dataset.validation, normalize, autocast)
        test_loss, test_accuracy = evaluate(model, dataset.test, normalize, autocast)
        metrics = {
            "epoch": epoch + 1,
            "accuracy/validation": validation_accuracy,
            "accuracy/test": test_accuracy,
            "loss/train": loss_sum / steps if steps else math.nan,
            "loss/validation": validation_loss,
            "loss/test": test_loss,
            "sharpness": sharpness_sum / steps if steps else math.nan,
            **_settings(optimizer),
            **_cost(optimizer, training.batch_size, batches.steps_per_epoch, epoch, seconds),
            "timestamp_ms": round(time.time() * 1000),
        }
        history.append(metrics)
        if best is None or (validation_accuracy, -validation_loss) > (best["accuracy"], -best["loss"]):
            weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch + 1, "accuracy": validation_accuracy, "loss": validation_loss, "model": weights}

        due = (epoch + 1) % config.checkpoint.every_epochs == 0 or epoch + 1 == training.epochs
        with _saved(due, model, optimizer, best, history) as saved:
            ray.train.report(metrics, checkpoint=saved)


def evaluate(
    model: nn.Module, split: Split, normalize: Normalize, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a split, its examples shared over all ranks. Collective."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    with torch.no_grad():
        for images, labels in evaluation_batches(
            split, EVALUATION_BATCH, dist.get_rank(), dist.get_world_size(), normalize
        ):
            with autocast():
                logits = model(images)
            sums[0] += cross_entropy(logits.double(), labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
    dist.all_reduce(sums)
    loss, correct = (sums / len(split)).tolist()
    return loss, correct


def make_optimizer(config: RunConfig, model: DistributedDataParallel) -> phisam.PhiSAM:
    """PhiSAM over the mesh that a description asks for. Collective."""
    settings = config.optimizer
    measure = make_measure(settings)
    mesh = phisam.sample_mesh(measure.n_points(settings.n_samples), settings.sample_parallel)
    on_cuda = next(model.parameters()).device.type == "cuda"
    return phisam.PhiSAM(
        model,
        make_base_optimizer(settings, model.module, fused=on_cuda),
        measure,
        rho=settings.rho,
        lam=settings.lam,
        n_samples=settings.n_samples,
        seed=config.training.seed,
        mesh=mesh,
        scope=settings.scope,
    )


def make_measure(config: OptimizerConfig) -> phisam.Measure:
    """The (phi, psi, mu) that a description names."""
    settings = config.measure.model_dump(exclude={"name"})
    measure: phisam.Measure = getattr(phisam, config.measure.name)(**settings)
    if config.noise is None:
        return measure
    noise = config.noise
    return measure.with_noise(getattr(phisam, noise.name)(**noise.model_dump(exclude={"name"})))


def make_base_optimizer(config: OptimizerConfig, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The base optimizer that a description names; the fused ones never make the host wait for the device."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings = config.base.model_dump(exclude={"name"})
    optimizer: torch.optim.Optimizer = kinds[config.base.name](model.parameters(), **settings, fused=fused)
    return optimizer


def learning_rate_factor(schedule: ScheduleConfig, epoch: int, step: int, steps_per_epoch: int, epochs: int) -> float:
    """What lr is multiplied by: a function of the position alone, so that a resumed run has no state to restore."""
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    position = epoch * steps_per_epoch + step
    if position < warmup_steps:
        return (position + 1) / warmup_steps
    match schedule.name:
        case "constant":
            return 1.0
        case "cosine":
            done = (position - warmup_steps) / max(1, epochs * steps_per_epoch - warmup_steps)
            return schedule.min_factor + (1 - schedule.min_factor) * 0.5 * (1 + math.cos(math.pi * done))
        case "step":
            return float(schedule.gamma ** (epoch // schedule.every))
        case "multistep":
            return float(schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones))


def _settings(optimizer: phisam.PhiSAM) -> checkpoint.Metrics:
    """What acts at the end of an epoch; schedules may have moved it."""
    perturbed = optimizer.gradient_evaluations_per_step > 1
    return {
        "lr": optimizer.param_groups[0]["lr"],
        "rho": optimizer.rho,
        "lam": optimizer.lam,
        "strength": optimizer.lam * optimizer.rho**2 if perturbed else 0.0,
    }


def _cost(
    optimizer: phisam.PhiSAM, batch_size: int, steps_per_epoch: int, epoch: int, seconds: float
) -> checkpoint.Metrics:
    """Gradient evaluations and skipped steps since the run began; times of this epoch, evaluation left out."""
    return {
        "gradient_evaluations": (epoch + 1) * steps_per_epoch * optimizer.gradient_evaluations_per_step,
        "skipped_steps": optimizer.skipped_steps,
        "seconds_per_step": seconds / steps_per_epoch,
        "examples_per_second": batch_size * steps_per_epoch / seconds,
    }


class Board(Protocol):
    """A Ray actor handle that takes progress; see `progress.py`."""

    tell: Any
    tell_event: Any


class ToBoard(logging.Handler):
    """Brings the optimizer's warnings, of skipped steps or a negative w_0, to the person at the terminal."""

    def __init__(self, board: Board) -> None:
        super().__init__(logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        self._board.tell_event.remote(f"warning: {record.getMessage()}")


class Progress:
    """Rank 0's word on where it is, at most every PROGRESS_SECONDS: only then is the device read."""

    def __init__(self, board: Board, config: RunConfig, steps_per_epoch: int) -> None:
        self._board = board if dist.get_rank() == 0 else None
        self._batch_size, self._steps_per_epoch = config.training.batch_size, steps_per_epoch
        self._steps = 0
        self._told = time.perf_counter()

    def tell(self, epoch: int, step: int, totals: Tensor) -> None:
        """After each step."""
        self._steps += 1
        elapsed = time.perf_counter() - self._told
        if self._board is None or elapsed < PROGRESS_SECONDS:
            return
        loss = float(totals[0] / totals[2])
        rate = self._batch_size * self._steps / elapsed
        self._board.tell.remote(epoch=epoch, step=step + 1, steps=self._steps_per_epoch, loss=loss, rate=rate)
        self._told, self._steps = time.perf_counter(), 0


def _resume(model: nn.Module, optimizer: phisam.PhiSAM) -> tuple[list[checkpoint.Metrics], dict[str, Any] | None, int]:
    """History, best model and first epoch: of the newest checkpoint, or of a fresh start."""
    newest = ray.train.get_checkpoint()
    if newest is None:
        return [], None, 0
    with newest.as_directory() as folder:
        state, history = checkpoint.load(Path(folder)), checkpoint.load_history(Path(folder))
    checkpoint.load_model(model, state["model"], newest.path)
    optimizer.load_state_dict(state["optimizer"])
    return history, state["best"], state["epoch"]


@contextmanager
def _saved(
    due: bool,
    model: nn.Module,
    optimizer: phisam.PhiSAM,
    best: dict[str, Any] | None,
    history: list[checkpoint.Metrics],
) -> Iterator[ray.train.Checkpoint | None]:
    """Rank 0's checkpoint in a folder that lives until Ray Train has copied it; None on other ranks or if not due."""
    if not due or dist.get_rank() != 0:
        yield None
        return
    state = {
        "epoch": len(history),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), state, history)
        yield ray.train.Checkpoint.from_directory(folder)


def _autocast(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if config.training.precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def _with_memory_format(normalize: Normalize, channels_last: bool) -> Normalize:
    if not channels_last:
        return normalize
    return lambda images: normalize(images).contiguous(memory_format=torch.channels_last)
