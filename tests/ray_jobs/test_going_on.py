"""What schedulers say: begin a run or a sweep, or go on with the one that was begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs import cli, config, train
from ray_jobs.errors import ConfigError
from ray_jobs.paths import runs_folder
from ray_jobs.sweep import begun as sweeps
from ray_jobs.sweep.config import dump_sweep, load_sweep
from ray_jobs.sweep.journal import DESCRIPTION, JOURNAL
from ray_jobs.tracking import Tracker, tracking_uri
from tests.ray_jobs.store import put_store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_store(tmp_path / "mlflow.db")
    return tmp_path


def begin(described: config.RunConfig) -> Tracker:
    """A run as `train` leaves it when it is killed at once."""
    runs = runs_folder()
    tracker = Tracker.start(tracking_uri(described.tracking, runs), runs, described, {})
    (runs / tracker.run_id).mkdir()
    (runs / tracker.run_id / train.DESCRIPTION).write_text(config.dump_yaml(described))
    return tracker


def test_a_run_is_found_by_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    described = train.with_key(config.load("digits-sgd"), "job-7")
    assert train.begun(described) is None
    begin(train.with_key(config.load("digits-sgd"), "job-8"))
    assert train.begun(described) is None, "that is another key's"
    tracker = begin(described)
    assert train.begun(described) == tracker.run_id
    assert not train.is_finished(described, tracker.run_id)
    tracker.finish("FINISHED")
    assert cli.main(["train", "digits-sgd", "--key", "job-7"]) == 0
    assert capsys.readouterr().out == f"run {tracker.run_id} with the key job-7 is finished: there is nothing to do\n"


def test_a_key_that_another_description_has_is_refused() -> None:
    tracker = begin(train.with_key(config.load("digits-sgd"), "job-7"))
    other = train.with_key(config.load("digits-sgd", ["training.epochs=99"]), "job-7")
    with pytest.raises(ConfigError, match=f"run {tracker.run_id} was begun with this key and has another description"):
        train.begun(other)


def test_a_key_is_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "digits-sgd", "digits-frob", "--key", "k"]) == 2
    assert "--key goes with one recipe or file" in capsys.readouterr().err


def begin_sweep(home: Path, folder: str, overrides: list[str], journal: str) -> None:
    (home / folder).mkdir()
    (home / folder / DESCRIPTION).write_text(dump_sweep(load_sweep("digits-rho", overrides)))
    (home / folder / JOURNAL).write_text(journal)


BEGUN = '{"event": "begin", "max_concurrent": 1, "register": null, "time": 0}\n'
OVER = BEGUN + '{"event": "end", "winner": 0, "time": 1}\n'


def test_a_sweep_is_found_by_its_name_and_an_unfinished_one_first(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep("digits-rho")
    assert sweeps.begun_before(sweep) is None
    begin_sweep(home, "a" * 32, ["name=other"], BEGUN)
    begin_sweep(home, "b" * 32, [], OVER)
    found = sweeps.begun_before(sweep)
    assert found is not None
    assert found.folder.name == "b" * 32
    assert cli.main(["sweep", "digits-rho", "--go-on"]) == 0
    assert "is over: there is nothing to do" in capsys.readouterr().out
    begin_sweep(home, "c" * 32, [], BEGUN)
    found = sweeps.begun_before(sweep)
    assert found is not None
    assert found.folder.name == "c" * 32


def test_a_sweep_with_other_settings_is_refused(home: Path) -> None:
    begin_sweep(home, "a" * 32, [], BEGUN)
    with pytest.raises(ConfigError, match="was begun with other settings"):
        sweeps.begun_before(load_sweep("digits-rho", ["set.training.epochs=99"]))
