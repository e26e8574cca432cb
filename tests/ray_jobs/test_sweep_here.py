"""Trials that share a process: the same training, stopped and gone on with, and a process as it was before."""

from __future__ import annotations

import logging
import threading
from asyncio import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_jobs import checkpoint, checkpoints, worker
from ray_jobs.config import load
from ray_jobs.errors import ConfigError
from ray_jobs.sweep.config import load_sweep
from ray_jobs.sweep.here import train_here
from tests.ray_jobs import loop

OVERRIDES = ["training.epochs=3", "scaling.use_gpu=false", "training.batch_size=256"]


def leg(folder: Path, retries: int = 0, **overrides: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    config = load("digits-frob", [*OVERRIDES, *(f"{key.replace('__', '.')}={v}" for key, v in overrides.items())])
    return {
        "config": config.model_dump(mode="json"),
        "folder": str(folder),
        "retries": retries,
        "start": None,
        "until": None,
        "own": None,
        "fingerprint": None,
    }


def trained(settings: dict[str, Any], stop_after: int | None = None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    stopped = threading.Event()

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if stop_after is not None and event["metrics"]["epoch"] == stop_after:
            stopped.set()

    error = train_here(settings, loop.Silent(), emit, stopped)
    if error is not None:
        raise error
    return events


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints.newest(folder)
    assert newest is not None
    model: dict[str, torch.Tensor] = checkpoint.load(newest)["model"]
    return model


def test_a_stopped_trial_goes_on_bit_for_bit_and_the_process_is_as_before(tmp_path: Path) -> None:
    handlers, threads = list(logging.getLogger("phisam").handlers), torch.get_num_threads()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    events = trained(leg(whole))
    assert [event["metrics"]["epoch"] for event in events] == [1, 2, 3]
    with pytest.raises(CancelledError):
        trained(leg(cut), stop_after=1)
    assert len(checkpoints.saved_history(cut)) == 1
    assert [event["metrics"]["epoch"] for event in trained(leg(cut))] == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(cut).values(), strict=True))
    assert len(list(whole.glob("checkpoint_*"))) == 2  # checkpoint.keep
    assert checkpoints.at_epoch(whole, 2) is not None
    assert not dist.is_initialized()
    assert logging.getLogger("phisam").handlers == handlers
    assert torch.get_num_threads() == threads


def test_it_is_the_training_of_a_worker(tmp_path: Path) -> None:
    """The loop by itself, in a group of its own."""
    trained(leg(tmp_path / "here"))
    with loop.alone():
        loop.trained(load("digits-frob", OVERRIDES), tmp_path / "worker")
    found, expected = weights(tmp_path / "here"), weights(tmp_path / "worker")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_trial_that_fails_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = iter(range(100))
    real = worker.evaluate

    def breaks(*arguments: Any) -> Any:
        if next(evaluations) in (2, 3):  # the second epoch's first, twice: a try ends with each
            raise RuntimeError("out of luck")
        return real(*arguments)

    monkeypatch.setattr(worker, "evaluate", breaks)
    events = trained(leg(tmp_path / "again", retries=2))
    assert [event["kind"] for event in events] == ["epoch", "restart", "restart", "epoch", "epoch"]
    assert events[1]["cause"] == "RuntimeError: out of luck"
    evaluations = iter(range(2, 100))
    with pytest.raises(RuntimeError, match="out of luck"):
        trained(leg(tmp_path / "once", retries=0))


def test_workers_of_their_own_are_refused(tmp_path: Path) -> None:
    text = "name: a\nrun: digits-frob\nin_process: true\nspace: {optimizer.rho: {grid: [0.1, 0.2]}}\n"
    for scaling in ("set: {scaling.use_gpu: false, scaling.num_workers: 2}", "set: {scaling.num_workers: 1}"):
        (tmp_path / "a.yaml").write_text(text + scaling)
        with pytest.raises(ConfigError, match="needs trials of one worker on the CPU"):
            load_sweep(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text(text + "set: {scaling.num_workers: 1, scaling.use_gpu: false}")
    assert load_sweep(str(tmp_path / "a.yaml")).in_process
