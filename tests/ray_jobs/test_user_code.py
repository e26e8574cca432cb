"""Functions of the user's own: found, checked, called, and what is said of each mistake before a worker starts."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import phisam
from ray_jobs import cli, config, train, user_code
from ray_jobs.data import load_dataset
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.models import make_model
from ray_jobs.sweep.config import load_sweep
from ray_jobs.sweep.cost import evaluations_per_step, steps_per_epoch
from ray_jobs.user_code import OwnCode, OwnFunction
from ray_jobs.worker import make_measure

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "own_code"

MODULE = """\
import numpy as np, random, torch, phisam
from torch import nn

def make(input_shape, num_classes, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes))

def drawn(input_shape, num_classes):
    net = make(input_shape, num_classes)
    with torch.no_grad():
        net[1].bias[0], net[1].bias[1] = random.random(), np.random.rand()
    return net

def divides(input_shape, num_classes):
    zero = 0
    return 1 / zero  # here

def not_a_net(input_shape, num_classes): return "net"
def half(input_shape, num_classes): return make(input_shape, num_classes).half()
def one_logit(input_shape, num_classes): return make(input_shape, 1)
def frozen(input_shape, num_classes): return make(input_shape, num_classes).requires_grad_(False)
def bad_forward(input_shape, num_classes): return nn.Linear(3, num_classes)

def mine(k=2.0): return phisam.Measure(lambda t: t**k, lambda t: t, phisam.gaussian())
def nan(): return phisam.Measure(lambda t: t * float("nan"), lambda t: t, phisam.gaussian())
def per_component(): return phisam.Measure(lambda t: t[0] * t[1], lambda t: (t, t**2), [phisam.gaussian()] * 2)
def no_measure(): return lambda losses: losses

def load(seed, n=60, labels=None, images=None, parts=2, root=None, test_labels=None):
    y = torch.arange(n) % 3 if labels is None else torch.tensor(labels)
    x = torch.zeros(n, 1, 4, 4, dtype=torch.uint8) if images is None else eval(images)
    test = y if test_labels is None else torch.tensor(test_labels)
    return {1: x, 2: ((x, y), (x, test)), 3: ((x, y), (x[:6], y[:6]), (x, test))}[parts]
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a package `theirs` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").touch()
    (tmp_path / "theirs" / "code.py").write_text(MODULE)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("theirs", "my_pkg", "broken"):
            del sys.modules[name]


def run(*overrides: str) -> config.RunConfig:
    smaller = ("training.batch_size=10", "training.epochs=1", "scaling.num_workers=1")
    return config.load("digits-sgd", [*smaller, *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as told:
        train.checked(run(*overrides))
    return str(told.value)


# found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("their.code:make", "there is no module their. Did you mean 'theirs'? Looked in the current directory, "),
        ("theirs.codes:make", "there is no module theirs.codes. Did you mean 'theirs.code'?"),
        ("theirs.code.nets:make", "there is no module theirs.code.nets."),
        ("theirs.code:maek", "code.py has no 'maek'. Did you mean 'make'?"),
        ("theirs.code:number", "number is 3, which cannot be called: name a function"),
    ],
)
def test_what_is_not_there_is_told_with_the_nearest_name(folder: Path, name: str, said: str) -> None:
    told = refusal(f"model={name}")
    assert told.startswith(f"model.name = {name}: ")
    assert said in told


@pytest.mark.parametrize(
    ("text", "said"), [("import absent_package", "absent_package"), ("x = = 1", "broken.py:1: x = = 1")]
)
def test_a_module_that_cannot_be_imported_is_told_with_its_line(folder: Path, text: str, said: str) -> None:
    (folder / "broken.py").write_text(text)
    told = refusal("model=broken:make")
    assert "it raised" in told
    assert said in told


def test_arguments_that_a_function_does_not_take_are_told_with_its_definition(folder: Path) -> None:
    told = refusal("model=theirs.code:make", "model.options.widht=3")
    assert "called with (input_shape, num_classes, widht=3), but got an unexpected keyword argument 'widht'" in told
    assert "Did you mean 'width'? It is defined as make(input_shape, num_classes, width=8) in " in told
    assert "code.py:4" in told
    assert "it is called with (seed), but too many positional arguments" in refusal("data=theirs.code:nan")


