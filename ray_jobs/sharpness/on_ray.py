"""The workers of `phisam sharpness --num-workers N`: a Ray Train group that measures one model together."""

from __future__ import annotations

import pickle
import shutil
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train.torch
import torch.distributed as dist
from ray.train.v2.api.config import RunConfig as RayRunConfig
from ray.train.v2.api.config import ScalingConfig

from ray_jobs.cluster import beside_driver, checked_resources, only_loopback
from ray_jobs.config import RunConfig
from ray_jobs.errors import RunError
from ray_jobs.loopback import LoopbackTorchConfig
from ray_jobs.paths import runs_folder
from ray_jobs.sharpness.job import Job
from ray_jobs.sharpness.measuring import Measured
from ray_jobs.train import fit
from ray_jobs.trainer import Trainer, made

TELL_SECONDS = 0.2


class Desk:
    """Between the driver and rank 0, as a Ray actor. Texts and bytes alone: it needs no torch."""

    def __init__(self, job: bytes) -> None:
        self._job = job
        self._place: tuple[str, int, int] | None = None
        self._result: bytes | None = None

    def job(self) -> bytes:
        """What to measure."""
        return self._job

    def tell(self, what: str, done: int, total: int) -> None:
        """How far it is."""
        self._place = (what, done, total)

    def place(self) -> tuple[str, int, int] | None:
        """How far it is."""
        return self._place

    def finish(self, result: bytes) -> None:
        """The end."""
        self._result = result

    def result(self) -> bytes | None:
        """What `finish` got."""
        return self._result


def measure_loop(settings: dict[str, Any]) -> None:
    """A worker. settings: "desk", a handle."""
    desk = settings["desk"]
    job: Job = pickle.loads(ray.get(desk.job.remote()))  # the driver's own
    told = 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal told
        if dist.get_rank() == 0 and (done == total or time.monotonic() - told > TELL_SECONDS):
            told = time.monotonic()
            desk.tell.remote(what, done, total)

    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    result = job.measured(ray.train.torch.get_device(), group, tell)
    if dist.get_rank() == 0:
        ray.get(desk.finish.remote(pickle.dumps(result)))


def measured_on_ray(config: RunConfig, job: Job, watch: Callable[[Callable[[], Any]], Any]) -> Measured:
    """The job on config.scaling's workers of the Ray that `cluster.connected` started or joined.

    Args:
        watch: a context that calls what it is given now and then, for (what, done, total) or None.

    Raises:
        ConfigError: the cluster cannot hold the workers.
        RunError: the model cannot be measured, or workers failed.
    """
    use_gpu = checked_resources(config)
    desk = beside_driver(Desk, pickle.dumps(job))
    storage = made(config.checkpoint.storage or runs_folder())
    name = f"sharpness-{uuid.uuid4().hex[:8]}"
    trainer = Trainer(
        measure_loop,
        train_loop_config={"desk": desk},
        torch_config=LoopbackTorchConfig() if only_loopback() else None,
        scaling_config=ScalingConfig(
            num_workers=config.scaling.most_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.scaling.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RayRunConfig(name=name, storage_path=str(storage)),
    )
    try:
        with watch(lambda: ray.get(desk.place.remote(), timeout=10)):
            fit(trainer, "measuring")
        result = ray.get(desk.result.remote())
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)
    if result is None:
        raise RunError("measuring ended without a result")
    measured: Measured = pickle.loads(result)
    return measured
