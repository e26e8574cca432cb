"""The Ray that runs run on: started or joined, and asked what it has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.config import RunConfig
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.jobs.address import is_loopback
from ray_jobs.jobs.token import ensure_token, require_token

T = TypeVar("T")


@contextlib.contextmanager
def connected(
    address: str | None, num_workers: int, verbose: bool, meanwhile: Callable[[], T | None] = lambda: None
) -> Iterator[T | None]:
    """Ray for the runs inside: a cluster at an address, else a local one that listens on 127.0.0.1 alone.

    Args:
        meanwhile: what needs no Ray; it is done in a thread while Ray starts, and what it returns is yielded.

    Raises:
        RunError: there is no cluster at the address.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(meanwhile)
            _start(address, num_workers, verbose)
            result = done.result()
        yield result
    finally:
        ray.shutdown()


def _start(address: str | None, num_workers: int, verbose: bool) -> None:
    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or address  # as Ray takes it
        if address is not None:
            host = urlsplit(address if "://" in address else f"//{address}").hostname
            if address != "auto" and not is_loopback(host or ""):
                require_token(address)
            ray.init(address=address, **quiet)
        else:
            ensure_token()  # before Ray makes it, for everybody to read
            cpus = max(os.cpu_count() or 1, num_workers)  # workers on one machine may share a core
            local = {"address": "local", "num_cpus": cpus, "include_dashboard": False, **quiet}
            try:
                ray.init(**local)
            except Exception as error:
                if "timed out" not in str(error):
                    raise
                ray.init(**local)  # Ray gives its node 30 s and no way to say more: on a busy machine, once again
    except ConfigError:
        raise
    except Exception as error:  # of a node that does not come up in time, ray.init raises just that
        raise RunError(f"no Ray at {address or 'this machine'}: {first_line(error)}") from None


def checked_resources(config: RunConfig) -> bool:
    """Whether workers use GPUs.

    Raises:
        ConfigError: the cluster cannot hold the workers; Ray would wait for ever.
    """
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers, cpus, gpus = config.scaling.sizes[0], have.get("CPU", 0), have.get("GPU", 0)
    use_gpu = gpus > 0 if config.scaling.use_gpu == "auto" else config.scaling.use_gpu
    # With auto too: a run meant for GPUs must not train on CPUs unasked.
    if use_gpu and gpus < workers * config.scaling.gpus_per_worker:
        raise ConfigError(
            f"scaling.num_workers = {workers} on GPUs needs {workers} of them, but the cluster has {gpus:g}; lower "
            "num_workers, or set scaling.use_gpu: false"
        )
    if cpus < workers * config.scaling.cpus_per_worker:
        raise ConfigError(
            f"scaling.num_workers = {workers} with cpus_per_worker = {config.scaling.cpus_per_worker:g} needs "
            f"{workers * config.scaling.cpus_per_worker:g} CPUs, but the cluster has {cpus:g}; lower one of them"
        )
    return bool(use_gpu)


def beside_driver(made: type, *arguments: Any) -> Any:
    """An actor of a class, on the driver's own node.

    It needs no CPU, and Ray would put it on any node: one that is taken away would take along what the driver hears of
    its workers, and with it SIGTERM's way to them, though the run itself goes on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(made)
    return actor.options(scheduling_strategy=here).remote(*arguments)


def only_loopback() -> bool:
    """Whether all of this Ray lives on 127.0.0.1."""
    return all(node["NodeManagerAddress"] == "127.0.0.1" for node in ray.nodes())  # type: ignore[no-untyped-call]