def test_what_is_raised_inside_is_told_with_the_users_line_and_the_traceback_on_demand(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal("model=theirs.code:divides")
    assert "it raised ZeroDivisionError: division by zero at " in told
    assert "code.py:15: return 1 / zero  # here" in told
    command = ["plan", "digits-sgd", "--gpus", "1", "--set", "model=theirs.code:divides"]
    assert cli.main(command) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main([*command, "--verbose"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("phisam: model.name = theirs.code:divides: it raised")


# called


def test_initial_weights_depend_on_the_seed_alone_and_no_generator_is_disturbed(folder: Path) -> None:
    settings = config.ModelConfig(name="theirs.code:drawn")

    def weights(seed: int) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(make_model(settings, (1, 2, 2), 3, seed).parameters())

    first = weights(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(weights(3), first)
    assert not torch.isclose(weights(4), first).any()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    weights(5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("not_a_net", "it must return a torch.nn.Module, not 'net'"),
        ("half", "1.weight is float16 on cpu; return the network in float32 on the CPU"),
        ("one_logit", "for images (2, 1, 8, 8) its network must return logits (2, 10), not (2, 1)"),
        ("frozen", "its network has no parameter that can be trained"),
        ("bad_forward", "it raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_what_is_no_network_for_the_data_is_refused(folder: Path, function: str, said: str) -> None:
    assert said in refusal(f"model=theirs.code:{function}")


def test_an_own_measure_weighs_as_it_does_in_the_library(folder: Path) -> None:
    measure = make_measure(run("optimizer.measure={name: theirs.code:mine, options: {k: 3.0}}").optimizer)
    losses = torch.tensor([1.0, 1.5, 0.7], dtype=torch.float64)
    expected = phisam.Measure(lambda t: t**3, lambda t: t, phisam.gaussian())
    assert torch.equal(measure.weights(losses, 0.5, 0.3), expected.weights(losses, 0.5, 0.3))
    with_noise = make_measure(run("optimizer.measure=theirs.code:mine", "optimizer.noise=sphere").optimizer)
    assert with_noise.noises[0].name == "sphere"


def test_what_is_no_measure_is_refused(folder: Path) -> None:
    assert "it must return a phisam.Measure" in refusal("optimizer.measure=theirs.code:no_measure")
    assert "must be finite and sum to 1" in refusal("optimizer.measure=theirs.code:nan")


def test_a_sweep_pays_for_all_points_of_an_own_measure(folder: Path) -> None:
    optimizer = run("optimizer.measure=theirs.code:per_component", "optimizer.n_samples=3").optimizer
    assert evaluations_per_step(optimizer) == 7
    assert evaluations_per_step(run("optimizer.measure=theirs.code:mine", "optimizer.n_samples=3").optimizer) == 4


# data


def data(**options: Any) -> config.DataConfig:
    return config.DataConfig(name="theirs.code:load", options=options)


def test_own_splits_are_taken_as_they_are(folder: Path) -> None:
    two, three = load_dataset(data(), 0), load_dataset(data(parts=3), 0)
    assert [len(split) for split in (two.train, two.validation, two.test)] == [54, 6, 60]
    assert [len(split) for split in (three.train, three.validation, three.test)] == [60, 6, 60]
    assert (two.input_shape, two.num_classes, two.train.labels.dtype) == ((1, 4, 4), 3, torch.int64)
    batch = "training.batch_size=10"
    assert steps_per_epoch(run("data=theirs.code:load", batch)) == 5
    assert steps_per_epoch(run("data={name: theirs.code:load, options: {parts: 3}}", batch)) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": 1}, "it must return (train, test) or (train, validation, test)"),
        ({"images": "torch.zeros(n, 1, 4, 4)"}, "the images of train are float32, and must be uint8"),
        (
            {"images": "torch.zeros(n, 4, 4, dtype=torch.uint8)"},
            "must be (N, C, H, W); for grey images: images[:, None]",
        ),
        ({"images": "torch.zeros(7, 1, 4, 4, dtype=torch.uint8)"}, "train has 7 images and 60 labels"),
        ({"images": "'picture'"}, "the images of train are str"),
        (
            {"n": 4, "labels": [1, 2, 3, 3]},
            "the labels of train go from 1 to 3 and are 3 different ones; 0 is not there",
        ),
        ({"n": 4, "labels": [0, 2, 2, 0]}, "1 is not there"),
        ({"n": 4, "labels": [0, 0, 0, 0]}, "two at least"),
        ({"n": 4, "labels": [0.0, 1.0, 0.0, 1.0]}, "the labels of train are float32 (4,), and must be integers (N,)"),
        ({"n": 4, "labels": [0, 1, 0, 1], "test_labels": [0, 1, 2, 1]}, "the labels of test go from 0 to 2"),
    ],
)
def test_what_are_no_examples_is_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_dataset(data(**options), 0)
    assert str(told.value).startswith("data.name = theirs.code:load: ")
    assert said in str(told.value)


def test_root_reaches_the_function_as_an_absolute_path(folder: Path) -> None:
    described = run("data=theirs.code:load", "data.root=files")
    assert user_code.data_function(described.data).options["root"] == folder / "files"
    load_dataset(described.data, 0)


def test_a_worker_with_other_data_than_the_driver_refuses(folder: Path) -> None:
    driver = load_dataset(data(), 0).fingerprint
    assert load_dataset(data(), 0, driver).fingerprint == driver
    with pytest.raises(RunError, match="All workers need the same examples"):
        load_dataset(data(n=63), 0, driver)


# the files


def test_a_worker_finds_the_code_where_the_driver_did_and_says_that_it_changed(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    described = run("model=theirs.code:make")
    train.checked(described)
    settings = OwnCode.of(described).settings()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(folder)])
    del sys.modules["theirs"], sys.modules["theirs.code"]
    with pytest.raises(ConfigError, match="there is no module theirs"):
        train.checked(described)
    user_code.arrive(described, settings)
    train.checked(described)
    assert not caplog.records
    (folder / "theirs" / "helper.py").write_text("x = 1")
    user_code.arrive(described, settings)
    assert "your own code has changed since the run began" in caplog.text


def test_a_run_without_own_code_has_no_fingerprint() -> None:
    assert OwnCode.of(run()) == OwnCode((), "")
    assert OwnCode.of(run()).tags() == {}


# commands


def test_validate_looks_for_the_functions_and_does_not_call_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate", "digits-sgd", "--set", "model=theirs.code:divides"]) == 0
    assert "name: theirs.code:divides" in capsys.readouterr().out
    assert cli.main(["validate", "digits-sgd", "--set", "model=theirs.code:divide"]) == 2
    assert "Did you mean 'divides'?" in capsys.readouterr().err


def test_a_sweep_chooses_among_own_functions_and_their_options(folder: Path) -> None:
    Path("sweep.yaml").write_text(
        "name: own\nrun: digits-sgd\nset: {training.batch_size: 10, data: 'theirs.code:load'}\nspace:\n"
        "  model: {grid: ['theirs.code:make', mlp]}\n"
        "  model.options.width: {grid: [4, 8], when: {model: 'theirs.code:make'}}\n"
    )
    sweep = load_sweep("sweep.yaml")
    runs = [
        sweep.trial(values, 0) for values in ({"model": "theirs.code:make", "model.options.width": 4}, {"model": "mlp"})
    ]
    assert [each.model.name for each in runs] == ["theirs.code:make", "mlp"]
    assert runs[0].model.options == {"width": 4}
    for each in runs:
        train.checked(each)


# the example


def test_the_example_trains_on_ray_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two workers in another directory: they find my_pkg where the driver did, and the run's tags know its code."""
    import ray

    monkeypatch.chdir(EXAMPLE)
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    described = config.load("own.yaml", ["training.epochs=4"])
    dataset = train.prepared(described)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        summary = train.train(described, Console(quiet=True), dataset)
    finally:
        ray.shutdown()
    assert summary.history[-1]["accuracy/test"] > 0.6  # chance is 0.25
    tags = train.find_run(f"sqlite:///{tmp_path / 'mlflow.db'}", summary.run_id).data.tags
    assert tags["code.fingerprint"] == OwnCode.of(described).fingerprint != ""


def test_a_description_cannot_name_what_python_itself_can_do(tmp_path: Path) -> None:
    """os:system with a command as its option ran it, and complained afterwards that it made no network."""
    there = tmp_path / "there"
    own = OwnFunction("model", "os:system", {"command": f"touch {there}"})
    with pytest.raises(ConfigError, match="os is a module of Python itself"):
        own.call(0)
    assert not there.exists()
