"""The study's design and page, without its two hours: what is fair in it, and that its tables say what was measured."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import RunConfig
from ray_jobs.results import Curve, RunRecord
from ray_jobs.sweep.config import SweepConfig, load_sweep
from ray_jobs.sweep.cost import evaluations, evaluations_per_step
from ray_jobs.sweep.search import make_search
from ray_jobs.yaml_source import write_yaml
from tests.ray_jobs import synthetic

sys.path.insert(0, str(Path(__file__).parents[2] / "studies" / "which_member"))
design: Any = __import__("design")
curvature: Any = __import__("curvature")
page: Any = __import__("page")
picture: Any = __import__("picture")
seconds: Any = __import__("seconds")


def loaded(described: dict[str, Any], tmp_path: Path) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(write_yaml(described))
    return load_sweep(str(path))


def configs_of(described: dict[str, Any], tmp_path: Path) -> list[RunConfig]:
    sweep = loaded(described, tmp_path)
    search = make_search(sweep, 1)
    return [sweep.trial(search.suggest(index, {}), index) for index in range(search.n_trials)]


@pytest.mark.parametrize(
    ("comparison", "task"),
    [(comparison, task) for comparison in design.COMPARISONS for task in comparison.tasks],
    ids=lambda value: value if isinstance(value, str) else value.title,
)
def test_every_method_has_the_same_draws_and_as_much_to_spend(comparison: Any, task: str, tmp_path: Path) -> None:
    configs = configs_of(design.tuning(comparison, task, design.WHOLE, str(tmp_path)), tmp_path)
    drawn: dict[str, list[RunConfig]] = {}
    for config in configs:
        drawn.setdefault(config.description, []).append(config)
    assert drawn.keys() == comparison.of(design.TASKS[task]).keys()
    assert {len(of) for of in drawn.values()} == {design.WHOLE.draws}
    if comparison is design.EVALUATIONS:
        (whole,) = map(evaluations, drawn["base"][:1])
        assert all(0.8 * whole <= evaluations(config) <= whole for config in configs)
    else:
        (whole,) = {config.training.epochs for config in drawn["base"]}
        assert {config.training.epochs for config in configs} == {whole}


def test_at_equal_steps_points_are_those_that_2_and_4_and_9_workers_share(tmp_path: Path) -> None:
    configs = configs_of(design.tuning(design.STEPS, "mnist5k", design.WHOLE, None), tmp_path)
    points = {config.description: evaluations_per_step(config.optimizer) for config in configs}
    assert {name: points[name] for name in design.STEPS.methods if name not in design.BASELINES} == {
        "trace-1": 2,
        "trace-3": 4,
        "trace-8": 9,
        "frobenius-8": 9,
    }


def test_finalists_are_the_baselines_and_the_best_by_validation_loss(tmp_path: Path) -> None:
    scores = {"base": 0.9, "sam": 0.8, "trace": 0.3, "frobenius": 0.4, "average": 0.2, "asam": 0.25}
    assert design.finalists(design.EVALUATIONS, scores, design.WHOLE) == ["base", "sam", "average", "asam", "trace"]
    assert design.finalists(design.STEPS, scores, design.WHOLE) == list(scores)
    chosen = {"base": {"optimizer.base.lr": 0.02}, "trace": {"optimizer.rho": 0.05, "optimizer.n_samples": 2}}
    configs = configs_of(design.finals(design.EVALUATIONS, "digits-convnet", design.WHOLE, None, chosen), tmp_path)
    assert len(configs) == 2 * 10
    assert {config.training.seed for config in configs} == set(range(100, 110))
    assert {config.optimizer.rho for config in configs if config.description == "trace"} == {0.05}
    assert {config.optimizer.base.lr for config in configs if config.description == "base"} == {0.02}


def final(method: str, measure: str, seed: int, accuracy: float, **curves: Curve) -> RunRecord:
    record = synthetic.run(measure, seed=seed)
    values = {**dict.fromkeys(page.MEASURED, 1.0), "accuracy/early_test": accuracy, "loss/early_test": 1 - accuracy}
    values["loss/early_validation"] = 1 - accuracy
    return dataclasses.replace(
        record,
        tags={**record.tags, "mlflow.note.content": method},
        curves={**{metric: Curve((1,), (value,)) for metric, value in values.items()}, **curves},
        status="FINISHED",
    )


def records(gain: float) -> list[RunRecord]:
    made = []
    for seed in range(4):
        jitter = 0.001 * (seed % 2)
        made += [
            final("base", "sgd", seed, 0.80 + 0.01 * seed),
            final("sam", "sam", seed, 0.82 + 0.01 * seed + jitter),
            final("average", "trace", seed, 0.82 + gain + 0.01 * seed - jitter),
        ]
    return made


def results(gain: float) -> Any:
    tuned = [record for record in records(gain) if record.params["training.seed"] == "0"]
    return page.Results(tuned, records(gain), {"average": {1: 1.9, 2: 1.2}})


def found(**gains: float) -> Any:
    return {"equal steps": {task: results(gain) for task, gain in gains.items()}}


def test_the_page_has_means_and_paired_differences_corrected_over_all_of_it() -> None:
    text = page.page(found(one=0.01, two=0.02))
    assert "| base | lr 0.001 | 81.50% ± 2.05 |" in text
    assert "| sam | lr 0.001, rho 0.03, lam 0.001, n_samples 1 | 83.5" in text
    differences = [line for line in text.splitlines() if line.startswith("| average | sam | ")]
    assert [line.split(" | ")[2] for line in differences] == ["+0.90", "+1.90"]
    alone = page.page(found(two=0.02))
    assert p_of(text.partition("## two")[2]) == pytest.approx(p_of(alone) * 2, rel=0.3)  # twice as many comparisons
    assert "| sam | base | +2.05 |" in text
    assert "| base | sam |" not in text


def test_the_page_has_what_tuning_found_and_what_a_step_costs() -> None:
    """0.17 / 0.20 and 0.16 / 0.20 of the base optimizer's validation loss; SAM 0.18 / 0.20."""
    lines = page.page(found(one=0.01, two=0.02)).splitlines()
    assert lines[4:9] == [
        "| method | one | two | geometric mean |",
        "| --- | --- | --- | --- |",
        "| average | 0.85 | 0.80 | 0.82 |",
        "| sam | 0.90 | 0.90 | 0.90 |",
        "| base | 1.00 | 1.00 | 1.00 |",
    ]
    assert sum("| 1.90 | 1.20 | 4 |" in line for line in lines) == 2


