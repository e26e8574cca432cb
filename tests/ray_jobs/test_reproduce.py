"""`phisam reproduce figure1`: trains what is missing, in MLflow's own books, and draws what is there."""

from __future__ import annotations

import csv
import io
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from ray_jobs import cluster, train
from ray_jobs.config import RunConfig
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.figures import figure1, reproduce
from ray_jobs.paths import runs_folder
from ray_jobs.tracking import Tracker, tracking_uri
from ray_jobs.tracking.made import made_from
from tests.ray_jobs.store import put_store

EPOCHS = 2


class Trainer:
    """In place of ray_jobs.train: books a run with made-up metrics, and counts."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.resumed: list[str] = []
        self.dies_at: int | None = None

    def train(self, config: RunConfig, console: Console) -> None:
        runs = runs_folder()
        runs.mkdir(exist_ok=True)
        tracker = Tracker.start(tracking_uri(config.tracking, runs), runs, config, {})
        self.finish(tracker, config)

    def finish(self, tracker: Tracker, config: RunConfig) -> None:
        if len(self.trained) == self.dies_at:
            self.dies_at = None
            tracker.finish("KILLED")
            raise KeyboardInterrupt
        self.trained.append(f"{config.name}-{config.training.seed}")
        for epoch in range(1, EPOCHS + 1):
            metrics = dict.fromkeys(
                ("loss/train", "loss/test", "accuracy/test", "hessian/frobenius_squared"), 1 / epoch
            )
            tracker.log_epoch({**metrics, "epoch": epoch, "timestamp_ms": epoch})
        tracker.finish("FINISHED")

    def unfinished(self, run_id: str) -> str:
        return run_id

    def resume(self, run_id: str, console: Console) -> None:
        self.resumed.append(run_id)
        config = figure1.description(figure1.settings((1e-6,))[3], "mnist5k", 0, (), False)
        self.finish(Tracker(tracking_uri(config.tracking, runs_folder()), run_id), config)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_store(tmp_path / "runs" / "mlflow.db")
    fake = Trainer()
    for name in ("train", "resume", "unfinished"):
        monkeypatch.setattr(train, name, getattr(fake, name))
    monkeypatch.setattr(cluster, "connected", lambda *_: nullcontext())
    return fake


def asked(folder: Path, seeds: int = 1) -> reproduce.Asked:
    return reproduce.Asked("mnist5k", seeds, (1e-6,), (), False, folder)


def run(wanted: reproduce.Asked) -> None:
    reproduce.reproduce_figure1(wanted, None, False, Console(file=io.StringIO()))


def test_a_killed_command_goes_on_where_it_was_and_trains_nothing_twice(trainer: Trainer, tmp_path: Path) -> None:
    names = [f"figure1/mnist5k/{setting.key}-0" for setting in figure1.settings((1e-6,))]
    trainer.dies_at = 3
    with pytest.raises(KeyboardInterrupt) as killed:
        run(asked(tmp_path / "out"))
    assert "same command again" in killed.value.__notes__[-1]
    assert trainer.trained == names[:3]

    run(asked(tmp_path / "out"))
    assert len(trainer.resumed) == 1  # the run that was cut goes on as the same run
    assert trainer.trained == names
    run(asked(tmp_path / "out"))
    assert trainer.trained == names

    run(asked(tmp_path / "out", seeds=2))  # one seed more costs one seed more
    assert trainer.trained == names + [name[:-1] + "1" for name in names]
    with (tmp_path / "out" / "figure1-mnist5k.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names) * 2 * EPOCHS
    assert {row["frobenius_squared"] for row in rows} == {"1", "0.5"}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv", ".md", ".png", ".svg"}


def test_a_run_whose_checkpoints_are_gone_is_trained_anew(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(run_id: str) -> str:
        raise RunError("run.yaml is missing")

    monkeypatch.setattr(train, "unfinished", gone)
    trainer.dies_at = 0
    with pytest.raises(KeyboardInterrupt):
        run(asked(tmp_path))
    run(asked(tmp_path))
    assert trainer.resumed == []
    assert len(trainer.trained) == len(figure1.settings((1e-6,)))


def test_a_run_of_other_settings_is_not_taken_for_it(trainer: Trainer) -> None:
    setting = figure1.ADAM
    plain = figure1.description(setting, "mnist5k", 0, (), False)
    trainer.train(plain, Console(file=io.StringIO()))
    assert made_from(plain) is not None
    others = [
        figure1.description(setting, "mnist5k", 1, (), False),
        figure1.description(setting, "mnist5k", 0, ["training.epochs=3"], False),
        figure1.description(setting, "mnist5k", 0, ["sharpness.probes=7"], False),
    ]
    assert [made_from(other) for other in others] == [None, None, None]
    assert made_from(figure1.description(setting, "mnist5k", 0, ["checkpoint.keep=5"], False)) is not None


def test_every_curve_is_a_valid_run_of_the_papers_network() -> None:
    for setting in figure1.settings(figure1.STRENGTHS):
        config = figure1.description(setting, "mnist5k", 0, (), False)
        assert (config.model.name, config.model.width, config.model.depth) == ("mlp", 128, 6)
        assert (config.optimizer.base.name, config.optimizer.base.lr) == ("adam", 1e-3)
        assert (config.training.epochs, config.training.batch_size) == (20, 128)
        assert (config.sharpness.examples, config.sharpness.probes) == (1280, 100)
    strengths = [figure1.description(figure1.frob(s), "mnist5k", 0, (), False).optimizer.strength for s in (1e-7, 1e-4)]
    assert strengths == [pytest.approx(1e-7, rel=1e-5), pytest.approx(1e-4, rel=1e-5)]  # lam is told in six digits


def test_mistakes_are_said_before_anything_is_trained(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.rhoo"):
        run(asked(tmp_path)._replace(overrides=("optimizer.rhoo=1",)))
    assert trainer.trained == []
