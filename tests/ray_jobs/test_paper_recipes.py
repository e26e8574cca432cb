"""The recipes of the paper's Table 2: they say what the paper says, and run on files in the data sets' own formats."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets

import phisam
from phisam.closures import Part
from ray_jobs import cli, config, worker
from ray_jobs.config import RunConfig
from ray_jobs.data import Batches, load_dataset
from ray_jobs.errors import ConfigError
from ray_jobs.models import make_model
from tests.ray_jobs.test_sources import write_cifar, write_svhn

DATA = ("cifar10", "cifar100", "svhn")
SIZES = {"": 1.0, "-s": 0.1}
METHODS = ("frob", "det", "trace", "sam", "asam", "ssam", "sgd")
SOURCES = ("", "-authors")
NAMES = [f"paper/{d}{size}-{m}{source}" for d in DATA for size in SIZES for m in METHODS for source in SOURCES]
PARTS = re.compile(r"paper/([a-z0-9]+)(-s)?-([a-z]+)(-authors)?")

DOCS = Path(__file__).parents[2] / "docs" / "paper.md"


def parts(name: str) -> tuple[str, str, str, str]:
    """(data set, "-s" or "", method, "-authors" or "")"""
    match = PARTS.fullmatch(name)
    assert match
    data, size, method, source = (part or "" for part in match.groups())
    return data, size, method, source


def differing(name: str, other: str) -> set[str]:
    """The settings in which two recipes differ, by their dotted keys."""
    settings, others = config.load(name).flat(), config.load(other).flat()
    keys = {key for key in settings.keys() | others.keys() if settings.get(key) != others.get(key)}
    return keys - {"name", "description"}


def test_every_cell_of_the_table_is_a_recipe() -> None:
    assert sorted(NAMES) == [name for name in config.recipe_names() if name.startswith("paper/")]


# Typed from section 4 and Appendix O, and from the commands in the authors' README, not from the code.
WEIGHT_DECAY = {"cifar10": 5e-4, "cifar100": 1e-3, "svhn": 5e-4}
AUGMENT = {"cifar10": "crop_flip", "cifar100": "crop_flip", "svhn": "none"}
SAM_RHO = {"cifar10": 0.05, "cifar100": 0.1, "svhn": 0.05}
ASAM_RHO = {"cifar10": 0.5, "cifar100": 1, "svhn": 0.5}
ASAM_ETA = {"cifar10": 0.01, "cifar100": 0.1, "svhn": 0.01}
SSAM_RHO = {"cifar10": 0.1, "cifar100": 0.2, "svhn": 0.1}
FROB_LAM_SWEEP, DET_LAM_SWEEP = [0.0001, 0.001, 0.005], [0.01, 0.1, 1.0]
README_FROB = {"isam_rho": 0.005, "isam_lam": 0.005, "isam_n_samples": 2}  # rho and n are in the paper's sets


def expected_optimizer(data: str, method: str, source: str) -> dict[str, Any]:
    match method, source:
        case "frob", _:
            lam = README_FROB["isam_lam"] / 4 if source else FROB_LAM_SWEEP[1]
            frob = {"measure.name": "frobenius", "measure.unbiased": True, "lam": lam}
            return frob | {"rho": README_FROB["isam_rho"], "n_samples": README_FROB["isam_n_samples"]}
        case "det", _:
            cube = {"noise.name": "hypercube", "noise.half_width": 0.02 / 2, "rho": 1, "n_samples": 1}
            printed = {"measure.name": "determinant", "lam": DET_LAM_SWEEP[1]}
            return cube | ({"measure.name": "exp_product", "measure.sigma": -0.5, "lam": 1} if source else printed)
        case "trace", _:
            return {"measure.name": "trace", "noise.name": "gaussian", "rho": 0.01, "lam": 1, "n_samples": 1}
        case "sam", _:
            return {"measure.name": "sam", "rho": SAM_RHO[data], "lam": 1, "n_samples": 1}
        case "asam", _:
            asam = {"measure.name": "asam", "measure.eta": ASAM_ETA[data], "measure.scaled": "all"}
            return asam | {"rho": ASAM_RHO[data], "lam": 1, "n_samples": 1}
        case "ssam", _:
            ssam = {"measure.name": "ssam", "measure.sparsity": 0.5, "measure.fisher_samples": 16}
            return ssam | {"rho": SSAM_RHO[data], "lam": 1, "n_samples": 1}
    assert method == "sgd"
    return {"measure.name": "sgd"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_paper_says(name: str) -> None:
    data, size, method, source = parts(name)
    run = config.load(name)
    expected = {f"optimizer.{key}": value for key, value in expected_optimizer(data, method, source).items()}
    expected |= {
        "name": name,
        "data.name": data,
        "data.fraction": SIZES[size],
        "data.label_noise": 0,
        "data.augment": AUGMENT[data],
        "model.name": "resnet18",
        "optimizer.base.name": "sgd",
        "optimizer.base.lr": 0.1,
        "optimizer.base.momentum": 0.9,
        "optimizer.base.nesterov": False,
        "optimizer.base.weight_decay": WEIGHT_DECAY[data],
        "training.batch_size": 128,
        "training.epochs": 200 if source else 50,
        "scaling.num_workers": 1,
        "optimizer.sample_parallel": "auto",
    }
    flat = run.flat()
    assert {key: flat.get(key) for key in expected} == expected
    rates = {0: 0.1, 51: 0.1, 52: 0.01, 101: 0.01, 102: 1e-3, 151: 1e-3, 152: 1e-4, 199: 1e-4}
    if not source:
        rates = {epoch: 0.1 * 0.25 ** (epoch // 10) for epoch in (0, 9, 10, 19, 20, 30, 40, 49)}
    found = {
        epoch: worker.scheduled(run.optimizer.base.lr, run.schedule, 7 * epoch, 7, run.training.epochs)
        for epoch in rates
    }
    assert found == pytest.approx(rates)
    assert config.from_dict(run.model_dump(mode="json")) == run


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_variants_of_a_recipe_differ_only_where_they_should(data: str, method: str) -> None:
    name = f"paper/{data}-{method}"
    of_the_code = {"schedule.name", "schedule.every", "schedule.milestones", "schedule.gamma", "training.epochs"}
    departures = {
        "frob": {"optimizer.lam"},
        "det": {"optimizer.measure.name", "optimizer.measure.sigma", "optimizer.lam"},
    }
    assert differing(name, f"{name}-authors") == of_the_code | departures.get(method, set())
    for source in SOURCES:
        assert differing(name + source, f"paper/{data}-s-{method}{source}") == {"data.fraction"}
    assert {key.split(".")[1] for key in differing(name, f"paper/{data}-sgd")} <= {
        "measure",
        "noise",
        "rho",
        "lam",
        "n_samples",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_description_names_what_departs_from_the_paper(name: str) -> None:
    _, size, method, source = parts(name)
    described = config.load(name).description
    assert ("the first 10 %" in described) == bool(size)
    assert ("Gaussian draws in place of the sphere's" in described) == (method == "trace")
    assert ("200 epochs in place of 50; lr x 0.1 from epochs 52, 102 and 152 on" in described) == bool(source)
    assert ("exp(-t / 2) in place of exp(-t); lam = 1" in described) == (method == "det" and bool(source))
    assert ("lam = 0.005 / 4" in described) == (method == "frob" and bool(source))
    assert ("Departs from the paper" in described) == (bool(source) or method == "trace")


def test_the_authors_frob_sam_weighs_as_their_code() -> None:
    """g_0 + lam / rho^2 (sum L_i g_i - sum L_i sum g_i / n) / (n - 1)"""
    run = config.load("paper/cifar10-frob-authors").optimizer
    losses = torch.tensor([0.7, 0.71, 0.68], dtype=torch.float64)
    rho, lam, n = README_FROB.values()
    theirs = lam / rho**2 * (losses[1:] - losses[1:].mean()) / (n - 1)
    ours = worker.make_measure(run).weights(losses, run.rho, run.lam)
    torch.testing.assert_close(ours, torch.cat([1 - theirs.sum()[None], theirs]))


def test_the_authors_det_sam_is_one_over_t_squared_of_exp_of_minus_half_t() -> None:
    run = config.load("paper/cifar10-det-authors").optimizer
    theirs = phisam.Measure(lambda t: 1 / t**2, lambda t: torch.exp(-t / 2), phisam.hypercube(0.01))
    for losses in (torch.tensor([0.7, 0.9, 0.4]), torch.tensor([0.7, 0.9])):
        ours = worker.make_measure(run).weights(losses.double(), run.rho, run.lam)
        torch.testing.assert_close(ours, theirs.weights(losses.double(), run.rho, run.lam))
    assert ours[1] == pytest.approx(math.exp(0.2))  # one draw: lam exp(delta)


# On files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of all three data sets, with about 100 training images each."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        write_cifar(root, patch, datasets.CIFAR10, "labels", n=21)
        write_cifar(root, patch, datasets.CIFAR100, "fine_labels", n=99)
        write_svhn(root, patch, n=99)
        yield root


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def take_two_steps(run: RunConfig) -> phisam.PhiSAM:
    """What the training loop does, in one process without Ray."""
    seed = run.training.seed
    dataset = load_dataset(run.data, seed)
    batches = Batches(dataset.train, run.training.batch_size, seed, dataset.normalizer(), run.data.augment)
    model = make_model(run.model, dataset.input_shape, dataset.num_classes, seed)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    optimizer = worker.make_optimizer(run, ddp, batches.steps_per_epoch)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    for images, labels in islice(chain(batches.epoch(0), batches.epoch(1)), 2):

        def closure(part: Part, images: Tensor = images, labels: Tensor = labels) -> Tensor:
            return cross_entropy(ddp(part(images)), part(labels))

        optimizer.step(closure)
        assert torch.isfinite(optimizer.last_step.losses).all()
        assert torch.isfinite(optimizer.last_step.weights).all()
        assert optimizer.last_step.weights.sum() == pytest.approx(1, abs=1e-5)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any((parameter != old).any() for parameter, old in zip(model.parameters(), before, strict=True))
    return optimizer


EVALUATIONS = {"frob": 3, "det": 2, "trace": 2, "sam": 2, "asam": 2, "ssam": 2, "sgd": 1}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_two_steps_on_files_of_its_data_set(root: Path, name: str) -> None:
    """With a small network in place of the ResNet, which is slow on a CPU."""
    run = config.load(name, [f"data.root={root}", "training.batch_size=8", "model.name=convnet"])
    optimizer = take_two_steps(run)
    assert optimizer.skipped_steps == 0
    assert optimizer.gradient_evaluations_per_step == EVALUATIONS[parts(name)[2]]
    assert len(optimizer.last_step.losses) == EVALUATIONS[parts(name)[2]]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_takes_two_steps_with_its_own_network(root: Path, method: str) -> None:
    run = config.load(f"paper/cifar10-s-{method}", [f"data.root={root}", "training.batch_size=4"])
    assert take_two_steps(run).skipped_steps == 0


# By name


def test_the_command_lists_them_together_and_prints_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) < 30
    assert all(word in listed for word in ("paper/cifar10-frob", "-authors", "-s", *DATA, *METHODS))
    for name in ("paper/cifar100-s-asam", "paper/svhn-det-authors"):
        assert cli.main(["recipes", name]) == 0
        printed = capsys.readouterr().out
        Path("mine.yaml").write_text(printed)
        assert config.load("mine.yaml") == config.load(name)
        assert printed.startswith("# ")


def test_a_misspelt_name_is_told_with_the_nearest_and_without_all_the_others() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'paper/cifar10-frob'\?") as caught:
        config.load("paper/cifar10-forb")
    assert len(str(caught.value)) < 500


def test_the_comments_stand_in_one_column_and_lines_fit() -> None:
    for name in NAMES:
        lines = config.recipe_text(name).splitlines()
        assert {line.index(" # ") for line in lines if " # " in line} == {29}
        assert max(map(len, lines)) <= 120


def test_the_documentation_names_recipes_that_exist() -> None:
    named = set(re.findall(r"paper/[a-z0-9-]*[a-z0-9](?![a-z0-9{-])", DOCS.read_text(encoding="utf-8")))
    assert named
    assert named <= set(NAMES)
