"""What `phisam bench` was asked for: its cells one after the other, each in processes of its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.multiprocessing.spawn import spawn

from ray_jobs.bench import first_step, report
from ray_jobs.bench.cell import FEW, Cell, Row, measure_cell
from ray_jobs.bench.methods import methods
from ray_jobs.bench.workloads import workload
from ray_jobs.errors import ConfigError


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints tables, writes files."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cells = []
    for model in arguments.model:
        for workers in arguments.workers or usual_workers(device):
            load = workload(model, workers, arguments.batch, arguments.image)
            cells.append(Cell(load, workers, tuple(arguments.n), arguments.measure, device))
    for cell in cells:
        check(cell)
    environment = report.environment(device)
    started, rows = time.monotonic(), []
    for i, cell in enumerate(cells):
        # What a cell leaves of its share is for those after it.
        left = arguments.seconds - (time.monotonic() - started)
        rows += measured(replace(cell, seconds=left / (len(cells) - i)))
    environment["took"] = f"{time.monotonic() - started:.0f} s"
    print(report.text(rows, environment))
    if arguments.csv:
        report.write_csv(rows, environment, arguments.csv)
    if arguments.plot:
        report.write_plot(rows, arguments.plot)
    if arguments.first_step:
        print(f"\n{first_step.text(first_step.measure())}")
    return 0


def usual_workers(device: str) -> Sequence[int]:
    """One and two, as far as there are GPUs for them."""
    return [1, 2] if device == "cpu" or torch.cuda.device_count() > 1 else [1]


def check(cell: Cell) -> None:
    """Raises ConfigError where something is not possible: now, not after minutes."""
    if cell.device == "cuda" and torch.cuda.device_count() < cell.workers:
        raise ConfigError(
            f"bench: {cell.workers} worker(s) need as many GPUs, but torch sees {torch.cuda.device_count()}; "
            "choose other --workers, or --device cpu"
        )
    if len(cell.workload.image) != 3:
        raise ConfigError(f"bench: --image takes three numbers, C,H,W, not {','.join(map(str, cell.workload.image))}")
    batch = cell.workload.batch
    if batch % cell.workers or batch < FEW * cell.workers:
        raise ConfigError(
            f"bench: a batch of {batch} cannot be shared by {cell.workers} workers: "
            f"choose a multiple of {cell.workers}, at least {FEW * cell.workers}, with --batch"
        )
    try:
        list(methods(cell.workers, cell.n_samples, cell.measure))
    except ValueError as error:
        raise ConfigError(f"bench: {error}") from error
    try:
        cell.workload.make_model(torch.device("cpu"))
    except ValidationError:
        raise ConfigError(
            f"bench: there is no model {cell.workload.model!r}: choose mlp, convnet, resnet18, "
            "torchvision/NAME or a function package.module:function"
        ) from None


def measured(cell: Cell) -> list[Row]:
    """The rows of a cell, from fresh processes: what other cells left behind has no part in them."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, args=(cell, folder), nprocs=cell.workers)  # type: ignore[no-untyped-call]
        return [Row.from_dict(row) for row in json.loads((Path(folder) / "rows.json").read_text())]


def _process(rank: int, cell: Cell, folder: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as the service's worker has it
    if cell.device == "cuda":
        torch.cuda.set_device(rank)
    if cell.workers > 1:
        # Workers on one machine meet in a file and talk over loopback: nothing listens on the network.
        interface = "lo0" if sys.platform == "darwin" else "lo"
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        backend = "nccl" if cell.device == "cuda" else "gloo"
        store = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=cell.workers)
    rows = measure_cell(cell, rank)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    if cell.workers > 1:
        dist.barrier()
        dist.destroy_process_group()
