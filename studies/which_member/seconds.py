"""How long a step of each chosen setting takes on one worker and on two, in steps of the base optimizer.

Processes of one thread, gloo over loopback, the run's own model, batch and optimizer; rounds in which every method
follows the base optimizer. One process: CPU time; two: the wall time of the slower, so it wants a quiet machine.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ray_jobs.config import RunConfig
from ray_jobs.data import Batches, load_dataset
from ray_jobs.models import make_model
from ray_jobs.worker import make_optimizer

ROUNDS, TURN_SECONDS = 9, 0.3
WORKERS = (1, 2)

Ratios = dict[str, dict[int, float]]
"""Method -> workers -> steps of the base optimizer on one worker, or with DDP on two."""


def ratios(runs: Mapping[str, Mapping[str, Any]], base: str) -> Ratios:
    """runs: method -> its run description as plain values."""
    found: Ratios = {method: {} for method in runs}
    for workers in WORKERS:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_process, args=(workers, dict(runs), base, folder), nprocs=workers)  # type: ignore[no-untyped-call]
            for method, ratio in json.loads((Path(folder) / "ratios.json").read_text()).items():
                found[method][workers] = ratio
    return found


def _process(rank: int, workers: int, runs: Mapping[str, Mapping[str, Any]], base: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    clock = time.process_time if workers == 1 else time.perf_counter
    steps = {method: _step(RunConfig.model_validate(run)) for method, run in runs.items()}

    def turn(method: str, count: int) -> float:
        steps[method]()
        dist.barrier()
        started = clock()
        for _ in range(count):
            steps[method]()
        seconds = torch.tensor((clock() - started) / count, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    counts = {method: max(1, round(TURN_SECONDS / turn(method, 3))) for method in runs}
    times: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(ROUNDS):
        for method in runs:
            around = turn(base, counts[base])
            times[method].append(turn(method, counts[method]) / around)
    if rank == 0:
        (Path(folder) / "ratios.json").write_text(json.dumps({m: median(values) for m, values in times.items()}))
    steps.clear()
    dist.barrier()
    dist.destroy_process_group()


def _step(config: RunConfig) -> Callable[[], object]:
    """A step of a run on its first batch."""
    dataset = load_dataset(config.data, config.training.seed)
    batches = Batches(dataset.train, config.training.batch_size, 0, dataset.normalizer(torch.float32))
    model = make_model(config.model, dataset.input_shape, dataset.num_classes, 0).train()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    optimizer = make_optimizer(config, ddp, batches.steps_per_epoch)
    optimizer.n_samples = config.optimizer.n_samples
    images, labels = next(iter(batches.epoch(0, optimizer.mesh.data_rank, optimizer.mesh.data_size)))

    def loss(part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return cross_entropy(ddp(part(images)), part(labels))

    return partial(optimizer.step, loss)
