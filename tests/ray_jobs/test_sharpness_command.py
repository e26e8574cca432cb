"""`phisam sharpness`: models found by run, URI, checkpoint and file; what it prints and logs; mistakes in words."""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from ray_jobs import checkpoint, cli, config, train
from ray_jobs.commands.sharpness import _seconds
from ray_jobs.data import load_dataset
from ray_jobs.models import make_model
from ray_jobs.tracking import Tracker, provenance
from ray_jobs.tracking.models import find_model
from ray_jobs.tracking.sweep import SweepTracker

DESCRIPTION = """
name: digits-small
data: {name: digits, fraction: 0.2}
model: {name: mlp, width: 8, depth: 1}
optimizer: {measure: frobenius, rho: 0.03, n_samples: 3, sample_parallel: 2}
training: {epochs: 5}
scaling: {num_workers: 2}
"""
CHEAP = ("--examples", "40", "--probes", "5")


@dataclass(frozen=True)
class Home:
    """$PHISAM_HOME with one finished run: `last` is of epoch 5, `best` of epoch 2."""

    path: Path
    run_id: str
    models: dict[str, str]
    last: nn.Module
    best: nn.Module

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def checkpoint(self) -> Path:
        return self.path / self.run_id / "checkpoint_5"

    @property
    def description(self) -> str:
        return str(self.path / self.run_id / "run.yaml")

    def logged(self, name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in MlflowClient(self.uri).get_metric_history(self.run_id, name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    (path / "described.yaml").write_text(DESCRIPTION)
    run = config.load(str(path / "described.yaml"))
    dataset = load_dataset(run.data, 0)
    last, best = (make_model(run.model, dataset.input_shape, 10, seed) for seed in (1, 2))
    tracker = Tracker.start(f"sqlite:///{path / 'mlflow.db'}", path, run, provenance(dataset.fingerprint))
    home = path / tracker.run_id
    (home / "checkpoint_5").mkdir(parents=True)
    (home / "run.yaml").write_text(config.dump_yaml(run))
    chosen = {"epoch": 2, "accuracy": 0.5, "loss": 1.0, "model": best.state_dict()}
    state = {"epoch": 5, "model": last.state_dict(), "optimizer": {}, "scaler": None, "best": chosen}
    checkpoint.save(home / "checkpoint_5", state, [])
    train.log_models(run, dataset, tracker, state)
    tracker.finish("FINISHED")
    return Home(path, tracker.run_id, tracker.models(), last, best)


@pytest.fixture
def home(made: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Home:
    monkeypatch.setenv("PHISAM_HOME", str(made.path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def same_weights(found: Any, model: nn.Module) -> bool:
    return all(torch.equal(found.weights[name], value) for name, value in model.state_dict().items())


def test_a_model_is_found_by_run_uri_checkpoint_and_file(home: Home) -> None:
    torch.save(home.best.state_dict(), "weights.pt")
    described = config.load(home.description)
    version = SweepTracker(home.uri, home.run_id).register("digits", home.run_id, "best", {})
    for what, which, run, model, epoch in [
        (home.run_id, "last", None, home.last, 5),
        (home.run_id[:8], "best", None, home.best, 2),
        ("digits-small", "last", None, home.last, 5),
        (f"models:/{home.models['best']}", "last", None, home.best, 2),
        (f"models:/digits/{version}", "last", None, home.best, 2),
        ("models:/digits@champion", "last", None, home.best, 2),
        (str(home.checkpoint), "last", None, home.last, 5),
        (str(home.checkpoint / "state.pt"), "best", None, home.best, 2),
        ("weights.pt", "last", described, home.best, None),
    ]:
        found = find_model(what, which, run)
        assert same_weights(found, model), what
        assert (found.epoch, found.config) == (epoch, described), what
        assert found.run_id == (None if what == "weights.pt" else home.run_id), what


def test_numbers_are_printed_with_errors_and_logged_at_the_models_epoch(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [home.run_id, "--model", "best", "--measures", "trace,measure,top_eigenvalues", "--top-k", "2", *CHEAP]
    assert cli.main(["sharpness", *asked]) == 0
    printed = capsys.readouterr().out
    for name in ("trace", "S_frobenius", "top_eigenvalue", "top_eigenvalue_2"):
        ((step, value),) = home.logged(f"hessian/{name}")
        ((_, error),) = home.logged(f"hessian/{name}.standard_error")
        assert step == 2
        assert re.search(rf"{name} +{re.escape(f'{value:.6g}')} +{re.escape(f'{error:.2g}')} ", printed), printed
    assert "40 training examples of digits" in printed


def test_a_budget_chooses_the_probes(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for budget in ("0.001s", "3s"):
        assert cli.main(["sharpness", home.run_id, "--measures", "trace", "--examples", "40", "--budget", budget]) == 0
        counts.append(int(capsys.readouterr().out.split("trace ")[1].split()[3]))
    assert counts[0] == 3
    assert counts[1] > 25
    assert [_seconds(text) for text in ("60s", "2m", "1.5h", "7")] == [60, 120, 5400, 7]


def test_a_spectral_density_is_kept_as_numbers_and_pictures(home: Home) -> None:
    asked = [home.run_id, "--measures", "spectral_density", "--examples", "20", "--lanczos-probes", "2"]
    assert cli.main(["sharpness", *asked]) == 0
    folder = Path(MlflowClient(home.uri).get_run(home.run_id).info.artifact_uri.removeprefix("file://")) / "sharpness"
    assert sorted(path.suffix for path in folder.glob("spectral_density-epoch5.*")) == [".csv", ".png", ".svg"]
    header, *rows = (folder / "spectral_density-epoch5.csv").read_text().splitlines()
    assert header == "probe,node,weight"
    for probe in ("0", "1"):
        weights = [float(row.split(",")[2]) for row in rows if row.startswith(f"{probe},")]
        assert sum(weights) == pytest.approx(1)


def test_batch_norm_is_said_to_be_in_evaluation_mode(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    Path("convnet.yaml").write_text(DESCRIPTION.replace("{name: mlp, width: 8, depth: 1}", "convnet"))
    Path("convnet.yaml").write_text(
        Path("convnet.yaml").read_text().replace("model: convnet", "model: {name: convnet}")
    )
    run = config.load("convnet.yaml")
    torch.save(make_model(run.model, (1, 8, 8), 10, 0).state_dict(), "weights.pt")
    asked = ["weights.pt", "--run", "convnet.yaml", "--measures", "trace", "--examples", "8", "--probes", "3"]
    assert cli.main(["sharpness", *asked]) == 0
    printed = capsys.readouterr().out
    assert "BatchNorm: measured in evaluation mode" in printed
    assert "not logged: no MLflow run is known" in printed


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_file_is_executed(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Payload()}, "weights.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Payload()))
    folder = Path("checkpoint")
    folder.mkdir()
    shutil.copy("weights.pt", folder / "state.pt")
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  state.pt\n")
    for path in ("weights.pt", "plain.pt", "checkpoint"):
        assert cli.main(["sharpness", path, "--run", home.description]) == 1
        told = "the checkpoint cannot be read" if path == "checkpoint" else "holds more than tensors"
        assert told in capsys.readouterr().err
    assert not Path("executed").exists()


@pytest.mark.parametrize("command", ["sharpness", "landscape"])
def test_a_function_that_only_mlflow_names_is_not_called(
    home: Home, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs_here.py").write_text(
        "from pathlib import Path\nimport phisam\n"
        "def mine(path):\n    Path(path).touch()\n    return phisam.frobenius()\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    text = DESCRIPTION.replace("measure: frobenius", "measure: {name: 'theirs_here:mine', options: {path: called}}")
    Path("run.yaml").write_text(text)
    MlflowClient(home.uri).log_artifact(home.run_id, "run.yaml")
    asked = [command, home.run_id, "--examples", "20"]
    asked += ["--measures", "measure", "--probes", "3"] if command == "sharpness" else ["--points", "3"]
    folder = home.path / home.run_id
    before = (folder / "run.yaml").read_text()
    try:
        assert cli.main(asked) == 2
        assert "theirs_here:mine is your own function, or somebody else's" in capsys.readouterr().err
        artifacts = MlflowClient(home.uri).get_run(home.run_id).info.artifact_uri.removeprefix("file://")
        for elsewhere in (str(Path.cwd()), artifacts):
            assert Path(elsewhere, "run.yaml").exists()
            MlflowClient(home.uri).set_tag(home.run_id, "phisam.folder", elsewhere)
            assert cli.main(asked) == 2, "MLflow's tag names a folder that is none of ours"
        (folder / "run.yaml").write_text(text.replace("path: called", "path: other"))
        assert cli.main(asked) == 2, "with other options"
        assert not Path("called").exists()
        assert cli.main([*asked, "--run", "run.yaml"]) == 0, "read by the user"
        trial = home.path / "sweep" / "trial_0"
        trial.mkdir(parents=True)
        (trial / "run.yaml").write_text(text)
        MlflowClient(home.uri).set_tag(home.run_id, "phisam.folder", str(trial))
        assert cli.main(asked) == 0, "the user's own trial"
        (folder / "run.yaml").write_text(text)
        MlflowClient(home.uri).delete_tag(home.run_id, "phisam.folder")
        assert cli.main(asked) == 0, "the user's own run"
        assert Path("called").exists() == (command == "sharpness")
    finally:
        (folder / "run.yaml").write_text(before)
        MlflowClient(home.uri).log_artifact(home.run_id, str(folder / "run.yaml"))
        shutil.rmtree(home.path / "sweep", ignore_errors=True)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nothing"], 1, "no run 'nothing' in MLflow"),
        (["./nothing"], 1, "./nothing: there is no such checkpoint"),
        (["models:/m-0"], 1, "Logged model with ID 'm-0' not found"),
        (["models:/digits"], 2, "a model's URI is models:/m-ID, models:/NAME/VERSION or models:/NAME@ALIAS"),
        (["weights.pt"], 2, "nothing beside it says which network and data it is of"),
        (["weights.pt", "--run", "mnist5k-frob"], 1, "the weights are of another architecture than the run's model"),
        (["list.pt", "--run", "mnist5k-frob"], 1, "this is no state_dict"),
        (["RUN", "--measures", "traces"], 2, "Did you mean 'trace'?"),
        (["RUN", "--probes", "2"], 2, "probes: must be an integer >= 3, not 2"),
        (["RUN", "--probes", "9", "--budget", "1s"], 2, "--probes does not go with it"),
        (["RUN", "--set", "optimizer.measure=sgd", "--measures", "measure"], 2, "sgd has none"),
        (["RUN", "--set", "training.seed=1"], 1, "it was trained on data with fingerprint"),
    ],
)
def test_mistakes_are_told(
    home: Home, arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(home.last.state_dict(), "weights.pt")
    torch.save([1, 2], "list.pt")
    arguments = [home.run_id if word == "RUN" else word for word in arguments]
    assert cli.main(["sharpness", *arguments]) == code
    assert told in capsys.readouterr().err


def test_two_workers_measure_as_one_does(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """Two on Ray, as a user starts it."""
    arguments = ["sharpness", home.run_id, "--measures", "frobenius_squared,top_eigenvalues", *CHEAP]
    assert cli.main(arguments) == 0
    assert "on 1 worker(s)" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", *arguments, "--num-workers", "2"],
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 worker(s)" in done.stdout
    (_, one), (_, two) = home.logged("hessian/frobenius_squared")[-2:]
    assert two == pytest.approx(one, rel=1e-10)
    (_, one), (_, two) = home.logged("hessian/top_eigenvalue")[-2:]
    assert two == pytest.approx(one, rel=1e-6)
    assert not list(home.path.glob("sharpness-*"))
