"""What is text and what is a number, what survives writing, and the sentences that mistakes are told in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_jobs.config import DataConfig, dump_yaml, json_schema, load, recipe_names, recipe_text
from ray_jobs.errors import ConfigError
from ray_jobs.yaml_source import read_yaml, write_yaml
from tests.ray_jobs.test_config import DESCRIPTION, changed, errors, folder, read

__all__ = ["folder"]  # the fixture

TEXTS = ["1e3", "1e-3", ".5e3", "5.e3", "-.5e+3", "12", "010", "1_0", "0x1f", "0o7", "1:30", "2026-01-01"]
TEXTS += ["on", "No", "true", "null", "~", "", "=", "<<", ".inf", "a: b", "#", " a ", "- a", "a\nb\n", "\x85\u2028\x07"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_the_same_text_after_writing_and_reading(text: str) -> None:
    """Also for readers of YAML 1.1: a run's name, or a tag with a commit such as 12e4567, may look like a number."""
    written = write_yaml({"key": text, text: "value"})
    assert read_yaml(written, "test").value == {"key": text, text: "value"}
    assert yaml.safe_load(written)["key"] == text


@pytest.mark.parametrize("number", [0.0, 1e-6, 0.001, 5e-324, 1e22, 1e16, 123456789.12345678, 10**30, -3, True, None])
def test_every_number_is_the_same_number_after_writing_and_reading(number: float | None) -> None:
    value = read_yaml(write_yaml({"key": number}), "test").value["key"]
    assert (value, type(value)) == (number, type(number))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("On", "On"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("0x10", "0x10"),
        ("TRUE", True),
        ("", None),
        ("~", None),
        ("-.INF", float("-inf")),
    ],
)
def test_plain_values_follow_yaml_1_2(text: str, value: Any) -> None:
    found = read_yaml(f"key: {text}", "test").value["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", recipe_names())
def test_the_json_schema_accepts_a_recipe_with_its_short_forms(name: str) -> None:
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(recipe_text(name)))


def test_the_json_schema_refuses_the_short_form_of_what_has_settings_to_give() -> None:
    description = yaml.safe_load(recipe_text("digits-frob"))
    description["optimizer"]["measure"] = "exp_product"
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(description)


OF_OPTIMIZER = (
    "base, measure, noise, rho, rho_schedule, lam, lam_schedule, n_samples, n_early, every, perturb_fraction, "
    "max_grad_norm, sample_parallel, scope"
)

# (change of DESCRIPTION, the errors in full)
SENTENCES: dict[str, tuple[tuple[str, str], list[str]]] = {
    "unknown key": (
        ("rho: 0.03", "rhoo: 0.1"),
        [f"run.yaml:10: optimizer.rhoo: unknown key (value 0.1). Did you mean 'rho'? Allowed: {OF_OPTIMIZER}"],
    ),
    "key of another section": (
        ("rho: 0.03", "epochs: 3"),
        [f"run.yaml:10: optimizer.epochs: unknown key (value 3). It belongs to training. Allowed: {OF_OPTIMIZER}"],
    ),
    "key of a section inside": (
        ("rho: 0.03", "lr: 0.3"),
        [
            "run.yaml:10: optimizer.lr: unknown key (value 0.3). It belongs to optimizer.base (adam, adamw, sgd). "
            f"Allowed: {OF_OPTIMIZER}"
        ],
    ),
    "setting of a name that is missing": (
        ("measure: frobenius", "measure: exp_product"),
        ["run.yaml:9: optimizer.measure.sigma: missing; it must be a number"],
    ),
    "no name": (
        ("name: adam", "lr: 0.1"),
        ["run.yaml:7: optimizer.base.name: missing; it must be one of adam, adamw, sgd"],
    ),
    "one union, one error": (
        ("rho: 0.03", "sample_parallel: 0"),
        ["run.yaml:10: optimizer.sample_parallel: must be auto or an integer >= 1, not 0"],
    ),
    "number in quotes": (
        ("epochs: 4", "epochs: '4'"),
        ["run.yaml:13: training.epochs: must be an integer >= 1, not '4'. Write it without quotes"],
    ),
    "text without quotes": (
        ("name: lines", "name: lines\ntracking: {tags: {year: 2026}}"),
        ["run.yaml:2: tracking.tags.year: must be text, not 2026. Write it in quotes"],
    ),
    "too few in a list": (
        ("name: adam", "name: adam\n    betas: [0.9]"),
        ["run.yaml:9: optimizer.base.betas[1]: missing; it must be a number >= 0 and < 1"],
    ),
    "the line of the key that does not fit": (
        ("n_samples: 3", "n_samples: 1"),
        [
            "run.yaml:11: optimizer.n_samples: must be 2 or more for frobenius, not 1: its unbiased estimate "
            "(Algorithm 3) divides by n_samples - 1. Or set optimizer.measure.unbiased to false"
        ],
    ),
    "long value": (
        ("name: lines", f"name: lines\nx: {list(range(99))}"),
        [
            "run.yaml:2: x: unknown key (value [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16...). "
            "Allowed: name, description, data, model, optimizer, schedule, training, sharpness, "
            "scaling, tracking, checkpoint"
        ],
    ),
    "two keys twice, and more": (
        ("epochs: 4", "epochs: 4\n  epochs: 5\n  batch_size: 3\n  seed: -1"),
        [
            "run.yaml:14: training.epochs: given twice, first at run.yaml:13; keep one",
            "run.yaml:16: training.seed: must be an integer >= 0 and < 9223372036854775808, not -1",
            "run.yaml:17: training.batch_size: given twice, first at run.yaml:15; keep one",
        ],
    ),
    "tag": (
        ("name: lines", "name: !!python/name:os.system lines"),
        ["run.yaml:1: name: the YAML tag !!python/name:os.system is not accepted"],
    ),
    "tag of a section": (
        ("name: lines", "name: lines\ntracking: !!python/object:os.x {experiment: a}"),
        ["run.yaml:2: tracking: the YAML tag !!python/object:os.x is not accepted"],
    ),
    "tag of a list": (
        ("name: adam", "name: adam\n    betas: !!python/tuple [0.9, 0.99]"),
        ["run.yaml:9: optimizer.base.betas: the YAML tag !!python/tuple is not accepted"],
    ),
    "half a character": (
        ("name: lines", 'name: lines\ndescription: "\\ud800"'),
        ["run.yaml:2: description: '\\ud800' cannot be read as str"],
    ),
    "alias": (
        ("rho: 0.03", "rho: &a 0.03\n  lam: *a"),
        ["run.yaml:11: not valid YAML: the alias *a is not accepted here: write the value out"],
    ),
}


