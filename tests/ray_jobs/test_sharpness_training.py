"""`sharpness:` in a run: what is logged, that training is not touched, and that a resumed run logs the same.

`train_loop` itself runs here on gloo processes; what it asks of Ray Train is replaced.
"""

from __future__ import annotations

import shutil
import time as worker_time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from phisam import sharpness
from ray_jobs import checkpoint, checkpoints, config, saving, train, worker
from ray_jobs.data import load_dataset
from ray_jobs.errors import ConfigError
from ray_jobs.models import make_model
from ray_jobs.sharpness import training
from ray_jobs.sharpness.measuring import check_measurable, measured, measuring_batches
from tests.phisam import gloo
from tests.ray_jobs import loop

MEASURES = ["frobenius_squared", "trace", "measure", "top_eigenvalues", "log_determinant", "ggn_log_determinant"]
MEASURED = {"measures": MEASURES, "probes": 6, "lanczos_probes": 2, "examples": 24, "every": 2, "delta": [0.01]}


def described(measuring: dict[str, Any] | None, **sections: Any) -> config.RunConfig:
    run = {
        "name": "x",
        "data": {"name": "digits", "fraction": 0.2},
        "model": {"name": "mlp", "width": 4, "depth": 2},
        "optimizer": {"measure": "frobenius", "rho": 0.03, "lam": 1e-3, "n_samples": 3, "base": {"name": "adam"}},
        "training": {"epochs": 3, "batch_size": 32},
        "sharpness": measuring,
        **sections,
    }
    return config.RunConfig.model_validate(run)


def trained(run: config.RunConfig, folder: str, rank: int) -> dict[str, Any]:
    """The loop on this gloo process: what it reported, its last weights, and what a person was told."""
    reported, told = loop.trained(run, Path(folder))
    newest = checkpoints.newest(Path(folder))
    assert newest is not None
    state = checkpoint.load(newest)["model"] if rank == 0 else {}
    return {"reported": reported, "model": state, "warnings": told}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run with `sharpness` on two processes, and its checkpoints."""
    folder = tmp_path_factory.mktemp("measured")
    ranks = gloo.run(2, partial(trained, described(MEASURED), str(folder)))
    return ranks[0], folder


def hessian_of(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("hessian/")}


def test_measures_come_with_their_errors_in_the_epochs_that_are_due(on_two: tuple[dict[str, Any], Path]) -> None:
    names = ["frobenius_squared", "trace", "S_frobenius", "top_eigenvalue", "log_determinant_0.01"]
    names += ["ggn_log_pseudo_determinant"]
    expected = {f"hessian/{name}{ending}" for name in names for ending in ("", ".standard_error")}
    first, second, third = on_two[0]["reported"]
    assert hessian_of(first) == {}
    assert "sharpness_seconds" not in first
    for metrics in (second, third):  # every second epoch, and the last
        assert set(hessian_of(metrics)) == expected
        assert metrics["sharpness_seconds"] > 0
    assert second["hessian/trace"] != third["hessian/trace"]


def test_the_time_that_measuring_takes_is_not_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a measurement that is said to take a thousand seconds."""
    offset = 0.0

    class Clock:
        def __getattr__(self, name: str) -> Any:
            return getattr(worker_time, name)

        def perf_counter(self) -> float:
            return worker_time.perf_counter() + offset

    def slow(*arguments: Any, **named: Any) -> Any:
        nonlocal offset
        offset += 1000
        return measured(*arguments, **named)

    monkeypatch.setattr(saving, "time", Clock())
    monkeypatch.setattr(training, "time", Clock())
    monkeypatch.setattr(training, "measured", slow)
    run = described({"measures": ["trace"], "probes": 3, "examples": 8})
    with loop.alone():
        reported = trained(run, str(tmp_path), 0)["reported"]
    assert all(metrics["sharpness_seconds"] >= 1000 for metrics in reported)
    assert reported[-1]["seconds"] < 1000


@pytest.mark.parametrize("model", [{"name": "mlp", "width": 4, "depth": 2}, {"name": "convnet"}])
def test_measuring_does_not_change_the_training(model: dict[str, Any], tmp_path: Path) -> None:
    """The weights, BatchNorm's statistics among them, and the generators' state are bit-equal."""
    results = []
    cheap = {"measures": ["frobenius_squared", "trace", "measure"], "probes": 3, "examples": 16}
    for measuring in (None, cheap):
        folder = tmp_path / str(measuring is None)
        with loop.alone():
            torch.manual_seed(3)
            found = trained(described(measuring, model=model, training={"epochs": 2}), str(folder), 0)
        results.append((found, torch.get_rng_state()))
    (without, state), (measured_too, state_too) = results
    assert torch.equal(state, state_too)
    assert hessian_of(measured_too["reported"][0])
    assert without["model"].keys() == measured_too["model"].keys()
    for name, value in without["model"].items():
        assert torch.equal(value, measured_too["model"][name]), name
    for one, other in zip(without["reported"], measured_too["reported"], strict=True):
        assert one["loss/train"] == other["loss/train"]
        assert one["accuracy/test"] == other["accuracy/test"]


