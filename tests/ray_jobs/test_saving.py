"""`train_loop` broken off at any step and begun again: bit-equal at the end, and what it cost is told."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ray.train.v2.api.preemption import PreemptionInfo

from ray_jobs import attempts, checkpoint, checkpoints, config, meeting, saving
from ray_jobs.errors import RunError
from ray_jobs.eviction import NOTICE
from tests.phisam import gloo
from tests.ray_jobs import loop

STEPS, EPOCHS = 4, 3  # 143 examples of digits by 32


def described(checkpoint: dict[str, Any] | None = None, **sections: Any) -> config.RunConfig:
    run = {
        "name": "x",
        "data": {"name": "digits", "fraction": 0.11},
        "model": {"name": "mlp", "width": 4, "depth": 2},
        "optimizer": {"measure": "trace", "rho": 0.1, "lam": 0.5, "n_samples": 1, "base": {"name": "adam"}},
        "training": {"epochs": EPOCHS, "batch_size": 32, "precision": "float64"},
        "checkpoint": checkpoint or {},
        **sections,
    }
    return config.RunConfig.model_validate(run)


class BrokenOffError(Exception):
    """Stands for a process that dies."""


@contextmanager
def broken_off_after(steps: int) -> Iterator[None]:
    """A death right after a step of the run, and after what it saved."""
    whole = saving.Saver.after_step

    def after_step(saver: saving.Saver, course: saving.Course) -> bool:
        ends = whole(saver, course)
        if saver._steps(course) == steps:
            if saver._writer is not None:
                saver._writer.wait()
            raise BrokenOffError
        return ends

    with mock.patch.object(saving.Saver, "after_step", after_step), suppress(BrokenOffError):
        yield
        raise AssertionError(f"the run ended before step {steps}")


def run(described: config.RunConfig, folder: Path, **settings: Any) -> tuple[list[dict[str, float]], list[Any]]:
    """On this process alone."""
    with loop.alone():
        return loop.trained(described, folder, **settings)


def last(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    newest = checkpoints.present(folder)[-1]
    return checkpoint.load(newest), checkpoint.load_history(newest)


TIMES = {"seconds", "seconds_per_step", "examples_per_second", "timestamp_ms", "checkpoint_seconds"}
COUNTS = {"restarts", "wasted_steps"}


def assert_same(found: Path, expected: Path) -> None:
    """State and history, but for times and what faults cost."""
    (state, history), (its_state, its_history) = last(found), last(expected)
    for part in ("model", "optimizer", "best", "epoch", "step"):
        assert_equal(state[part], its_state[part], part)
    for one, other in zip(history, its_history, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - TIMES - COUNTS:
            assert one[name] == other[name], name


def assert_equal(left: Any, right: Any, where: str) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(described(), folder)
    return folder


def test_without_settings_a_checkpoint_is_saved_at_the_end_of_each_epoch_and_two_are_kept(undisturbed: Path) -> None:
    assert [path.name for path in checkpoints.present(undisturbed)] == ["checkpoint_8", "checkpoint_12"]
    history = last(undisturbed)[1]
    assert [metrics["wasted_steps"] for metrics in history] == [metrics["restarts"] for metrics in history] == [0] * 3
    waited = [metrics["checkpoint_seconds"] for metrics in history]
    assert waited[0] == 0
    assert 0 < waited[1] < waited[2]


@pytest.mark.parametrize(("every", "death", "saved"), [(3, 7, 6), (3, 8, 6), (100, 7, 4), (100, 3, 0)])
def test_a_run_that_dies_at_any_step_ends_bit_equal_and_counts_what_it_trained_twice(
    undisturbed: Path, tmp_path: Path, every: int, death: int, saved: int
) -> None:
    """Its averages of the epoch, and the seconds, go on where they were too."""
    settings = described({"every_steps": every})
    with broken_off_after(death):
        run(settings, tmp_path)
    newest = checkpoints.newest(tmp_path)
    assert (0 if newest is None else int(newest.name.partition("_")[2])) == saved
    reported, _ = run(settings, tmp_path)
    assert_same(tmp_path, undisturbed)
    assert [metrics["epoch"] for metrics in reported] == list(range(saved // STEPS + 1, EPOCHS + 1))
    assert {(metrics["restarts"], metrics["wasted_steps"]) for metrics in reported} == {(1, death - saved)}
    seconds = [metrics["seconds"] for metrics in last(tmp_path)[1]]
    assert seconds == sorted(seconds)


def test_a_run_that_dies_again_adds_up_what_it_trained_twice(undisturbed: Path, tmp_path: Path) -> None:
    settings = described({"every_steps": 3})
    for death in (5, 7, 8):
        with broken_off_after(death):
            run(settings, tmp_path)
    run(settings, tmp_path)
    assert attempts.read(tmp_path) == attempts.Attempts(3, 1 + 1 + 2, 12)  # 4, 6 and 6 were saved
    assert_same(tmp_path, undisturbed)


def on_two(folder: str, rank: int) -> dict[str, Any]:
    """Two ranks with losses of their own: undisturbed, and broken off in mid-epoch; then what one rank began."""
    run = described({"every_steps": 3}, optimizer={"measure": "sam", "rho": 0.1, "scope": "shard"})
    whole, _ = loop.trained(run, Path(folder) / "whole")
    with broken_off_after(7):
        loop.trained(run, Path(folder) / "broken")
    dist.barrier()
    again, _ = loop.trained(run, Path(folder) / "broken")
    elastic, _ = loop.trained(described(), Path(folder) / "alone")
    return {name: [curves(metrics) for metrics in told] for name, told in locals().items() if isinstance(told, list)}


def curves(metrics: dict[str, float]) -> list[float]:
    return [metrics[name] for name in ("loss/train", "sharpness", "loss/test", "accuracy/validation")]


def test_ranks_with_averages_of_their_own_go_on_bit_equal_and_another_number_of_them_nearly(
    undisturbed: Path, tmp_path: Path
) -> None:
    with broken_off_after(7):
        run(described({"every_steps": 3}), tmp_path / "alone")
    for rank in gloo.run(2, partial(on_two, str(tmp_path))):
        assert rank["again"] == rank["whole"][1:]
        for found, expected in zip(rank["elastic"], last(undisturbed)[1][1:], strict=True):
            assert found == pytest.approx(curves(expected), rel=1e-10)
    assert_same(tmp_path / "broken", tmp_path / "whole")
    for name, value in last(tmp_path / "alone")[0]["model"].items():
        torch.testing.assert_close(value, last(undisturbed)[0]["model"][name], rtol=0, atol=1e-10)


def damage(path: Path) -> None:
    """One bit, in the middle of the weights."""
    content = bytearray((path / checkpoint.STATE).read_bytes())
    content[len(content) // 2] ^= 1
    (path / checkpoint.STATE).write_bytes(content)


def truncate(path: Path) -> None:
    (path / checkpoint.STATE).write_bytes((path / checkpoint.STATE).read_bytes()[:100])


@pytest.mark.parametrize("harm", [damage, truncate])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_serves(
    undisturbed: Path, tmp_path: Path, harm: Any
) -> None:
    settings = described({"every_steps": 3})
    with broken_off_after(7):
        run(settings, tmp_path)
    harm(tmp_path / "checkpoint_6")
    reported, told = run(settings, tmp_path)
    assert [path.name for path in checkpoints.damaged(tmp_path)] == ["damaged_checkpoint_6"]
    assert len(told) == 1
    assert "checkpoint_6/state.pt: the checkpoint cannot be read" in told[0]
    assert told[0].endswith("it is kept as damaged_checkpoint_6, and the run goes on from checkpoint_4")
    assert {metrics["wasted_steps"] for metrics in reported} == {7 - 4}
    assert_same(tmp_path, undisturbed)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full from step 4 to 9 of 12: what is due then is lost, said once, and the one before stays."""
    whole, present = checkpoint.save, []

    def save(folder: Path, state: dict[str, Any], history: list[dict[str, float]]) -> None:
        if int(folder.name.partition("_")[2]) in range(4, 10):
            present.append([path.name for path in checkpoints.present(tmp_path)])
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(folder, state, history)

    monkeypatch.setattr(checkpoint, "save", save)
    reported, told = run(described({"every_steps": 3}), tmp_path)
    assert present == [["checkpoint_3"]] * 4  # after 4, 6, 8, 9
    assert len(told) == 1
    assert "the checkpoint after step 4 could not be written ([Errno 28] No space left on device)" in told[0]
    assert len(reported) == EPOCHS
    assert list(reported[0])[1] == "accuracy/validation"  # what MLflow's compare page draws unasked
    assert_same(tmp_path, undisturbed)


