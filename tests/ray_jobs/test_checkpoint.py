"""A checkpoint is whole or absent, read without pickled code, and an unreadable one is said in words."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from ray_jobs import checkpoint
from ray_jobs.errors import RunError


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    state = {"epoch": 2, "model": {"w": torch.arange(3.0)}, "best": None}
    history = [{"epoch": 1.0, "loss/train": 0.5}, {"epoch": 2.0, "loss/train": float("nan")}]
    checkpoint.save(tmp_path, state, history)
    loaded = checkpoint.load(tmp_path)
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert repr(checkpoint.load_history(tmp_path)) == repr(history)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "state.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"epoch": 1}, [])
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save(tmp_path, {"epoch": lambda: None}, [])
    assert checkpoint.load(tmp_path) == {"epoch": 1}


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_pickled_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Payload()}, tmp_path / "state.pt")
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_files(tmp_path: Path, content: bytes | None) -> None:
    checkpoint.save(tmp_path, {"model": {"w": torch.randn(1000)}}, [{"epoch": 1.0}])
    for name in ("state.pt", "history.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    with pytest.raises(RunError, match=r"state\.pt: the checkpoint cannot be read"):
        checkpoint.load(tmp_path)
    with pytest.raises(RunError, match=r"history\.json: the history cannot be read"):
        checkpoint.load_history(tmp_path)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such checkpoint"):
        checkpoint.load(tmp_path)


def test_weights_of_another_architecture() -> None:
    with pytest.raises(RunError, match=r"run 7: the weights are of another architecture.*size mismatch for weight"):
        checkpoint.load_model(nn.Linear(2, 3), nn.Linear(3, 3).state_dict(), "run 7")
