"""The thread that tells MLflow of a sweep's trials, whatever MLflow does meanwhile. No MLflow here."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_model_name

from ray_jobs.errors import ConfigError, RunError
from ray_jobs.journal import Journal
from ray_jobs.tracking import writer as writers
from ray_jobs.tracking.sweep import check_model_name
from ray_jobs.tracking.writer import Writer


class Away:
    """An MLflow that is away for the first so many questions."""

    def __init__(self, questions: float) -> None:
        self.left = questions
        self.told: list[int] = []

    def ask(self, what: int) -> None:
        self.left -= 1
        if self.left >= 0:
            raise RunError("nobody answers")
        self.told.append(what)


def test_an_mlflow_that_is_away_is_told_everything_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "RETRY_SECONDS", 0.01)
    away, said = Away(4), list[str]()
    writer = Writer("", tmp_path, said.append)
    for what in (1, 2, 3):
        writer.ask(None, partial(away.ask, what))
    writer.close()
    assert away.told == [1, 2, 3]
    assert said == ["nobody answers; it is asked again until it answers"]


def test_at_the_end_each_thing_is_tried_again_and_what_is_lost_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = Away(1)
    writer = Writer("", tmp_path, print)
    for what in (1, 2):
        writer.ask(None, partial(back.ask, what))
    while back.left:
        time.sleep(0.01)
    writer.close()  # while the writer waits to ask again
    assert back.told == [1, 2]
    away = Away(math.inf)
    writer = Writer("", tmp_path, print)
    for what in (1, 2, 3):
        writer.ask(None, partial(away.ask, what))
    with pytest.raises(RunError, match=r"^nobody answers \(and 2 more that MLflow was not told\)"):
        writer.close(0)


def test_what_cannot_be_told_for_another_reason_is_said_and_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    def broken() -> None:
        raise TypeError("no number")

    told, said = list[int](), list[str]()
    writer = Writer("", tmp_path, said.append)
    future = writer.ask(None, broken)
    writer.ask(None, lambda: told.append(2))
    with pytest.raises(RunError, match=r"MLflow could not be told \(TypeError: no number\)"):
        writer.close()
    assert (told, len(said), type(future.exception())) == ([2], 1, TypeError)


@pytest.mark.parametrize("name", ["a/b", "a:b", "", "  ", "..", ".", "..a"])
def test_a_models_name_that_mlflow_will_refuse_is_refused_now(name: str) -> None:
    with pytest.raises(MlflowException):
        _validate_model_name(name)
    with pytest.raises(ConfigError, match="--register"):
        check_model_name(name)
    _validate_model_name("digits 2.1_b-c")
    check_model_name("digits 2.1_b-c")


def test_a_full_disk_does_not_silence_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once; the epochs are told at the end, from the history."""
    said, full = list[str](), [True]
    append = Journal.append

    def refusing(journal: Journal, event: dict[str, object]) -> None:
        if full and event["event"] == "epoch":
            raise RunError("the journal cannot be written (No space left on device)")
        append(journal, event)

    monkeypatch.setattr(Journal, "append", refusing)
    monkeypatch.setattr(Writer, "deliver", lambda *_: None)
    writer = Writer("", tmp_path, said.append)
    history = [{"epoch": epoch, "timestamp_ms": 1} for epoch in (1, 2, 3)]
    for metrics in history[:2]:
        writer.epoch("run", metrics)
    assert [line.partition(" (")[0] for line in said] == ["the journal cannot be written"]
    full.clear()
    writer.epoch("run", history[2])
    writer.end("run", "FINISHED", {}, history)
    told = [event["metrics"]["epoch"] for event in writer.untold("run") if event["event"] == "epoch"]
    assert sorted(told) == [1, 2, 3]
    writer.close()
