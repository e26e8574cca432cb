"""Gradients' way between nodes: an all-reduce by NCCL or gloo, timed."""

from __future__ import annotations

import socket
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.cluster import only_loopback
from ray_jobs.doctor.findings import Finding, all_reduce, failed
from ray_jobs.errors import first_line
from ray_jobs.loopback import join

MEGABYTES = 32
REPEATS = 4
SECONDS = 90
REMEDY = (
    "let the nodes reach each other on all ports, and name the network between them with NCCL_SOCKET_IFNAME or "
    "GLOO_SOCKET_IFNAME"
)


@dataclass(frozen=True)
class Result:
    """seconds: of one all-reduce, the best of a few."""

    seconds: float
    right: bool


class Rank:
    """One process of the group, as a Ray actor."""

    def store(self, loopback: bool) -> str:
        """Where the ranks meet, made known by rank 0: a file on one machine, since torch's TCP store listens to all."""
        if loopback:
            return f"file://{tempfile.gettempdir()}/phisam-store-{uuid.uuid4().hex}"
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]

    def reduce(self, backend: str, store: str, rank: int, ranks: int) -> Result:
        """Joins the group and times the sum of ones."""
        import torch
        import torch.distributed as dist

        if store.startswith("file:"):
            join(backend, store, rank, ranks, SECONDS)
        else:
            limit = timedelta(seconds=SECONDS)
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=limit)
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        try:
            best, right = float("inf"), True
            for _ in range(REPEATS):
                values = torch.ones(MEGABYTES * 250_000, device=device)
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(values)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - began)
                right = right and bool((values == ranks).all())
            return Result(best, right)
        finally:
            dist.destroy_process_group()
            if store.startswith("file:"):
                Path(store.removeprefix("file://")).unlink(missing_ok=True)


def measured(nodes: Sequence[str], gpus: float) -> Finding:
    """An all-reduce over one process of each node, or two of the only one.

    Args:
        nodes: Ray's ids of them; those with GPUs where the cluster has any.
        gpus: of the cluster.
    """
    backend = "nccl" if gpus else "gloo"
    places = list(nodes) * 2 if len(nodes) == 1 and gpus != 1 else list(nodes)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1 if gpus else 0}
    ranks: list[Any] = [
        ray.remote(Rank)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(place, soft=False), **options)
        .remote()
        for place in places
    ]
    try:
        store = ray.get(ranks[0].store.remote(only_loopback()), timeout=SECONDS)
        calls = [rank.reduce.remote(backend, store, i, len(ranks)) for i, rank in enumerate(ranks)]
        results: list[Result] = ray.get(calls, timeout=SECONDS)
    except ray.exceptions.GetTimeoutError:
        taken = "; all of its GPUs may be taken by other jobs" if gpus else ""
        return failed("all-reduce", f"{backend} over {len(ranks)} ranks did not end in {SECONDS:g} s{taken}", REMEDY)
    except Exception as error:  # what torch, NCCL and Ray raise
        cause = getattr(error, "cause", None) or error
        return failed("all-reduce", f"{backend} over {len(ranks)} ranks: {first_line(cause)}", REMEDY)
    finally:
        for rank in ranks:
            ray.kill(rank)
    slowest = max(result.seconds for result in results)
    return all_reduce(backend, len(ranks), MEGABYTES, slowest, all(result.right for result in results))
