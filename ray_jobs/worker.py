"""The training loop that runs on every Ray Train worker; one worker or many, it is the same.

Read `train_loop` top to bottom: data, model, optimizer, then epochs of steps, an evaluation, a checkpoint, a report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import phisam
from phisam import schedules
from phisam.closures import Part
from ray_jobs import checkpoint, user_code
from ray_jobs.config import OptimizerConfig, RunConfig, from_dict
from ray_jobs.data import Batches, Normalize, load_dataset, micro_batches
from ray_jobs.divergence import Guard
from ray_jobs.early import early_stopped
from ray_jobs.evaluation import evaluate
from ray_jobs.models import make_model
from ray_jobs.optimizer_config import (
    ConstantSchedule,
    DecaySchedule,
    MultistepSchedule,
    NoiseConfig,
    NoiseOptions,
    OwnMeasure,
    ScheduleConfig,
    SsamMeasure,
    StepSchedule,
)
from ray_jobs.remarks import Remarks
from ray_jobs.saving import Saver, State
from ray_jobs.sharpness.training import EpochMeasures
from ray_jobs.stragglers import Pace

PROGRESS_SECONDS = 0.5


def train_loop(settings: dict[str, Any]) -> None:
    """Trains one run.

    settings: "config" (a RunConfig as JSON values), "folder" (of its checkpoints), "board" (a handle that takes
    progress), "own" (`OwnCode`) and "fingerprint" (of the driver's data); for a part of a run also "start" (the
    checkpoint to begin from) and "until" ((metric, level): end with the epoch that reaches it).
    """
    config = from_dict(settings["config"])
    if dist.get_rank() == 0:
        logging.getLogger("phisam").addHandler(ToBoard(settings["board"]))
    user_code.arrive(config, settings.get("own"))
    training, seed = config.training, config.training.seed
    device = ray.train.torch.get_device()
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    torch.backends.cudnn.deterministic = True  # a resumed run must end with the weights of an undisturbed one
    torch.backends.cudnn.allow_tf32 = False  # delta divides differences of losses by rho^2: float32 must be float32

    dataset = load_dataset(config.data, seed, settings.get("fingerprint")).to(device)
    normalize = _with_memory_format(dataset.normalizer(dtype), training.channels_last)
    batches = Batches(dataset.train, training.batch_size, seed, normalize, config.data.augment)

    model = make_model(config.model, dataset.input_shape, dataset.num_classes, seed).to(device, dtype)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    scaler = torch.amp.GradScaler(device.type) if training.precision == "fp16" else None
    optimizer = make_optimizer(config, ddp, batches.steps_per_epoch, scaler)
    mesh = optimizer.mesh
    measures = EpochMeasures(config, dataset, optimizer.measure, dtype)

    progress = Progress(settings["board"], config, batches.steps_per_epoch)
    guard = Guard(training.on_divergence, optimizer, device)
    state = State(model, optimizer, scaler, guard)
    saver = Saver(config.checkpoint, Path(settings["folder"]), state, batches.steps_per_epoch, progress)
    course = saver.begin(settings.get("start"))
    history = course.history
    autocast = _autocast(config, device)
    pace, remarks = Pace(device), Remarks(float32=dtype == torch.float32)

    def loss_on(images: Tensor, labels: Tensor, part: Part) -> Tensor:
        shown = part(images)
        with autocast(), pace.forward(len(shown)):
            logits = ddp(shown)
        return cross_entropy(logits.to(dtype), part(labels))

    while course.epoch < training.epochs and not _is_there(settings.get("until"), history):
        model.train()
        optimizer.n_samples = config.optimizer.n_in(course.epoch, training.epochs)
        epoch, averages = course.epoch, Averages(course.averaged, optimizer.measure.n_points(optimizer.n_samples))
        saver.watch.start()
        skipped = 0
        for images, labels in batches.epoch(epoch, mesh.data_rank, mesh.data_size, course.step):
            follow_schedules(optimizer, config, epoch, course.step, batches.steps_per_epoch, guard.lr_factor)
            shares = micro_batches(images, labels, training.micro_batches)
            loss = optimizer.step([partial(loss_on, *share) for share in shares])
            averages.add(loss, optimizer.last_step)
            remarks.add(course.diagnosed, optimizer.last_step)
            guard.after_step(loss)
            course.step += 1
            progress.tell(epoch, course.step, averages)
            if skipped := guard.diverged(epoch * batches.steps_per_epoch + course.step):
                break
            if saver.after_step(course):
                return
        if skipped:
            if saver.after_divergence(course, skipped):
                return
            continue
        train_loss, sharpness = averages.over_ranks()
        seconds = saver.watch.stop()  # the device is done now
        pace.end_epoch()

        optimizer.sync_buffers()
        validation = evaluate(model, dataset.validation, normalize, autocast)
        test = evaluate(model, dataset.test, normalize, autocast)
        metrics = {
            "epoch": epoch + 1,
            **validation.metrics("validation"),  # first: MLflow's compare page draws the first metric that it is told
            **test.metrics("test"),
            "loss/train": train_loss,
            "sharpness": sharpness,
            **_settings(optimizer),
            **_cost(optimizer, training.batch_size, batches.steps_per_epoch, history, seconds),
            "seconds": (history[-1]["seconds"] if history else 0.0) + seconds,  # of training alone, since the run began
            **saver.costs(),
            **remarks.after(course.diagnosed),
            **measures.after(epoch + 1, model),
            "timestamp_ms": round(time.time() * 1000),
        }
        metrics |= early_stopped([*history, metrics])
        course.end_epoch(metrics, model)
        if saver.after_epoch(course, course.epoch == training.epochs or _is_there(settings.get("until"), history)):
            return


def make_optimizer(
    config: RunConfig, model: DistributedDataParallel, steps_per_epoch: int, scaler: torch.amp.GradScaler | None = None
) -> phisam.PhiSAM:
    """PhiSAM over the mesh that a description asks for. Collective."""
    settings = config.optimizer
    measure = make_measure(settings, steps_per_epoch)
    on_cuda = next(model.parameters()).device.type == "cuda"
    return phisam.PhiSAM(
        model,
        make_base_optimizer(settings, model.module, fused=on_cuda),
        measure,
        rho=settings.rho,
        lam=settings.lam,
        n_samples=settings.n_samples,
        seed=config.training.seed,
        mesh=phisam.sample_mesh(settings.n_samples, settings.sample_parallel, measure=measure),
        scope=settings.scope,
        max_grad_norm=settings.max_grad_norm,
        every=settings.every,
        perturb_fraction=settings.perturb_fraction,
        grad_scaler=scaler,
    )


def make_measure(config: OptimizerConfig, steps_per_epoch: int = 1) -> phisam.Measure:
    """The (phi, psi, mu) that a description names; SSAM's mask is made anew every steps_per_epoch steps."""
    settings = config.measure.model_dump(exclude={"name"})
    if isinstance(config.measure, SsamMeasure):
        settings["refresh_every"] = steps_per_epoch
    measure: phisam.Measure
    if isinstance(config.measure, OwnMeasure):
        measure = user_code.own_measure(config.measure, config.n_samples)
    else:
        measure = getattr(phisam, config.measure.name)(**settings)
    return measure if config.noise is None else measure.with_noise(make_noise(config.noise, steps_per_epoch))


