"""A run description is read strictly, and a mistake is told with place, key, value, what is allowed, what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_jobs import config
from ray_jobs.errors import ConfigError

MINIMAL = """\
name: mine
data: {name: digits}
model: {name: mlp}
optimizer:
  measure: trace
training: {epochs: 3}
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def error_of(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(source, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", config.recipe_names())
def test_recipes_are_valid_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    loaded = config.load(name)
    assert loaded.name == name
    assert loaded.description
    assert config.load(write(tmp_path, config.dump_yaml(loaded))) == loaded
    assert config.from_dict(loaded.model_dump(mode="json")) == loaded
    jsonschema.validate(yaml.safe_load(config.dump_yaml(loaded)), config.json_schema())


def test_the_strength_that_a_recipe_states_is_its_strength() -> None:
    assert config.load("mnist5k-frob").optimizer.strength == pytest.approx(1e-6, rel=0.01)
    assert config.load("mnist5k-trace").optimizer.strength == pytest.approx(9e-4)


def test_short_forms_and_scientific_notation(tmp_path: Path) -> None:
    text = MINIMAL.replace("measure: trace", "measure: {name: trace}\n  noise: gaussian\n  rho: 1e-3\n  lam: 1")
    loaded = config.load(write(tmp_path, text))
    assert loaded.optimizer.measure.name == "trace"
    assert loaded.optimizer.noise is not None
    assert loaded.optimizer.rho == 0.001
    assert loaded.optimizer.lam == 1.0


def test_overrides_reach_into_short_forms() -> None:
    loaded = config.load("mnist5k-frob", ["optimizer.measure.unbiased=false", "optimizer.n_samples=1", "data.root=x"])
    assert loaded.optimizer.measure.model_dump() == {"name": "frobenius", "unbiased": False}
    assert loaded.data.root == Path.cwd() / "x"


def test_a_description_is_frozen() -> None:
    loaded = config.load("digits-sgd")
    with pytest.raises(ValueError, match="frozen"):
        loaded.optimizer.rho = 1.0  # type: ignore[misc]


def test_flat_keys_for_mlflow() -> None:
    flat = config.load("digits-frob").flat()
    assert flat["optimizer.measure.name"] == "frobenius"
    assert flat["optimizer.rho"] == 0.03
    assert "data.root" not in flat


@pytest.mark.parametrize(
    ("line", "replacement", "told"),
    [
        ("name: mine", "nam: mine", ":1: nam: unknown key (did you mean 'name'?), value 'mine'; allowed here: name, "),
        (
            "data: {name: digits}",
            "data: {name: digitz}",
            ":2: data.name: 'digitz' is not known (did you mean 'digits'?)",
        ),
        (
            "data: {name: digits}",
            "data: {name: digits, fraction: 2}",
            ":2: data.fraction: 2 is not allowed: it must be",
        ),
        ("model: {name: mlp}", "model: {name: mpl}", ":3: model: unknown model 'mpl' (did you mean 'mlp'?); allowed:"),
        ("  measure: trace", "  measure: trase", ":5: optimizer.measure: 'trase' is not known (did you mean 'trace'?)"),
        (
            "  measure: trace",
            "  measure: 3",
            ":5: optimizer.measure: 3 is no section with a name; allowed names: trace,",
        ),
        (
            "  measure: trace",
            "  measure: {name: trace, unbiased: true}",
            ":5: optimizer.measure.unbiased: belongs to frobenius, not to trace (value True); allowed here: name",
        ),
        ("  measure: trace", "  measure: {name: exp_product}", ":5: optimizer.measure.sigma: is missing"),
        ("  measure: trace", "  measure: trace\n  rho: -1", ":6: optimizer.rho: -1 is not allowed: it must be greater"),
        ("  measure: trace", "  measure: trace\n  rho: .inf", ":6: optimizer.rho: inf is not allowed"),
        (
            "  measure: trace",
            "  measure: trace\n  rho: '3'",
            ":6: optimizer.rho: '3' is not allowed: it must be a valid",
        ),
        ("  measure: trace", "  measure: trace\n  n_samples: true", ":6: optimizer.n_samples: True is not allowed"),
        ("  measure: trace", "  measure: trace\n  rhoo: 1", ":6: optimizer.rhoo: unknown key (did you mean 'rho'?)"),
        (
            "  measure: trace",
            "  measure: frobenius\n  n_samples: 1",
            "n_samples is 1, use 2 or more, or unbiased: false",
        ),
        (
            "training: {epochs: 3}",
            "training: {epochs: 3}\ntraining: {epochs: 4}",
            ":7: training: given twice, first in",
        ),
        ("training: {epochs: 3}", "", "training: is missing, and has no default"),
        ("training: {epochs: 3}", "training: {epochs: 3", "not valid YAML"),
        ("training: {epochs: 3}", "training: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, line: str, replacement: str, told: str) -> None:
    path = write(tmp_path, MINIMAL.replace(line, replacement))
    message = error_of(path)
    assert told in message
    assert message.startswith(path)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, MINIMAL.replace("epochs: 3", "epochs: 0").replace("mlp", "mpl")))
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.rhoo=1", "--set optimizer.rhoo=1: optimizer.rhoo: unknown key (did you mean 'rho'?), value 1"),
        ("optimizer.n_samples=1", "--set optimizer.n_samples=1: optimizer: frobenius with unbiased: true"),
        ("optimizer.rho.x=3", "--set optimizer.rho.x=3: optimizer.rho is 0.03, it has no setting 'x'"),
        ("optimizer.rho", "--set optimizer.rho: write it as key.path=value"),
        ("data.image_size=3", "image_size is for imagefolder alone; the images of mnist5k have their own size"),
        ("model.width={a: b", "not valid YAML"),
    ],
)
def test_mistakes_in_an_override(override: str, told: str) -> None:
    assert told in error_of("mnist5k-frob", override)


def test_a_name_that_is_neither_recipe_nor_file() -> None:
    message = error_of("mnist5k-frb")
    assert "'mnist5k-frb' is neither a recipe nor a file (did you mean 'mnist5k-frob'?)" in message
    with pytest.raises(ConfigError, match=r"no recipe 'digit-frob' \(did you mean 'digits-frob'\?\)"):
        config.recipe_text("digit-frob")


def test_a_missing_file_and_a_list_and_nothing(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(str(tmp_path / "absent.yaml"))
    assert "a run description is a mapping of sections, got [1]" in error_of(write(tmp_path, "[1]"))
    assert "a run description is a mapping of sections, got None" in error_of(write(tmp_path, ""))


def nested(depth: int) -> str:
    return "a: " + "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text",
    [
        nested(50),
        "a: &x [" + "1," * 200 + "]\nb: [" + "*x," * 100 + "]",  # an alias that multiplies
        "# " + "x" * (1 << 20),
    ],
    ids=["deep", "alias", "large"],
)
def test_bounds_on_what_is_read(tmp_path: Path, text: str) -> None:
    message = error_of(write(tmp_path, text))
    assert "more than 20 levels or 10000 entries" in message or "a run description has at most" in message


@pytest.mark.parametrize("text", ["\x00", "a: \x01", "? [1]\n: 2", "- &a *a", "a: *b", "%", "a:\n\tb: 1", "{1: 2}"])
def test_no_text_ends_in_a_traceback(tmp_path: Path, text: Any) -> None:
    assert error_of(write(tmp_path, text))