@pytest.mark.parametrize("mistake", SENTENCES)
def test_the_sentences(folder: Path, mistake: str) -> None:
    change, told = SENTENCES[mistake]
    assert errors(changed(*change)) == told


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.sample_parallel=2", "optimizer.sample_parallel"),
        ("schedule={name: cosine, warmup_epochs: 4}", "schedule.warmup_epochs"),
        ("schedule={name: multistep, milestones: [3, 2], gamma: 0.1}", "schedule.milestones"),
        ("schedule={name: multistep, milestones: [], gamma: 0.1}", "schedule.milestones"),
        ("optimizer.base={name: sgd, momentum: 0, nesterov: true}", "optimizer.base.nesterov"),
        ("optimizer.base={name: sgd, momentum: 1}", "optimizer.base.momentum"),
        ("optimizer.measure={name: exp_product, sigma: 0}", "optimizer.measure.sigma"),
        ("training.seed=9223372036854775808", "training.seed"),
        ("model={name: resnet18, width: 128}", "model.width"),
        ("model.name=torchvision/", "model.name"),
        ("data.name=cifar10", "data.root"),
        ("data={name: imagefolder, root: x, image_size: 8, download: true}", "data.download"),
        ("data.root=''", "data.root"),
        ("checkpoint.storage=s3://bucket/runs", "checkpoint.storage"),
        ("name=../escape", "name"),
        ("tracking.experiment=''", "tracking.experiment"),
    ],
)
def test_what_would_fail_later_on_a_worker_is_refused_now(folder: Path, override: str, key: str) -> None:
    (line,) = errors(DESCRIPTION, [override])
    assert f": {key}: " in line


def test_an_override_is_not_blamed_for_its_neighbour(folder: Path) -> None:
    (line,) = errors(changed("n_samples: 3", "n_samples: 1"), ["optimizer.rho=0.5"])
    assert line.startswith("run.yaml:11: optimizer.n_samples: ")


def test_an_override_that_replaces_a_section_is_where_its_missing_keys_are_missing(folder: Path) -> None:
    text = changed("measure: frobenius", "measure: {name: exp_product, sigma: 1}")
    (line,) = errors(text, ["optimizer.measure=exp_product"])
    assert line.startswith("--set optimizer.measure=exp_product: optimizer.measure.sigma: missing")


def test_mistakes_of_overrides_come_with_those_of_the_file(folder: Path) -> None:
    told = errors(changed("rho: 0.03", "rhoo: 0.1"), ["training.epochs=0", "nothing"])
    assert [line.split(": ")[0] for line in told] == ["run.yaml:10", "--set nothing", "--set training.epochs=0"]


def test_a_missing_file_is_told_with_the_recipe_it_may_mean(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'x/digits-frb.yaml' is neither .* Did you mean 'digits-frob'\? Recipes: .*mnist"
    ):
        load("x/digits-frb.yaml")
    for source in ("", "a\0b", "~nobody-of-this-name/x.yaml"):
        with pytest.raises(ConfigError):
            load(source)


def test_a_model_without_width_has_none_in_its_description(folder: Path) -> None:
    run = read(DESCRIPTION, ["model={name: resnet18}"])
    assert not [key for key in run.flat() if key.startswith("model.") and key != "model.name"]
    assert read(dump_yaml(run)) == run


def test_the_base_optimizer_alone_has_no_strength(folder: Path) -> None:
    assert read(DESCRIPTION, ["optimizer.measure=sgd"]).optimizer.strength == 0


def test_a_section_made_in_python_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="image_size: missing; imagefolder needs it"):
        DataConfig(name="imagefolder", root=Path("/images"))


def test_a_text_of_too_many_values() -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml:1: not valid YAML: more than 20000 values"):
        read_yaml(f"a: [{'1, ' * 20_001}]", "run.yaml")