def make_noise(config: NoiseConfig, steps_per_epoch: int) -> phisam.Noise:
    """mu with its options."""
    settings = config.model_dump(exclude={"name", *NoiseOptions.model_fields})
    noise: phisam.Noise = getattr(phisam, config.name)(**settings)
    if config.antithetic:
        noise = noise.antithetic()
    if config.symmetric:
        noise = noise.symmetric()
    if config.adaptive is not None:
        noise = noise.adaptive(config.adaptive, config.scaled)
    if config.preconditioned is not None:
        noise = noise.preconditioned(**config.preconditioned.model_dump())
    if config.fisher_mask is not None:
        noise = noise.masked(phisam.fisher_mask(**config.fisher_mask.model_dump(), refresh_every=steps_per_epoch))
    return noise


def make_base_optimizer(config: OptimizerConfig, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The base optimizer that a description names; the fused ones never make the host wait for the device."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings = config.base.model_dump(exclude={"name"})
    optimizer: torch.optim.Optimizer = kinds[config.base.name](model.parameters(), **settings, fused=fused)
    return optimizer


def follow_schedules(
    optimizer: phisam.PhiSAM, config: RunConfig, epoch: int, step: int, steps_per_epoch: int, lr_factor: float = 1.0
) -> None:
    """Sets lr, rho and lam for a step: by its position alone, so that a resumed run has no state to restore.

    lr_factor: of a run that was rolled back.
    """
    settings = config.optimizer
    at = partial(
        scheduled, step=epoch * steps_per_epoch + step, steps_per_epoch=steps_per_epoch, epochs=config.training.epochs
    )
    for group in optimizer.param_groups:
        group["lr"] = lr_factor * at(settings.base.lr, config.schedule)
    optimizer.rho = at(settings.rho, settings.rho_schedule)
    optimizer.lam = at(settings.lam, settings.lam_schedule)


def scheduled(value: float, schedule: ScheduleConfig | None, step: int, steps_per_epoch: int, epochs: int) -> float:
    """What a schedule makes of a value in step 0, 1, ... of a run; after a warm-up, cosine and line fill the rest."""
    if schedule is None:
        return value
    warm, end = schedule.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warm:
        return schedules.warmup(value, warm)(step)
    match schedule:
        case ConstantSchedule():
            return value
        case DecaySchedule(name=name, min_factor=factor):
            decay = {"cosine": schedules.cosine, "linear": schedules.linear}[name]
            return decay(value, factor * value, end - warm)(step - warm)
        case StepSchedule(every=every, gamma=gamma):
            return float(value * gamma ** (step // steps_per_epoch // every))
        case MultistepSchedule(milestones=milestones, gamma=gamma):
            return float(value * gamma ** sum(step // steps_per_epoch >= milestone for milestone in milestones))


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
    optimizer: phisam.PhiSAM, batch_size: int, steps_per_epoch: int, history: list[checkpoint.Metrics], seconds: float
) -> checkpoint.Metrics:
    """Gradient evaluations and skipped steps since the run began; times of this epoch, evaluation left out."""
    before = history[-1]["gradient_evaluations"] if history else 0
    return {
        "gradient_evaluations": before + steps_per_epoch * optimizer.gradient_evaluations_per_step,
        "skipped_steps": optimizer.skipped_steps,
        "seconds_per_step": seconds / steps_per_epoch,
        "examples_per_second": batch_size * steps_per_epoch / seconds,
    }


class Averages:
    """Means over the steps of an epoch of what `step` returned and of R_rho; inf and NaN are left out.

    With `every` > 1 most steps have no sharpness term, and so no part in the mean of R_rho.
    """

    def __init__(self, sums: Tensor, n_points: int) -> None:
        """sums: (sum, steps) x (loss, R_rho), (2, 2) float64, of the epoch's steps before; added to in place."""
        self._n_points = n_points
        self._sums = sums

    def add(self, loss: Tensor, record: phisam.StepRecord) -> None:
        """After each step; nothing here waits for the device."""
        has_term = len(record.delta) == self._n_points
        numbers = torch.stack([loss.double(), record.sharpness if has_term else torch.full_like(record.sharpness, nan)])
        counted = torch.isfinite(numbers)
        self._sums += torch.stack([numbers.where(counted, 0), counted.double()])

    def means(self) -> tuple[float, float]:
        """Loss and R_rho over the steps so far; NaN where there is nothing to average. Waits for the device."""
        loss, sharpness = (self._sums[0] / self._sums[1]).tolist()
        return loss, sharpness

    def over_ranks(self) -> tuple[float, float]:
        """`means` over all ranks, which differ with scope = "shard". Collective, and the last word of an epoch."""
        dist.all_reduce(self._sums)
        return self.means()


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
        self._answer: Any = None
        self.stop_asked = False
        """Whether the board answered that the run is to save and end; it is asked with each word to it."""

    def tell(self, epoch: int, step: int, averages: Averages) -> None:
        """After each step, 1, 2, ... of an epoch."""
        self._steps += 1
        elapsed = time.perf_counter() - self._told
        if self._board is None or elapsed < PROGRESS_SECONDS:
            return
        rate = self._batch_size * self._steps / elapsed
        loss, _ = averages.means()
        self._heed_answer()
        self._answer = self._board.tell.remote(
            epoch=epoch, step=step, steps=self._steps_per_epoch, loss=loss, rate=rate
        )
        self._told, self._steps = time.perf_counter(), 0

    def _heed_answer(self) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # a board that is gone says nothing
                self.stop_asked = self.stop_asked or bool(ray.get(self._answer))


def _is_there(until: tuple[str, float] | None, history: list[checkpoint.Metrics]) -> bool:
    return until is not None and bool(history) and history[-1][until[0]] >= until[1]


def _autocast(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.training.precision)
    return nullcontext if half is None else partial(torch.autocast, device.type, half)


def _with_memory_format(normalize: Normalize, channels_last: bool) -> Normalize:
    if not channels_last:
        return normalize
    return lambda images: normalize(images).contiguous(memory_format=torch.channels_last)