def test_a_disk_that_is_full_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunError, match=r"the last checkpoint cannot be written: .*No space left"):
        run(described(), tmp_path)


def test_an_error_of_the_thread_is_raised_in_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save", mock.Mock(side_effect=AssertionError("a mistake")))
    with pytest.raises(AssertionError, match="a mistake"):
        run(described(), tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written_and_its_epoch_is_told_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is so slow that two steps are taken before the first checkpoint lies on it; it does not hold them."""
    written, order = threading.Event(), []
    whole, after_step = checkpoint.save, saving.Saver.after_step

    def save(folder: Path, state: dict[str, Any], history: list[dict[str, float]]) -> None:
        if folder.name == "checkpoint_4":
            first = {part: deepcopy(state[part]) for part in ("model", "optimizer", "sums")}
            assert written.wait(60)
            assert_equal({part: state[part] for part in first}, first, "checkpoint_4")
        whole(folder, state, history)
        order.append(folder.name)

    def step(saver: saving.Saver, course: saving.Course) -> bool:
        if saver._steps(course) == 6:
            order.append("step 6")
            written.set()
        return after_step(saver, course)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(saving.Saver, "after_step", step)
    monkeypatch.setattr(loop, "report", lambda metrics: order.append(f"epoch {metrics['epoch']}"))
    run(described(), tmp_path)
    assert order[:2] == ["step 6", "checkpoint_4"]
    assert [word for word in order if word != "step 6"] == [
        word for epoch in (1, 2, 3) for word in (f"checkpoint_{4 * epoch}", f"epoch {epoch}")
    ]


def test_minutes_are_counted_from_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks meet after each step here, at which a clock of its own says that 20 seconds have passed."""
    saved = names_of_saved(monkeypatch)
    monkeypatch.setattr(meeting, "SECONDS", 0.0)
    monkeypatch.setattr(saving, "clock", iter(range(0, 10**6, 20)).__next__)
    run(described({"every_minutes": 1.0, "every_epochs": 3}), tmp_path)
    assert saved == ["checkpoint_3", "checkpoint_6", "checkpoint_9", "checkpoint_12"]


def names_of_saved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled as checkpoints are written."""
    saved: list[str] = []
    whole = checkpoint.save

    def save(folder: Path, *rest: Any) -> None:
        saved.append(folder.name)
        whole(folder, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    return saved


def test_who_asks_a_run_to_stop_gets_a_checkpoint_at_once(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "SECONDS", 0.0)
    asked = iter([False, False, True])
    monkeypatch.setattr(
        loop.worker.Progress, "stop_asked", property(lambda _: next(asked), lambda *_: None), raising=False
    )
    reported, _ = run(described(), tmp_path)
    assert reported == []
    assert [path.name for path in checkpoints.present(tmp_path)] == ["checkpoint_3"]
    monkeypatch.setattr(loop.worker.Progress, "stop_asked", False)
    reported, _ = run(described(), tmp_path)
    assert {(metrics["restarts"], metrics["wasted_steps"]) for metrics in reported} == {(1, 0)}
    assert_same(tmp_path, undisturbed)


def told_to_go(folder: str, rank: int) -> dict[str, Any]:
    """Rank 1 gets SIGTERM after the second step."""
    meeting.SECONDS = 0.0
    after_step = saving.Saver.after_step

    def step(saver: saving.Saver, course: saving.Course) -> bool:
        NOTICE.given = rank == 1 and saver._steps(course) == 2
        return after_step(saver, course)

    with mock.patch.object(saving.Saver, "after_step", step):
        try:
            loop.trained(described(), Path(folder))
            end = "returned"
        except RunError as error:
            end = str(error)
    return {"end": end, "saved": [path.name for path in checkpoints.present(Path(folder))]}


def test_a_worker_that_is_told_to_end_leaves_a_checkpoint_behind(tmp_path: Path) -> None:
    first, second = gloo.run(2, partial(told_to_go, str(tmp_path)))
    assert first == {"end": "returned", "saved": ["checkpoint_2"]}
    assert second == {
        "end": "its process was told to end (SIGTERM), and has saved what it did",
        "saved": ["checkpoint_2"],
    }


def test_a_node_that_will_be_taken_away_is_saved_from_at_once_and_again_before_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "SECONDS", 0.0)
    far, near = (PreemptionInfo(int((time.time() + seconds) * 1000), {"node": [0]}) for seconds in (3600, 5))
    notices = iter([None, far, far, far, None, *[near] * 20])
    saved = names_of_saved(monkeypatch)
    monkeypatch.setattr(loop, "preemption", lambda: next(notices))
    _, told = run(described({"every_epochs": 3}), tmp_path)
    assert saved == ["checkpoint_2", "checkpoint_6", "checkpoint_12"]
    assert told == ["warning: Ray will take 1 of the run's nodes away: the run is saved"]
