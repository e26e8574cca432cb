"""Process groups of workers on one machine that listen on the loopback interface alone.

torch's usual rendezvous, a TCP store, listens on every interface whatever address it is given, and gloo on the
interface of the host's name. Workers of a local Ray meet in a file instead and talk over loopback.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _TorchBackend


class LoopbackTorchConfig(TorchConfig):
    """Ray Train's TorchConfig for workers that all run on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        self._store = store = Path(tempfile.gettempdir()) / f"phisam-store-{uuid.uuid4().hex}"
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        world_size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join, backend, f"file://{store}", rank, world_size, backend_config.timeout_s
                )
                for rank in range(world_size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        super().on_shutdown(worker_group, backend_config)
        self._store.unlink(missing_ok=True)


def join(backend: str, store: str, rank: int, world_size: int, timeout_s: int) -> None:
    """A process group whose ranks meet in the file `store`."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    dist.init_process_group(
        backend,
        init_method=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
