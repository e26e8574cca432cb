"""Runs a function on W gloo processes of this machine and returns what each rank returned.

They are forked from a process that has imported what most of them need, and has done nothing else.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PRELOADED = ["pytest", "phisam", "torchvision", "ray.train.torch", "ray_jobs.worker"]


def run(world_size: int, function: Callable[[int], Any]) -> list[Any]:
    """[function(rank) for rank in ranks], each in a process of its own; results must be loadable by torch.load."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, args=(world_size, folder, function), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _process(rank: int, world_size: int, folder: str, function: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(function(rank), Path(folder) / f"{rank}.pt")
    dist.barrier()
    gc.collect()  # models before their process group: gloo may abort at exit otherwise
    dist.destroy_process_group()
