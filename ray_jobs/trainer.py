"""A run description as Ray Train's trainer, and what a trainer leaves in its folder. For single runs and for trials."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from ray_jobs.config import RunConfig
from ray_jobs.errors import RunError
from ray_jobs.eviction import HeedSigterm
from ray_jobs.loopback import LoopbackTorchConfig
from ray_jobs.meters import Meters

RESIZE_SECONDS = 15.0
"""How often an elastic run looks whether nodes came back."""


class Trainer(TorchTrainer):
    """Without Ray Data's manager: a process for each run, which imports pandas and pyarrow to wait for data sets.

    The workers read their examples themselves.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    config: RunConfig,
    settings: Mapping[str, Any],
    folder: Path,
    callbacks: Sequence[UserCallback],
    *,
    use_gpu: bool,
    loopback: bool,
    max_failures: int,
    trainer: type[Trainer] = Trainer,
) -> Trainer:
    """The trainer of a run whose checkpoints lie in `folder`: made again with the same folder, it resumes from them.

    Args:
        settings: what `loop` gets beside the description.
        loopback: all workers are on this machine, and nothing may listen beyond it.
        max_failures: how often workers are started again from the newest checkpoint.
    """
    scaling = config.scaling
    return trainer(
        loop,
        train_loop_config={"config": config.model_dump(mode="json"), "folder": str(folder), **settings},
        torch_config=LoopbackTorchConfig() if loopback else None,
        scaling_config=ScalingConfig(
            num_workers=(scaling.sizes[0], scaling.sizes[-1]) if len(scaling.sizes) > 1 else scaling.sizes[0],
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker,
                **({"GPU": scaling.gpus_per_worker} if use_gpu else {}),
            },
        ),
        run_config=RayRunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
            callbacks=[
                *callbacks,
                Meters(config.name, folder.name, config.optimizer.measure.name),
                HeedSigterm(),  # type: ignore[list-item]  # Ray takes those of its workers too
            ],
        ),
    )


def made(folder: Path) -> Path:
    """The folder, which exists from now on.

    Raises:
        RunError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}): set checkpoint.storage or PHISAM_HOME") from None
    return folder


class HeldError(RunError):
    """Another process trains it."""


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Holds the folder of a run or a sweep; the lock ends with this process, however it ends.

    Raises:
        HeldError: another process holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(f"{what} {folder.name} is being trained by another process already") from None
        yield
