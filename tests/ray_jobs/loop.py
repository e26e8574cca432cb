"""`train_loop` itself on gloo processes, without Ray: what it asks of Ray Train is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.v2.api.preemption import PreemptionInfo

from ray_jobs import config, worker


class Silent:
    """A board that nobody reads; it keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.tell = self.tell_event = self

    def remote(self, *event: Any, **_: Any) -> None:
        self.events += event


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def report(metrics: dict[str, float]) -> None:
    """Called with what the loop reports; for a test to replace."""


def preemption() -> PreemptionInfo | None:
    """What Ray says of nodes that it will take away; for a test to replace."""
    return None


@contextmanager
def on_ray(reported: list[dict[str, float]]) -> Iterator[None]:
    """What Ray Train gives a worker."""

    def take(metrics: dict[str, float]) -> None:
        report(metrics)
        reported.append(metrics)

    with (
        mock.patch.object(ray.train, "report", take),
        mock.patch.object(ray.train, "get_preemption_info", side_effect=lambda: preemption()),
        mock.patch.object(ray.train.torch, "get_device", return_value=torch.device("cpu")),
    ):
        yield


def trained(run: config.RunConfig, folder: Path, **settings: Any) -> tuple[list[dict[str, float]], list[Any]]:
    """The loop in this process of a group: what it reported, and what a person was told."""
    reported: list[dict[str, float]] = []
    board = Silent()
    folder.mkdir(parents=True, exist_ok=True)
    with on_ray(reported):
        worker.train_loop({"config": run.model_dump(mode="json"), "folder": str(folder), "board": board, **settings})
    return reported, board.events
