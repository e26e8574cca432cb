"""One MLflow run per run, each epoch once, models that load where this project is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch import nn

from ray_jobs import config
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.tracking import Tracker, find_run, open_store, provenance, tracking_uri
from ray_jobs.tracking.sweep import Child, SweepTracker, trial_of
from ray_jobs.tracking.writer import Writer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tracker(runs: Path) -> Tracker:
    return start(runs)


def start(runs: Path, name: str = "digits-frob") -> Tracker:
    return Tracker.start(f"sqlite:///{runs / 'mlflow.db'}", runs, config.load(name), provenance("f" * 64))


def metrics(epoch: int, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "loss/train": 1.0 / epoch, "timestamp_ms": 1_700_000_000_000 + epoch, **more}


def epochs_in(tracker: Tracker, name: str = "loss/train") -> list[int]:
    return [metric.step for metric in MlflowClient(tracker.uri).get_metric_history(tracker.run_id, name)]


def test_a_run_has_parameters_tags_and_its_description(tracker: Tracker, tmp_path: Path) -> None:
    client = MlflowClient(tracker.uri)
    data = client.get_run(tracker.run_id).data
    assert data.params["measure"] == "frobenius"
    assert data.params["optimizer.base.lr"] == "0.1"
    assert float(data.params["rho"]) == 0.03
    assert float(data.params["strength"]) == pytest.approx(9e-7)
    assert data.params["n_samples"] == "3"
    assert not {"optimizer.rho", "name", "description"} & set(data.params)  # each setting once
    assert data.tags["mlflow.note.content"] == config.load("digits-frob").description
    assert data.tags["data.fingerprint"] == "f" * 64
    assert data.tags["version.torch"] == torch.__version__.split("+")[0]
    path = client.download_artifacts(tracker.run_id, "run.yaml", str(tmp_path))
    assert config.load(path) == config.load("digits-frob")


def test_an_epoch_that_is_logged_again_is_there_once(tracker: Tracker) -> None:
    tracker.log_epoch(metrics(1))
    tracker.log_epoch(metrics(1))
    assert epochs_in(tracker) == [1]


def test_not_a_number_is_logged_as_such(tracker: Tracker) -> None:
    tracker.log_epoch(metrics(1, sharpness=float("nan"), lr=float("inf")))
    assert tracker.logged_epochs() == {1}


def test_a_store_is_made_once_and_a_server_is_not_asked(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert (tmp_path / "mlflow.db").stat().st_size > 0
    open_store("http://127.0.0.1:9")  # nobody answers there


def test_status_is_what_the_driver_says(tracker: Tracker) -> None:
    client = MlflowClient(tracker.uri)
    tracker.finish("KILLED")
    assert client.get_run(tracker.run_id).info.status == "KILLED"
    tracker.finish("RUNNING")
    assert client.get_run(tracker.run_id).info.status == "RUNNING"


def test_runs_are_found_by_id_short_id_and_unique_name(runs: Path, tracker: Tracker) -> None:
    only = start(runs, "digits-sgd")
    for word in (only.run_id, only.run_id[:8], "digits-sgd"):
        assert find_run(only.uri, word).info.run_id == only.run_id
    start(runs)
    with pytest.raises(RunError, match=r"runs are called 'digits-frob'; say which by its id"):
        find_run(only.uri, "digits-frob")
    with pytest.raises(RunError, match=r"no run 'mnist' in MLflow"):
        find_run(only.uri, "mnist")


def test_a_run_that_mlflow_does_not_know(tracker: Tracker) -> None:
    with pytest.raises(RunError, match=r"asked to say that run 0000.* is RUNNING, but: .*not found"):
        Tracker(tracker.uri, "0" * 32).finish("RUNNING")


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("URI", "TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.mark.usefixtures("no_credentials")
def test_where_mlflow_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(config.TrackingConfig(), Path("/runs")) == "sqlite:////runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(config.TrackingConfig(), Path("/runs")) == "http://127.0.0.1:1"
    assert tracking_uri(config.TrackingConfig(uri="http://127.0.0.1:2"), Path("/runs")) == "http://127.0.0.1:2"


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize("how", ["token", "password", "file"])
def test_credentials_go_to_no_server_that_a_description_alone_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    described = config.TrackingConfig(uri="https://mlflow.example/theirs")
    assert tracking_uri(described, tmp_path) == described.uri, "nothing could be sent"
    if how == "token":
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted")
    elif how == "password":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted")
    else:
        (tmp_path / ".mlflow").mkdir()
        secret = "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = planted\n"
        (tmp_path / ".mlflow" / "credentials").write_text(secret)
    with pytest.raises(ConfigError, match=r"would go to https://mlflow\.example/theirs.*set MLFLOW_TRACKING_URI to"):
        tracking_uri(described, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example:443/")
    assert tracking_uri(described, tmp_path) == described.uri
    for other in (
        "http://mlflow.example",  # in the open
        "https://mlflow.example:5000",
        "https://mlflow.example.evil.example",
        "HTTPS://evil.example#mlflow.example",
    ):
        with pytest.raises(ConfigError, match="your MLflow credentials would go to"):
            tracking_uri(config.TrackingConfig(uri=other), tmp_path)


@pytest.mark.usefixtures("no_credentials")
def test_a_description_chooses_no_store_outside_the_runs_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    for uri in (f"sqlite:///{runs}/other.db", "sqlite:///runs/other.db", f"file://{runs}/files"):
        assert tracking_uri(config.TrackingConfig(uri=uri), runs) == uri
    outside = f"sqlite:///{tmp_path}/poetry"
    for uri in (
        outside,
        "sqlite:///poetry",
        f"sqlite+pysqlite:///{tmp_path}/poetry",
        f"sqlite:///{runs}/../poetry",
        f"sqlite:///{runs}/x?vfs=other",
        f"file://{runs}/%2e%2e/poetry",
        "poetry",
    ):
        with pytest.raises(ConfigError, match="is outside the runs folder"):
            tracking_uri(config.TrackingConfig(uri=uri), runs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", outside)
    assert tracking_uri(config.TrackingConfig(uri=outside), runs) == outside


def test_the_lock_of_a_store_writes_over_no_file(tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("versions")
    open_store(f"sqlite:///{tmp_path / 'poetry'}")
    assert (tmp_path / "poetry.lock").read_text() == "versions"


LOAD = """
import sys
for name in ("phisam", "ray_jobs"):
    sys.modules[name] = None