def p_of(text: str) -> float:
    """The last p of average against sam."""
    return float(next(line for line in text.splitlines() if line.startswith("| average | sam | ")).split(" | ")[4])


def measured(method: str, measure: str, seed: int, slope: float) -> RunRecord:
    """Training losses 1, 0.1, 0.01; the norm is slope loss^2 and the trace 5 + log10 loss, measured in all three."""
    losses = (1.0, 0.1, 0.01)
    curves = {
        "loss/train": losses,
        "hessian/frobenius_squared": tuple(slope * loss**2 for loss in losses),
        "hessian/frobenius_squared.standard_error": tuple(0.1 * slope * loss**2 for loss in losses),
        "hessian/trace": (5.0, 4.0, 3.0),
    }
    return final(method, measure, seed, 0.9, **{name: Curve((2, 4, 6), values) for name, values in curves.items()})


def test_curvature_is_compared_where_training_losses_are_equal() -> None:
    """A method that ends at another loss is read where it passed that of the slowest; a power law is met exactly."""
    slow = measured("slow", "trace", 0, 2.0)
    slow = dataclasses.replace(slow, curves={**slow.curves, "loss/train": Curve((2, 4, 6), (1.0, 0.3, 0.03))})
    fast = [measured("fast", "sgd", seed, 8.0) for seed in (0, 1)]
    at = curvature.at_equal_loss(
        page.by_method([slow, dataclasses.replace(slow, params={**slow.params, "training.seed": "1"}), *fast])
    )
    assert at["fast"].loss == 0.03
    assert at["fast"].frobenius.mean == pytest.approx(8 * 0.03**2)
    assert at["fast"].trace.mean == pytest.approx(5 + math.log10(0.03))
    assert at["slow"].frobenius.mean == pytest.approx(2 * 0.01**2)  # its own last point
    assert at["fast"].probes == pytest.approx(0.1)


def test_the_picture_has_a_row_for_every_method_of_every_task_but_the_base(tmp_path: Path) -> None:
    paths = picture.draw(found(one=0.01, two=0.02), tmp_path)
    svg = next(path for path in paths if path.suffix == ".svg").read_text()
    assert [svg.count(f"<!--    {method} -->") for method in ("sam", "average")] == [2, 2]


def test_a_step_is_timed_on_one_and_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "ROUNDS", 1)
    chosen = {"base": {"optimizer.base.lr": 0.02}, "trace": {"optimizer.rho": 0.05, "optimizer.n_samples": 1}}
    runs = design.finals(design.EVALUATIONS, "digits-convnet", design.QUICK, None, chosen)["runs"]
    ratios = seconds.ratios(runs, "base")
    assert ratios.keys() == {"base", "trace"}
    assert all(times.keys() == {1, 2} and min(times.values()) > 0 for times in ratios.values())