def test_a_resumed_run_measures_the_same_bit_for_bit(on_two: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    undisturbed, folder = on_two
    second, third = checkpoints.present(folder)
    shutil.copytree(second, tmp_path / second.name)
    resumed = gloo.run(2, partial(trained, described(MEASURED), str(tmp_path)))[0]
    assert hessian_of(resumed["reported"][-1]) == hessian_of(undisturbed["reported"][-1])
    history = checkpoint.load_history(tmp_path / third.name)
    assert [hessian_of(metrics) for metrics in history] == [hessian_of(metrics) for metrics in undisturbed["reported"]]


def test_one_process_measures_a_checkpoint_as_two_did_in_training(on_two: tuple[dict[str, Any], Path]) -> None:
    run = described(MEASURED)
    found, folder = on_two
    dataset = load_dataset(run.data, 0)
    model = make_model(run.model, dataset.input_shape, dataset.num_classes, 0)
    model.load_state_dict(checkpoint.load(checkpoints.present(folder)[-1])["model"])
    assert run.sharpness is not None
    batches = measuring_batches(dataset, run.sharpness.examples, 0)
    again = measured(model, batches, run.sharpness, worker.make_measure(run.optimizer), 0).metrics()
    logged = hessian_of(found["reported"][-1])
    assert again.keys() == logged.keys()
    for name, value in logged.items():
        if name != "hessian/top_eigenvalue.standard_error":  # a residual: the size of rounding
            assert again[name] == pytest.approx(value, rel=1e-6), name


def test_examples_are_the_seeds_and_no_others() -> None:
    dataset = load_dataset(config.DataConfig(name="digits"), 0)
    first, again, other = (measuring_batches(dataset, 200, seed) for seed in (0, 0, 1))
    assert [len(labels) for _, labels in first] == [128, 72]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    everything = measuring_batches(dataset, 10**6, 0)
    labels = torch.cat([labels for _, labels in everything])
    assert torch.equal(labels.bincount(), dataset.train.labels.bincount())


def test_the_estimates_are_those_of_the_library_on_the_dense_hessian() -> None:
    run = described({**MEASURED, "probes": 400, "measures": ["frobenius_squared", "trace", "top_eigenvalues"]})
    dataset = load_dataset(run.data, 0)
    model = make_model(run.model, dataset.input_shape, dataset.num_classes, 0)
    assert run.sharpness is not None
    batches = measuring_batches(dataset, 24, 0)
    found = measured(model, batches, run.sharpness, worker.make_measure(run.optimizer), 0)
    H = sharpness.Hessian(model, cross_entropy, batches).dense()
    exact = [float(torch.linalg.eigvalsh(H)[-1]), float(H.square().sum()), float(H.trace())]
    assert [estimate.name for estimate in found.estimates] == ["top_eigenvalue", "frobenius_squared", "trace"]
    for estimate, value in zip(found.estimates, exact, strict=True):
        assert abs(estimate.value - value) <= 4 * estimate.standard_error + 1e-8


def test_a_model_that_cannot_be_measured_warns_and_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise sharpness.Unmeasurable("its variance is infinite")

    monkeypatch.setattr(training, "measured", refuse)
    with loop.alone():
        found = trained(described(MEASURED), str(tmp_path), 0)
    assert len(found["reported"]) == 3
    assert all(hessian_of(metrics) == {} for metrics in found["reported"])
    assert any("epoch 2: sharpness is not measured: its variance is infinite" in str(w) for w in found["warnings"])


def test_what_cannot_be_measured_is_refused_before_training() -> None:
    class Rounded(torch.nn.Module):
        """torch has no second derivative of the fused attention; any function without one will do."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = _Once.apply(self.layer(images.flatten(1)))
            return logits

    class _Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    dataset = load_dataset(config.DataConfig(name="digits"), 0)
    with pytest.raises(ConfigError, match=r"sharpness cannot be measured: .*autograd\.Function"):
        check_measurable(Rounded(), dataset, config.SharpnessConfig())
    run = described({"measures": ["ggn_log_determinant"], "examples": 500}, data={"name": "digits"})
    with pytest.raises(ConfigError, match=r"= 4096 at most, not 5000: set sharpness.examples to 409"):
        train.check_fit(run, dataset)


def _mistake(refused: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as found:
        refused()
    return str(found.value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("every=0", "sharpness.every: must be an integer >= 1 or text such as 5 epochs, not 0"),
        ("every=2 steps", "sharpness.every: must be a number of epochs, such as 1 epoch or 5 epochs, not '2 steps'"),
        ("measures=[traces]", "Did you mean 'trace'?"),
        ("measures=[trace, trace]", "sharpness.measures: must name each once, not trace, trace"),
        ("measures=[spectral_density]", "phisam sharpness RUN_ID --measures spectral_density"),
        ("probes=2", "sharpness.probes: must be an integer >= 3, not 2"),
        ("probe=20", "sharpness.probe: unknown key (value 20). Did you mean 'probes'?"),
        ("measures=[measure]", "sharpness.measures: measure is S(x) of the run's own measure, and sgd has none"),
    ],
)
def test_mistakes_in_the_section_are_told(setting: str, told: str) -> None:
    assert told in _mistake(lambda: config.load("mnist5k-sgd", [f"sharpness.{setting}"]))


def test_epochs_are_told_as_a_number_or_in_words() -> None:
    sections = [config.load("mnist5k-sgd", [f"sharpness.every={every}"]).sharpness for every in ("5 epochs", "5")]
    assert [section.every for section in sections if section] == [5, 5]
    assert config.load("mnist5k-sgd").sharpness is None