import mlflow, torch
model = mlflow.pytorch.load_model(sys.argv[1])
weights = torch.load(sys.argv[2], weights_only=True)
expected = torch.load(sys.argv[3], weights_only=True)
for batch in (1, 2, 7):
    assert torch.allclose(model(expected["x"][:batch]), expected["y"][:batch], atol=1e-6), batch
assert set(weights) == set(expected["state"])
"""


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)),
    ],
    ids=["mlp", "batch_norm"],
)
def test_models_load_in_a_process_without_this_project(tracker: Tracker, model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(7, 1, 4, 4)
    model(x)  # BatchNorm's statistics are not the initial ones
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    tracker.log_model("best", model, x[:2], {"epoch": 3})
    assert os.environ.get("MLFLOW_TRACKING_URI") == environment, "the next run of this process would take it"
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "RUNNING"
    client = MlflowClient(tracker.uri)
    run = client.get_run(tracker.run_id)
    (logged,) = run.outputs.model_outputs
    saved = client.get_logged_model(logged.model_id)
    assert saved.name == "best"
    weights = client.download_artifacts(tracker.run_id, "best/weights.pt", str(tmp_path))
    torch.save({"x": x, "y": model.eval()(x).detach(), "state": list(model.state_dict())}, tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, saved.artifact_location, weights, str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(saved.artifact_location.removeprefix("file://"))
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pth")]


# a sweep's runs


@pytest.fixture
def sweep(runs: Path, tracker: Tracker) -> SweepTracker:
    return SweepTracker.start(tracker.uri, runs, "phisam", "s", {"a": "b"})


def child(sweep: SweepTracker, index: int) -> str:
    return sweep.child(index, Child(f"s/{index}", {}, {}, None))


def test_a_run_that_was_deleted_is_said_once_and_holds_nothing_up(sweep: SweepTracker, tmp_path: Path) -> None:
    deleted, other = child(sweep, 0), child(sweep, 1)
    MlflowClient(sweep.uri).delete_run(deleted)
    said: list[str] = []
    writer = Writer(sweep.uri, tmp_path, said.append)
    for run_id in (deleted, "0" * 32):  # in MLflow's trash, and gone for good
        writer.epoch(run_id, metrics(1))
        writer.reopen(run_id)
        writer.end(run_id, "FINISHED", {"a": "b"}, [metrics(1)])
    writer.epoch(other, metrics(1))
    writer.end(other, "FINISHED", {"a": "b"}, [metrics(1), metrics(2)])
    writer.close()
    what = "was deleted in MLflow: nothing more is told of it"
    assert said == [f"run {deleted} {what}", f"run {'0' * 32} {what}"]
    assert sorted(epochs_in(Tracker(sweep.uri, other))) == [1, 2]
    run = MlflowClient(sweep.uri).get_run(other)
    assert (run.info.status, run.data.tags["a"]) == ("FINISHED", "b")


def test_what_mlflow_refuses_is_said_and_the_rest_goes_on(sweep: SweepTracker, tmp_path: Path) -> None:
    said: list[str] = []
    writer, run_id = Writer(sweep.uri, tmp_path, said.append), child(sweep, 0)
    writer.epoch(run_id, metrics(1, **{"no?name": 1.0}))
    writer.epoch(run_id, metrics(2))
    writer.close()
    (line,) = said
    assert "asked to take epoch 1, but: " in line
    assert sorted(epochs_in(Tracker(sweep.uri, run_id))) == [2]


def test_a_run_is_found_however_many_came_after_it(sweep: SweepTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = child(sweep, 77)
    child(sweep, 0)
    monkeypatch.setattr("ray_jobs.tracking.server.PAGE", 1)
    assert find_run(sweep.uri, "s/77").info.run_id == first


@pytest.mark.parametrize("lost", ["create_run", "log_batch"])
def test_a_trials_run_is_one_and_whole_whatever_answer_of_mlflow_was_lost(
    sweep: SweepTracker, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def once(*arguments: Any, **named: Any) -> Any:
        monkeypatch.undo()
        if lost == "create_run":
            done(*arguments, **named)  # made, and the answer never comes
        raise MlflowException("timed out")

    told = Child.of(config.load("digits-frob", ["name=s/3"]), {"data.fingerprint": "f"}, "frob")
    done = getattr(sweep._client, lost)
    monkeypatch.setattr(sweep._client, lost, once)
    with pytest.raises(RunError, match="asked to start the run of trial 3, but: timed out"):
        sweep.child(3, told)
    (half,) = sweep.children()
    assert (trial_of(half), half.data.tags["data.fingerprint"], half.data.params) == (3, "f", {})
    run_id = sweep.child(3, told)
    (whole,) = sweep.children()
    assert (whole.info.run_id, whole.info.run_name) == (run_id, "s/3")
    assert whole.data.params["measure"] == "frobenius"
    assert whole.data.params["run"] == "frob", "which of the sweep's base runs"


def test_a_sweep_is_described_once_and_discards_a_run(sweep: SweepTracker) -> None:
    sweep.describe({"metric": "loss"}, {"phisam.folder": "here"}, {"sweep.yaml": "name: s"})
    again = SweepTracker(sweep.uri, sweep.run_id)
    again.describe({"metric": "other"}, {}, {})  # MLflow would refuse to change a parameter
    parent = MlflowClient(sweep.uri).get_run(sweep.run_id).data
    assert (parent.params, parent.tags["phisam.folder"]) == ({"metric": "loss"}, "here")
    again.discard(again.child(0, Child("s/0", {}, {}, None)))
    assert again.children() == []
