"""Run descriptions: what is accepted, what an error says, and that writing and reading agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from ray_jobs import config
from ray_jobs.config import RunConfig, dump_yaml, from_dict, json_schema, load, recipe_names, recipe_text
from ray_jobs.errors import ConfigError

RECIPES = [
    "cifar10-frob",
    "digits-frob",
    "digits-sgd",
    "figure1",
    "frob-sharpness",
    "mnist5k-asam",
    "mnist5k-det",
    "mnist5k-frob",
    "mnist5k-sam",
    "mnist5k-sgd",
    "mnist5k-ssam",
    "mnist5k-trace",
    "start-here",
]

DESCRIPTION = """\
name: lines
data:
  name: digits
model:
  name: mlp
optimizer:
  base:
    name: adam
  measure: frobenius
  rho: 0.03
  n_samples: 3
training:
  epochs: 4
  batch_size: 64
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str | bytes, overrides: Sequence[str] = ()) -> RunConfig:
    Path("run.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load("run.yaml", overrides)


def errors(text: str | bytes, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, overrides)
    return str(caught.value).splitlines()


def changed(old: str, new: str) -> str:
    assert DESCRIPTION.count(old) == 1
    return DESCRIPTION.replace(old, new)


# (change of DESCRIPTION, what the one line of the error must start with, what it must name)
MISTAKES = {
    "unknown key": (("rho: 0.03", "rhoo: 0.1"), "run.yaml:10: optimizer.rhoo: ", ["0.1", "'rho'", "n_samples"]),
    "unknown section": (("training:", "trainin:\n  x: 1\ntraining:"), "run.yaml:12: trainin: ", ["'training'", "data"]),
    "other measure's key": (
        ("measure: frobenius", "measure: {name: frobenius, sigma: 0.5}"),
        "run.yaml:9: optimizer.measure.sigma: ",
        ["belongs to exp_product", "not to frobenius", "0.5", "unbiased"],
    ),
    "other base's key": (
        ("    name: adam", "    name: sgd\n    lr: 0.1\n    betas: [0.9, 0.99]"),
        "run.yaml:10: optimizer.base.betas: ",
        ["adam", "adamw", "sgd", "[0.9, 0.99]", "momentum"],
    ),
    "unknown measure": (
        ("measure: frobenius", "measure: frobenious"),
        "run.yaml:9: optimizer.measure",
        ["'frobenious'", "mean 'frobenius'", "trace", "eigen_power"],
    ),
    "unknown word": (("epochs: 4", "epochs: 4\n  precision: float"), "run.yaml:14: training.precision: ", ["float32"]),
    "unknown model": (("name: mlp", "name: mpl"), "run.yaml:", ["model", "'mpl'", "'mlp'", "resnet18", "torchvision/"]),
    "missing section": (("data:\n  name: digits\n", ""), "run.yaml:1: data: ", ["missing"]),
    "missing key": (("  epochs: 4\n", ""), "run.yaml:12: training.epochs: ", ["missing"]),
    "too small": (("epochs: 4", "epochs: 0"), "run.yaml:13: training.epochs: ", ["0", "1"]),
    "not finite": (("rho: 0.03", "rho: .inf"), "run.yaml:10: optimizer.rho: ", ["inf", "finite"]),
    "text for an int": (("epochs: 4", 'epochs: "3"'), "run.yaml:13: training.epochs: ", ["'3'", "integer"]),
    "float for an int": (("epochs: 4", "epochs: 4.0"), "run.yaml:13: training.epochs: ", ["4.0", "integer"]),
    "bool for an int": (("epochs: 4", "epochs: true"), "run.yaml:13: training.epochs: ", ["rue", "integer"]),
    "bool for a number": (("rho: 0.03", "rho: true"), "run.yaml:10: optimizer.rho: ", ["rue", "number"]),
    "in a list": (
        ("name: adam", "name: adam\n    betas: [0.9, true]"),
        "run.yaml:9: optimizer.base.betas",
        ["1", "rue", "number"],
    ),
    "samples for frobenius": (("n_samples: 3", "n_samples: 1"), "run.yaml:", ["n_samples", "1", "2", "unbiased"]),
    "noise for sam": (
        ("measure: frobenius", "measure: sam\n  noise: gaussian"),
        "run.yaml:10: optimizer.noise: ",
        ["null", "sam", "along the gradient", "trace"],
    ),
    "noise for sgd": (
        ("measure: frobenius", "measure: sgd\n  noise: {name: sphere, symmetric: true}"),
        "run.yaml:10: optimizer.noise: ",
        ["null", "sgd", "no perturbed point"],
    ),
    "half a pair": (
        ("measure: frobenius", "measure: frobenius\n  noise: {name: gaussian, antithetic: true}"),
        "run.yaml:12: optimizer.n_samples: ",
        ["even", "v, -v", "3", "4"],
    ),
    "too few early draws for frobenius": (
        ("n_samples: 3", "n_samples: 3\n  n_early: 1"),
        "run.yaml:12: optimizer.n_early: ",
        ["2 or more", "not 1", "unbiased"],
    ),
    "half an early pair": (
        (
            "measure: frobenius\n  rho: 0.03\n  n_samples: 3",
            "measure: trace\n  n_early: 3\n  n_samples: 4\n  noise: {name: gaussian, antithetic: true}",
        ),
        "run.yaml:10: optimizer.n_early: ",
        ["even", "v, -v", "3", "4"],
    ),
    "early draws of what draws nothing": (
        ("measure: frobenius", "measure: sam\n  n_early: 1"),
        "run.yaml:10: optimizer.n_early: ",
        ["null", "sam", "draws nothing"],
    ),
    "one pair for frobenius": (
        (
            "measure: frobenius\n  rho: 0.03\n  n_samples: 3",
            "measure: frobenius\n  rho: 0.03\n  n_samples: 2\n  noise: {name: gaussian, antithetic: true}",
        ),
        "run.yaml:11: optimizer.n_samples: ",
        ["4 or more", "2", "Hessian"],
    ),
    "pairs twice": (
        ("measure: frobenius", "measure: trace\n  noise: {name: gaussian, antithetic: true, symmetric: true}"),
        "run.yaml:10: optimizer.noise.antithetic: ",
        ["false", "symmetric", "twice"],
    ),
    "scaled without eta": (
        ("measure: frobenius", "measure: trace\n  noise: {name: gaussian, scaled: weight}"),
        "run.yaml:10: optimizer.noise.scaled: ",
        ["all", "adaptive"],
    ),
    "negative eta": (
        ("measure: frobenius", "measure: trace\n  noise: {name: gaussian, adaptive: -0.1}"),
        "run.yaml:10: optimizer.noise.adaptive: ",
        ["-0.1", ">= 0", "null"],
    ),
    "eta of another measure": (
        ("measure: frobenius", "measure: {name: ssam, eta: 0.1}"),
        "run.yaml:9: optimizer.measure.eta: ",
        ["asam", "ssam", "0.1", "sparsity"],
    ),
    "nothing left by the mask": (
        ("measure: frobenius", "measure: {name: ssam, sparsity: 1}"),
        "run.yaml:9: optimizer.measure.sparsity: ",
        ["1", ">= 0 and < 1"],
    ),
    "rho that ends at 0": (
        ("rho: 0.03", "rho: 0.03\n  rho_schedule: linear"),
        "run.yaml:11: optimizer.rho_schedule",
        ["min_factor", "more than 0", "0.1", "divides", "schedule lam"],
    ),
    "rho that ends at a written 0": (
        ("rho: 0.03", "rho: 0.03\n  rho_schedule: {name: cosine, min_factor: 0}"),
        "run.yaml:11: optimizer.rho_schedule.min_factor: ",
        ["more than 0", "0.1", "divides"],
    ),
    "a warm-up that does not end": (
        ("rho: 0.03", "rho: 0.03\n  lam_schedule: {name: constant, warmup_epochs: 4}"),
        "run.yaml:11: optimizer.lam_schedule.warmup_epochs: ",
        ["training.epochs = 4", "not 4"],
    ),
    "no part of the batch": (
        ("rho: 0.03", "perturb_fraction: 0"),
        "run.yaml:10: optimizer.perturb_fraction: ",
        ["> 0 and <= 1", "0"],
    ),
    "more than the batch": (
        ("rho: 0.03", "perturb_fraction: 1.5"),
        "run.yaml:10: optimizer.perturb_fraction: ",
        ["> 0 and <= 1", "1.5"],
    ),
    "every none": (("rho: 0.03", "every: 0"), "run.yaml:10: optimizer.every: ", [">= 1", "0"]),
    "no norm": (("rho: 0.03", "max_grad_norm: 0"), "run.yaml:10: optimizer.max_grad_norm: ", ["> 0", "null", "0"]),
    "no micro-batch": (
        ("epochs: 4", "epochs: 4\n  micro_batches: 0"),
        "run.yaml:14: training.micro_batches: ",
        [">= 1", "0"],
    ),
    "size of images": (("name: digits", "name: digits\n  image_size: 8"), "run.yaml:", ["image_size", "imagefolder"]),
    "key given twice": (("epochs: 4", "epochs: 4\n  epochs: 5"), "run.yaml:14: training.epochs: ", ["twice", "13"]),
    "no YAML": (("rho: 0.03", "rho: [0.03"), "run.yaml:", ["not valid YAML"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_names_the_line_the_key_the_value_and_what_is_allowed(folder: Path, mistake: str) -> None:
    change, start, named = MISTAKES[mistake]
    (line,) = errors(changed(*change))
    assert line.startswith(start)
    assert [word for word in named if word not in line.removeprefix(start.rpartition(": ")[0])] == []


def test_all_mistakes_of_a_file_come_together_in_the_order_of_its_lines(folder: Path) -> None:
    text = changed("rho: 0.03", "rhoo: 0.1").replace("epochs: 4", "epochs: 0").replace("name: digits", "name: digit")
    assert [line.split(": ")[0] for line in errors(text)] == ["run.yaml:3", "run.yaml:10", "run.yaml:13"]


@pytest.mark.parametrize(
    ("override", "key", "named"),
    [
        ("optimizer.rhoo=0.1", "optimizer.rhoo", ["'rho'"]),
        ("optimizer.rho=-1", "optimizer.rho", ["-1", "0"]),
        ("training.epochs=abc", "training.epochs", ["'abc'", "integer"]),
        ("optimizer.measure.sigma=1", "optimizer.measure.sigma", ["exp_product"]),
        ("optimizer.measure=frobeniu", "optimizer.measure", ["'frobenius'"]),
        ("optimizer.n_samples=1", "optimizer", ["n_samples"]),
        ("optimizer.base.betas.x=1", "optimizer.base.betas", ["'x'"]),
    ],
)
def test_an_error_of_an_override_names_the_override(folder: Path, override: str, key: str, named: list[str]) -> None:
    text = changed("name: adam", "name: adam\n    betas: [0.8, 0.9]")
    (line,) = errors(text, [override])
    assert line.startswith(f"--set {override}: {key}")
    assert [word for word in named if word not in line.removeprefix(f"--set {override}: ")] == []


@pytest.mark.parametrize("override", ["optimizer.rho", "=3", "optimizer..rho=1", "optimizer={a: b"])
def test_an_override_that_cannot_be_read_is_told_so(folder: Path, override: str) -> None:
    (line,) = errors(DESCRIPTION, [override])
    assert line.startswith(f"--set {override}:")


def test_overrides_are_yaml_and_the_last_one_wins(folder: Path) -> None:
    run = read(DESCRIPTION, ["optimizer.rho=1", "optimizer.rho=2e-2", "training.channels_last=true", "tracking.uri="])
    assert (run.optimizer.rho, run.training.channels_last, run.tracking.uri) == (0.02, True, None)


def test_an_override_reaches_into_a_section_given_by_name_alone_and_replaces_a_whole_one(folder: Path) -> None:
    assert read(DESCRIPTION, ["optimizer.measure.unbiased=false"]).optimizer.measure.model_dump() == {
        "name": "frobenius",
        "unbiased": False,
    }
    text = changed("measure: frobenius", "measure: {name: frobenius, unbiased: false}")
    assert read(text, ["optimizer.measure=trace"]).optimizer.measure.name == "trace"


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", "1.0e-3", ".001", "0.1e-2", "100e-5"])
def test_every_way_to_write_a_number_is_a_number(folder: Path, number: str) -> None:
    assert read(changed("rho: 0.03", f"rho: {number}")).optimizer.rho == pytest.approx(1e-3)


def test_an_integer_is_a_float_where_one_is_needed(folder: Path) -> None:
    rho = read(changed("rho: 0.03", "rho: 1")).optimizer.rho
    assert (rho, type(rho)) == (1.0, float)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"- a list\n",
        b"just text",
        b"a: 1\n---\nb: 2\n",
        b"name: \x00",
        "name: é".encode("latin-1"),
        b"name: x\n\tdata: y\n",
        b"[" * 3000,
        b"a: &a [*a]\n",
        b"a: &a [x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdef"),
        b"seed: " + b"9" * 5000,
        b"? [a]\n: b\n",
        b"name: '" + b"x" * (1 << 20) + b"'",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_description_is_refused_with_its_name(folder: Path, text: bytes) -> None:
    assert all(line.startswith("run.yaml") for line in errors(text))


def test_reading_runs_nothing(folder: Path) -> None:
    assert errors(DESCRIPTION + "tracking: !!python/object/apply:pathlib.Path.touch [touched]\n")
    assert not Path("touched").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_described_and_survives_writing_and_reading(folder: Path, recipe: str) -> None:
    run = load(recipe)
    assert run.name == recipe
    assert run.description
    assert "#" in recipe_text(recipe)
    assert read(dump_yaml(run)) == run
    assert dump_yaml(read(dump_yaml(run))) == dump_yaml(run)
    assert from_dict(run.model_dump(mode="json")) == run


def test_the_recipes_are_those_listed_here() -> None:
    assert [name for name in recipe_names() if not name.startswith("paper/")] == RECIPES


def test_what_is_compared_with_a_recipe_differs_from_it_in_the_optimizer_alone() -> None:
    mnist5k = [(name, "mnist5k-frob") for name in RECIPES if name.startswith("mnist5k")]
    assert len(mnist5k) == 7
    for other, recipe in [*mnist5k, ("digits-sgd", "digits-frob")]:
        apart = {"name", "description", "optimizer"}
        assert load(other).model_dump(exclude=apart) == load(recipe).model_dump(exclude=apart)
        assert load(other).optimizer.base == load(recipe).optimizer.base


@pytest.mark.parametrize(
    "override",
    [
        "description='on'",
        "description='~'",
        "description='2026-01-01'",
        "description='1:30'",
        'description="a: b # c\\n d\\u2028"',
        "optimizer.lam=5e-324",
        "optimizer.rho=123456789.12345678",
        "optimizer.base={name: sgd, lr: 0.1, nesterov: true}",
        "optimizer.base.betas=[0.1, 0.2]",
        "optimizer.noise={name: hypercube, half_width: 1e-2}",
        "optimizer.noise={name: gaussian, symmetric: true, adaptive: 0}",
        "optimizer.measure={name: eigen_power, k: 3}",
        "optimizer.measure=sam",
        "optimizer.measure={name: asam, eta: 0, scaled: weight}",
        "optimizer.measure={name: ssam, sparsity: 0.9, fisher_samples: 1}",
        "optimizer.rho_schedule={name: cosine, min_factor: 0.1, warmup_epochs: 1}",
        "optimizer.lam_schedule=linear",
        "optimizer.max_grad_norm=1",
        "schedule={name: multistep, milestones: [1, 3], gamma: 0.5}",
        "model={name: torchvision/resnet50}",
        "data.root=here",
        "tracking.tags={a: '1', 'yes': 'no'}",
    ],
)
def test_every_setting_survives_writing_and_reading(folder: Path, override: str) -> None:
    run = read(DESCRIPTION, [override])
    assert read(dump_yaml(run)) == run


def test_a_relative_path_is_taken_from_the_current_folder_and_a_tilde_from_home(folder: Path) -> None:
    run = read(DESCRIPTION, ["data.root=sub/../images", "checkpoint.storage=~/kept"])
    assert run.data.root == folder / "images"
    assert run.checkpoint.storage == Path.home() / "kept"


def test_a_description_cannot_be_changed(folder: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read(DESCRIPTION).optimizer.rho = 1.0  # type: ignore[misc]


def test_flat_is_every_setting_under_its_dotted_key(folder: Path) -> None:
    flat = read(DESCRIPTION, ["tracking.tags={team: a}"]).flat()
    assert flat["optimizer.rho"] == 0.03
    assert flat["optimizer.measure.name"] == "frobenius"
    assert flat["tracking.tags.team"] == "a"
    assert {type(value) for value in flat.values()} <= {str, int, float, bool}


def test_strength_is_lam_rho_squared(folder: Path) -> None:
    assert read(DESCRIPTION, ["optimizer.lam=2"]).optimizer.strength == pytest.approx(2 * 0.03**2)


@pytest.mark.parametrize("measure", ["sam", "{name: asam}", "ssam"])
def test_along_the_gradient_there_is_one_point_whatever_was_asked_for(folder: Path, measure: str) -> None:
    """A file with n_samples: 3 stays valid for `--set optimizer.measure=sam`, but nothing says 3 of what takes 1."""
    run = read(DESCRIPTION, [f"optimizer.measure={measure}"])
    assert run.optimizer.n_samples == 1
    assert run.flat()["optimizer.n_samples"] == 1
    assert "  n_samples: 1\n" in dump_yaml(run)
    text = DESCRIPTION.replace("  n_samples: 3\n", "")
    assert read(text, [f"optimizer.measure={measure}"]).optimizer.n_samples == 1
    assert read(text).optimizer.n_samples == 2


def test_an_unknown_recipe_or_file_is_told_with_the_nearest_recipe(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"digits-frb.*'digits-frob'.*mnist5k-sgd"):
        load("digits-frb")
    with pytest.raises(ConfigError, match=r"digits-frb.*'digits-frob'.*mnist5k-sgd"):
        recipe_text("digits-frb")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load("nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(folder))


def test_a_recipe_goes_before_a_file_of_its_name(folder: Path) -> None:
    Path("digits-frob").mkdir()
    assert load("digits-frob").name == "digits-frob"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_json_schema_accepts_what_is_written_and_refuses_an_unknown_key(recipe: str) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    written = yaml.safe_load(dump_yaml(load(recipe)))
    validator.validate(written)
    written["optimizer"]["rhoo"] = 0.1
    assert not validator.is_valid(written)


def test_config_imports_neither_torch_nor_ray_nor_mlflow() -> None:
    """`phisam validate` and `--help` answer at once because of it."""
    code = f"import sys; import {config.__name__}; sys.exit(bool({{'torch', 'ray', 'mlflow'}} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )


@pytest.mark.parametrize("uri", ["postgresql://u:hunter2@h/db", "https://hunter2@host/", r"https://hunter2\@host"])
def test_a_password_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("digits-sgd", [f"tracking.uri={uri}"])
    assert "must not carry a password" in str(caught.value)
    assert "optimizer" not in str(caught.value)
    assert config.load("digits-sgd", ["tracking.uri=http://127.0.0.1:5000"]).tracking.uri == "http://127.0.0.1:5000"


@pytest.mark.parametrize("rho", ["1e200", "1e-200"])
def test_a_rho_whose_square_is_no_number(rho: str) -> None:
    with pytest.raises(ConfigError, match="must be between 1e-100 and 1e100"):
        config.load("digits-frob", [f"optimizer.rho={rho}"])


@pytest.mark.parametrize("name", ["a/../b", "a/..", "a/", "a//b", "/a", "../a", "a/.b", "a\nb", "a\n"])
def test_a_name_that_leads_out_of_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="name: must be text such as"):
        config.changed(config.load("digits-sgd"), [f"name={json.dumps(name)}"])
    assert config.changed(config.load("digits-sgd"), ["name=a.b/c_1/-d"]).name == "a.b/c_1/-d"


def test_a_range_of_workers_and_a_number_of_them() -> None:
    assert list(config.load("digits-frob", ["scaling.num_workers=3"]).scaling.sizes) == [3]
    elastic = config.load("digits-frob", ["scaling.num_workers={min: 2, max: 4}"])
    assert (list(elastic.scaling.sizes), elastic.scaling.most_workers) == ([2, 3, 4], 4)
    assert config.from_dict(elastic.model_dump(mode="json")) == elastic
    assert elastic.flat()["scaling.num_workers.max"] == 4


@pytest.mark.parametrize(
    ("workers", "told"),
    [
        ("0", r"scaling\.num_workers: must be an integer >= 1, or a range such as \{min: 1, max: 4\}, not 0"),
        ("true", r"num_workers: must be an integer >= 1, .*, not true"),
        ("{min: 3, max: 2}", r"num_workers\.max: must be at least min = 3, not 2"),
        ("{min: 0, max: 2}", r"num_workers\.min: must be an integer >= 1, not 0"),
        ("{min: 1, most: 2}", r"num_workers\.most: unknown key \(value 2\).*Allowed: min, max"),
    ],
)
def test_workers_that_cannot_be(workers: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config.load("digits-frob", [f"scaling.num_workers={workers}"])


def test_sample_ranks_divide_every_number_of_workers() -> None:
    with pytest.raises(ConfigError, match=r"must divide scaling\.num_workers = 3"):
        config.load("digits-frob", ["scaling.num_workers={min: 2, max: 4}", "optimizer.sample_parallel=2"])
