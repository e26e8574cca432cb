"""A checkpoint is whole or absent, read without pickled code, and an unreadable one is said in words."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from ray_jobs import checkpoint, checkpoints
from ray_jobs.errors import RunError


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    state = {"epoch": 2, "model": {"w": torch.arange(3.0)}, "best": None}
    history = [{"epoch": 1.0, "loss/train": 0.5}, {"epoch": 2.0, "loss/train": float("nan")}]
    folder = tmp_path / "checkpoint_3"
    for _ in range(2):  # the second takes the place of the first
        checkpoint.save(folder, state, history)
    loaded = checkpoint.load(folder)
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert repr(checkpoint.load_history(folder)) == repr(history)
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "history.json", "state.pt"]
    assert list(tmp_path.iterdir()) == [folder]
    subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, check=True)


def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_1"
    checkpoint.save(folder, {"epoch": 1}, [])
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save(folder, {"epoch": lambda: None}, [])
    assert checkpoint.load(folder) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint_1"
    checkpoint.save(folder, {"epoch": 1}, [])
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if target == folder and ".old" not in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.save(folder, {"epoch": 2}, [])
    assert checkpoint.load(folder) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_that_takes_no_more_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's own refusal, by a limit on the size of files; a full disk differs in its number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path / "checkpoint_1", {"w": torch.zeros(100_000)}, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_pickled_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "made", {}, [])
    torch.save({"model": Payload()}, tmp_path / "made" / "state.pt")
    digest = hashlib.sha256((tmp_path / "made" / "state.pt").read_bytes()).hexdigest()
    (tmp_path / "made" / "SHA256SUMS").write_text(f"{digest}  state.pt\n")
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(tmp_path / "made")
    assert "executed" not in capsys.readouterr().out


def flipped(content: bytes) -> bytes:
    """One bit in the middle: of a weight, or of a metric."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("harm", [lambda _: b"", lambda _: b"garbage", lambda content: content[:-7], flipped])
def test_damaged_files(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / "checkpoint_1"
    checkpoint.save(folder, {"model": {"w": torch.randn(1000)}}, [{"epoch": 1.0, "loss/train": 0.123456789}])
    for name in ("state.pt", "history.json"):
        path = folder / name
        path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(RunError, match=r"state\.pt: the checkpoint cannot be read"):
        checkpoint.load(folder)
    with pytest.raises(RunError, match=r"history\.json: the history cannot be read"):
        checkpoint.load_history(folder)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such checkpoint"):
        checkpoint.load(tmp_path)


def test_weights_of_another_architecture() -> None:
    with pytest.raises(RunError, match=r"run 7: the weights are of another architecture.*size mismatch for weight"):
        checkpoint.load_model(nn.Linear(2, 3), nn.Linear(3, 3).state_dict(), "run 7")


def saved(folder: Path, steps: int, epoch: int = 0, step: int = 0) -> Path:
    path = checkpoints.place(folder, steps)
    checkpoint.save(path, {"epoch": epoch, "step": step}, [{"epoch": float(n + 1)} for n in range(epoch)])
    return path


def test_the_newest_is_that_of_the_most_steps(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    nine, ten = saved(tmp_path, 9), saved(tmp_path, 10)
    (tmp_path / "checkpoint_11").write_text("a file")
    (tmp_path / "checkpoint_of_yours").mkdir()
    (tmp_path / ".checkpoint_12.f00.part").mkdir()  # half written
    assert checkpoints.present(tmp_path) == [nine, ten]
    assert checkpoints.newest(tmp_path) == ten
    checkpoints.sweep_up(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_what_is_kept_and_found_again(tmp_path: Path) -> None:
    """The newest two, and the newest two at ends of epochs of four steps."""
    for steps in range(1, 12):
        saved(tmp_path, steps, *divmod(steps, 4))
        checkpoints.prune(tmp_path, 2, 4)
    assert [path.name for path in checkpoints.present(tmp_path)] == [f"checkpoint_{n}" for n in (4, 8, 10, 11)]
    assert checkpoints.at_epoch(tmp_path, 2) == tmp_path / "checkpoint_8"
    assert checkpoints.at_epoch(tmp_path, 3) is None
    (tmp_path / "checkpoint_11" / "SHA256SUMS").unlink()
    (tmp_path / "checkpoint_10" / "state.pt").write_bytes(b"")
    found, damaged = checkpoints.look(tmp_path)
    assert found == checkpoints.usable(tmp_path) == tmp_path / "checkpoint_8"
    assert [path.name for path in damaged] == ["checkpoint_11", "checkpoint_10"]
    for path in damaged:
        checkpoints.set_aside(path)
    assert checkpoints.newest(tmp_path) == found
    assert len(checkpoints.damaged(tmp_path)) == 2
    assert [metrics["epoch"] for metrics in checkpoints.saved_history(tmp_path)] == [1, 2]


def test_a_history_that_does_not_belong_to_its_weights_is_damage(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint_3", {"epoch": 2, "step": 0}, [{"epoch": 1.0}])
    _, damaged = checkpoints.look(tmp_path)
    assert "2 epochs of weights, 1 of history" in next(iter(damaged.values()))


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        saved(tmp_path, 4)
        (tmp_path / "checkpoint_4" / "state.pt").write_text(content)
        checkpoints.set_aside(tmp_path / "checkpoint_4")
    asides = checkpoints.damaged(tmp_path)
    assert [path.name for path in asides] == [f"damaged_checkpoint_4{number}" for number in ("", ".2", ".3")]
    assert [(path / "state.pt").read_text() for path in asides] == ["first", "second", "third"]


def no_memory_for_tensors() -> None:
    torch.empty(1 << 60)


def failing(error: OSError | MemoryError) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("name", ["state.pt", "history.json", "SHA256SUMS"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_disk_that_fails_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """A run would begin anew, with all that it had set aside, when its file system hangs for a second."""
    saved(tmp_path, 4)
    path = saved(tmp_path, 8)
    whole = Path.open

    def opened(file: Path, *arguments: Any, **named: Any) -> Any:
        if file == path / name:
            raise OSError(number, os.strerror(number), str(file))
        return whole(file, *arguments, **named)

    monkeypatch.setattr(Path, "open", opened)
    for read in (checkpoints.look, checkpoints.usable, checkpoints.saved_history):
        with pytest.raises(RunError, match=f"cannot be read .*{os.strerror(number)}.*not known to be damaged"):
            read(tmp_path)
    with pytest.raises(RunError, match="not known to be damaged"):
        checkpoints.is_whole(path)


@pytest.mark.parametrize("fail", [no_memory_for_tensors, failing(MemoryError()), failing(OSError(errno.EIO, "x"))])
def test_what_fails_in_the_middle_of_a_file_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
) -> None:
    saved(tmp_path, 4)
    monkeypatch.setattr(torch, "load", lambda *_, **__: fail())
    with pytest.raises(RunError, match="not known to be damaged"):
        checkpoints.look(tmp_path)


def test_a_file_that_is_a_folder_is_damage(tmp_path: Path) -> None:
    path = saved(tmp_path, 4)
    (path / "state.pt").unlink()
    (path / "state.pt").mkdir()
    assert list(checkpoints.look(tmp_path)[1]) == [path]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 4)
    assert checkpoints.present(tmp_path / "none") == checkpoints.present(tmp_path / "checkpoint_4" / "state.pt") == []
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(RunError, match=r"cannot be listed \(Permission denied\)"):
        checkpoints.newest(tmp_path)
