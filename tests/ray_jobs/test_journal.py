"""A journal: what is on disk, what is torn, what is damaged; and that of a run, from there to MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_jobs import cli, config, train
from ray_jobs import sync as syncing
from ray_jobs.errors import RunError
from ray_jobs.journal import Journal, read_journal
from ray_jobs.sync import sync
from ray_jobs.tracking import Tracker, tracking_uri
from ray_jobs.tracking import outbox as outboxes
from ray_jobs.tracking import writer as writers
from ray_jobs.tracking.outbox import Outbox, journals
from ray_jobs.tracking.writer import Writer
from ray_jobs.trainer import alone


def filled(path: Path) -> None:
    journal = Journal(path)
    journal.append({"event": "start", "trial": 0, "values": {"optimizer.rho": 0.05}, "run": "a"})
    journal.append({"event": "epoch", "trial": 0, "epoch": 1, "resource": 1.0, "value": 0.9})


@pytest.mark.parametrize(
    "torn", [b'{"event": "ep', b'{"event": "epoch", "tri\n', b"\x00\x00\x00\n", b"[]\n", b"[" * 9999]
)
def test_a_torn_last_line_is_put_aside_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_journal(path)) == 2
    assert path.read_bytes() == whole + torn  # reading changes nothing
    journal = Journal(path)
    assert len(journal.events) == 2
    journal.append({"event": "trained", "trial": 0})
    assert path.read_bytes() == whole + b'{"seq": 2, "event": "trained", "trial": 0}\n'
    assert torn in (tmp_path / "journal.jsonl.torn").read_bytes()


def test_a_damaged_line_inside_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path)
    first, second = path.read_bytes().splitlines(keepends=True)
    for damaged in (first[:9] + b"\n" + second, second + first, first + first + second, second + second):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"journal.jsonl:[12]: damaged"):
            Journal(path)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("text", ["a\rb", "a\x85b", "a\u2028b", "a\x0bb\x1cc"])
def test_only_a_newline_ends_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"event": "failed", "cause": text}, ensure_ascii=False) + "\n", newline="")
    if "\r" not in text and text.isprintable():
        assert read_journal(path) == [{"event": "failed", "cause": text}]
    journal = Journal(tmp_path / "own.jsonl")
    journal.append({"event": "failed", "cause": text})
    assert read_journal(tmp_path / "own.jsonl") == [{"event": "failed", "cause": text}]


def test_a_journal_without_numbers_is_of_an_older_phisam(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "a"}\n{"event": "b"}\n')
    Journal(path).append({"event": "c"})
    assert [event["event"] for event in read_journal(path)] == ["a", "b", "c"]


def test_an_append_that_failed_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path)
    journal = Journal(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"journal\.jsonl cannot be written \(No space left on device\)"):
        journal.append({"event": "long " * 100})
    monkeypatch.undo()
    journal.append({"event": "c"})
    assert [event["event"] for event in read_journal(path)] == ["start", "epoch", "c"]


# a run's


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(writers, "RETRY_SECONDS", 0.01)
    return tmp_path


@pytest.fixture
def tracker(home: Path) -> Tracker:
    described = config.load("digits-sgd")
    tracker = Tracker.start(tracking_uri(described.tracking, home), home, described, {})
    (home / tracker.run_id).mkdir()
    (home / tracker.run_id / train.DESCRIPTION).write_text(config.dump_yaml(described))
    return tracker


def metrics(epoch: int, **more: float) -> dict[str, Any]:
    return {"epoch": epoch, "loss/train": 1.0 / epoch, "timestamp_ms": 1_700_000_000_000 + epoch, **more}


def told(tracker: Tracker) -> tuple[str, list[tuple[int, float, int]]]:
    client = MlflowClient(tracker.uri)
    history = client.get_metric_history(tracker.run_id, "loss/train")
    return client.get_run(tracker.run_id).info.status, [(m.step, m.value, m.timestamp) for m in history]


class Away:
    """The server does not answer while `now`, and loses its answer to some questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = True
        self.lost: list[str] = []
        take = MlflowClient.log_batch

        def log_batch(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
            if self.now:
                raise MlflowException("nobody answers")
            done = take(client, *arguments, **named)
            if self.lost:
                raise MlflowException(self.lost.pop())
            return done

        monkeypatch.setattr(MlflowClient, "log_batch", log_batch)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    yield Away(monkeypatch)
    monkeypatch.undo()


def trained(tracker: Tracker, home: Path, finished: Any = None) -> Writer:
    """A driver that trains six epochs, the last of which only the checkpoint knows."""
    writer = Writer(tracker.uri, home / tracker.run_id, print, finished)
    writer.reopen(tracker.run_id)
    for epoch in (1, 2, 2, 3, 1, 4, 5):
        writer.epoch(tracker.run_id, metrics(epoch))
    writer.end(tracker.run_id, "FINISHED", {"a": "b"}, [metrics(1, late=1.0), metrics(6)])
    return writer


SERIES = [(epoch, 1.0 / epoch, 1_700_000_000_000 + epoch) for epoch in range(1, 7)]


def test_what_mlflow_missed_is_told_later_once_and_in_order(
    tracker: Tracker, home: Path, away: Away, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = trained(tracker, home)
    with pytest.raises(RunError, match="nobody answers"):
        writer.close(0)
    assert writer.is_away
    assert told(tracker) == ("RUNNING", [])

    assert cli.main(["sync", tracker.run_id]) == 1
    assert "nobody answers" in capsys.readouterr().err
    finished: list[str] = []
    monkeypatch.setattr(syncing, "log_results", lambda config, folder, tracker: finished.append(folder.name))
    away.now, away.lost = False, ["the answer is lost", "the answer is lost"]
    while cli.main(["sync", tracker.run_id]):
        assert told(tracker)[0] == "RUNNING"
    assert told(tracker) == ("FINISHED", SERIES)
    assert finished == [tracker.run_id]
    assert "is FINISHED; MLflow was told of it, with 6 epochs" in capsys.readouterr().out

    (path,) = journals(home / tracker.run_id)
    before, run = path.read_bytes(), MlflowClient(tracker.uri).get_run(tracker.run_id)
    away.now = True  # it is not even asked
    assert cli.main(["sync"]) == 0
    assert capsys.readouterr().out == f"{tracker.run_id}: MLflow was told all\n"
    assert (path.read_bytes(), told(tracker)) == (before, ("FINISHED", SERIES))
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.end_time == run.info.end_time


def test_a_run_whose_driver_was_killed_is_said_to_be(
    tracker: Tracker, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = Outbox(home / tracker.run_id, tracker.uri, tracker.run_id, print, None)
    outbox.add_status("RUNNING", 1)
    outbox.add_epoch(metrics(1))
    with alone(home / tracker.run_id, "run"):  # as its driver does
        assert cli.main(["sync", "digits-sgd"]) == 0
        assert "is being trained by another process already, which tells MLflow of it" in capsys.readouterr().out
    assert told(tracker) == ("RUNNING", [])
    assert cli.main(["sync", "digits-sgd"]) == 0
    assert f"run {tracker.run_id} was killed; phisam train --resume" in capsys.readouterr().out
    assert told(tracker) == ("KILLED", SERIES[:1])
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.end_time == SERIES[0][2]


def test_what_was_told_before_a_kill_is_not_told_again(
    tracker: Tracker, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after MLflow took it and before the journal said so; or without a journal, as before there was one."""
    for epoch in (1, 2):
        tracker.log_epoch(metrics(epoch))
    sent: list[int] = []
    monkeypatch.setattr(Tracker, "log_epochs", lambda self, epochs: sent.extend(m["epoch"] for m in epochs))
    trained(tracker, home).close()
    assert sent == [3, 4, 5, 6]


def test_epochs_go_in_batches_that_mlflow_takes(
    tracker: Tracker, home: Path, monkeypatch: pytest.MonkeyPatch, away: Away
) -> None:
    monkeypatch.setattr(outboxes, "MAX_METRICS", 7)  # two epochs, of three each
    batches: list[int] = []
    take = Tracker.log_epochs
    monkeypatch.setattr(Tracker, "log_epochs", lambda self, epochs: (batches.append(len(epochs)), take(self, epochs)))
    writer = Writer(tracker.uri, home / tracker.run_id, print)
    for epoch in range(1, 6):
        writer.epoch(tracker.run_id, metrics(epoch))
    away.now = False
    writer.close()
    assert sum(batches) >= 5
    assert max(batches) == 2
    assert told(tracker)[1] == SERIES[:5]


def test_a_model_that_cannot_be_logged_is_no_server_that_is_away(tracker: Tracker, home: Path) -> None:
    def broken(tracker: Tracker) -> None:
        raise TypeError("no such operator")

    writer = trained(tracker, home, broken)
    with pytest.raises(RunError, match=r"MLflow could not be told \(TypeError: no such operator\)"):
        writer.close()
    assert not writer.is_away
    assert told(tracker) == ("RUNNING", SERIES)


def test_sync_of_what_is_not_there(home: Path) -> None:
    with pytest.raises(RunError, match="no run or sweep 'nothing'"):
        sync(["nothing"], print)
    sync([], print)


@pytest.mark.parametrize("trouble", ["missing", "another version", "not ours"])
def test_a_run_that_cannot_be_read_does_not_keep_sync_from_the_others(
    tracker: Tracker, home: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    trained(tracker, home)
    monkeypatch.setattr(syncing, "log_results", lambda *_: None)
    bad = home / ("0" * 32)  # the first of all
    (bad / "tracking").mkdir(parents=True)
    (bad / "tracking" / f"{bad.name}.jsonl").touch()
    if trouble == "another version":
        (bad / train.DESCRIPTION).write_text("name: old\nsettings: {}\n")
    elif trouble == "not ours":
        (bad / ".lock").mkdir()  # as who may do all meets it, too
    with pytest.raises(RunError, match=rf"{bad}.*(cannot be read|neither a recipe nor a file|unknown key)"):
        sync([], print)
    assert told(tracker) == ("FINISHED", SERIES)
