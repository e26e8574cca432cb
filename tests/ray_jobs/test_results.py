"""Records, grouping and statistics: against scipy and closed forms."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from scipy import stats

from ray_jobs import results
from ray_jobs.formatting import brief, short_names
from ray_jobs.results import Curve, Interval, RunRecord, Setting, holm, interval, paired, paired_test, settings
from tests.ray_jobs import synthetic


def record(seed: int = 0, status: str = "FINISHED", started: int = 0, **curves: list[float]) -> RunRecord:
    made = {name.replace("__", "/"): Curve(tuple(range(1, len(v) + 1)), tuple(v)) for name, v in curves.items()}
    params = {"measure": "sam", "training.seed": str(seed)}
    return RunRecord(f"run{seed}{started}", "r", status, None, params, {}, made, {}, started)


def test_an_interval_is_scipys() -> None:
    values = [0.91, 0.935, 0.92, 0.94, 0.9]
    over = interval(values)
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (over.mean, over.low, over.high, over.n) == pytest.approx((sum(values) / 5, low, high, 5), rel=1e-12)


def test_an_interval_of_two_is_the_cauchy_quantile() -> None:
    over = interval([1.0, 3.0])  # one degree of freedom: t_0.975 = tan(0.475 pi); s / sqrt(2) = 1
    assert over.half_width == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert interval([2.0]).mean == 2.0
    assert math.isnan(interval([2.0]).half_width)
    with pytest.raises(ValueError, match="needs a value"):
        interval([])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(3)
    held = sum(
        over.low <= 0 <= over.high for over in (interval([draw.gauss(0, 1) for _ in range(3)]) for _ in range(800))
    )
    assert abs(held - 760) < 4 * math.sqrt(800 * 0.95 * 0.05)


def test_the_paired_test_is_scipys_and_sees_what_an_unpaired_one_does_not() -> None:
    a, b = [0.90, 0.93, 0.96, 0.91], [0.89, 0.925, 0.948, 0.902]
    first, second = (
        settings([record(seed, accuracy__test=[value]) for seed, value in enumerate(values)])[0] for values in (a, b)
    )
    test = paired(first, second, "accuracy/test")
    assert test is not None
    assert test.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert test.p < 0.05 < stats.ttest_ind(a, b).pvalue
    assert test.difference == pytest.approx(sum(a) / 4 - sum(b) / 4)
    assert test.interval.low == pytest.approx(stats.ttest_rel(a, b).confidence_interval(0.95).low)


def test_only_seeds_that_both_have_are_paired() -> None:
    first = settings([record(seed, accuracy__test=[value]) for seed, value in [(0, 0.9), (1, 0.8), (7, 0.1)]])[0]
    second = settings([record(seed, accuracy__test=[value]) for seed, value in [(1, 0.7), (0, 0.7)]])[0]
    test = paired(first, second, "accuracy/test")
    assert test is not None
    assert test.n == 2
    assert test.difference == pytest.approx(0.15)
    assert paired(first, settings([record(3, accuracy__test=[0.5])])[0], "accuracy/test") is None


def test_a_difference_that_does_not_vary_is_no_certainty() -> None:
    assert math.isnan(paired_test([0.1, 0.1, 0.1]).p)
    assert paired_test([0.0, 0.0]).p == 1.0
    assert math.isnan(paired_test([0.3]).p)


def test_holm_by_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    adjusted = holm([0.02, math.nan])
    assert adjusted[0] == 0.02  # what could not be tested is no comparison
    assert math.isnan(adjusted[1])


def test_a_run_is_read_at_the_last_epoch_within_the_budget() -> None:
    run = record(accuracy__test=[0.1, 0.2, 0.3], gradient_evaluations=[30.0, 60.0, 90.0], seconds=[1.5, 2.5, 4.5])
    assert run.at("accuracy/test") == 0.3
    assert run.at("accuracy/test", "gradient_evaluations", 89.0) == 0.2
    assert run.at("accuracy/test", "gradient_evaluations", 90.0) == 0.3
    assert run.at("accuracy/test", "seconds", 2.4999) == 0.1
    assert run.at("accuracy/test", "seconds", 1.0) is None
    assert run.at("accuracy/test", "epochs", 2) == 0.2
    assert run.at("loss/test") is None
    assert run.at("gradient_evaluations", "epochs", 2) == 60.0


def test_what_is_measured_now_and_then_is_read_at_its_last_time() -> None:
    run = record(accuracy__test=[0.1, 0.2, 0.3])
    run = dataclasses.replace(run, curves={**run.curves, "hessian/trace": Curve((2,), (7.0,))})
    assert run.at("hessian/trace") == 7.0
    assert run.at("hessian/trace", "epochs", 1) is None


def test_a_run_that_ended_early_counts_where_it_came_to() -> None:
    run = record(status="KILLED", accuracy__test=[0.1, 0.2])
    assert not run.counts("epochs", None)
    assert run.counts("epochs", 2)
    assert not run.counts("epochs", 3)
    assert record(accuracy__test=[0.1]).counts("epochs", 3)


def test_settings_are_equal_in_all_but_the_seed_and_bookkeeping() -> None:
    runs = [synthetic.run("sam", seed=seed) for seed in (0, 1)] + [synthetic.run("sam", rho=0.2)]
    moved = dict(runs[1].params) | {"checkpoint.keep": "9"}
    runs[1] = dataclasses.replace(runs[1], params=moved)
    found = settings(runs)
    assert [len(setting.runs) for setting in found] == [2, 1]
    assert [setting.label for setting in found] == ["sam rho=0.03", "sam rho=0.2"]


def test_sgd_has_one_setting_whatever_rho_says() -> None:
    found = settings([synthetic.run("sgd", rho=0.1), synthetic.run("sgd", rho=0.2, seed=1), synthetic.run("sam")])
    assert [(setting.label, len(setting.runs)) for setting in found] == [("sgd", 2), ("sam", 1)]


def test_a_seed_that_was_run_twice_counts_once_with_its_newest_run() -> None:
    twice = [record(0, started=5, accuracy__test=[0.5]), record(0, started=1, accuracy__test=[0.4])]
    setting = settings([*twice, record(1, accuracy__test=[0.7])])[0]
    assert setting.values("accuracy/test") == {0: 0.5, 1: 0.7}


def test_nan_is_no_value() -> None:
    setting = settings([record(0, loss__test=[math.nan]), record(1, loss__test=[0.5])])[0]
    assert setting.values("loss/test") == {1: 0.5}


def test_the_common_budget_is_that_of_the_finished_run_with_least() -> None:
    runs = [record(0, seconds=[1.0, 9.0]), record(1, seconds=[4.0]), record(2, status="KILLED", seconds=[0.5])]
    assert results.common_budget(runs, "seconds") == 4.0
    assert results.common_budget(runs[2:], "seconds") is None
    assert results.common_budget(runs[:2], "gradient_evaluations") is None


def test_settings_are_chosen_on_validation_data() -> None:
    assert results.selection_metric("accuracy/test") == "accuracy/validation"
    assert results.selection_metric("loss/test") == "loss/validation"
    assert results.selection_metric("accuracy/early_test") == "accuracy/early_validation"
    assert results.selection_metric("sharpness") == "accuracy/validation"
    assert isinstance(Setting({}, "x", ()).measure, str)
    assert Interval(1.0, 0.5, 1.5, 3).half_width == 0.5


def test_settings_are_written_short_and_alike_everywhere() -> None:
    keys = ["optimizer.n_samples", "optimizer.base.lr", "data.name", "optimizer.measure", "a.every", "b.every"]
    assert short_names(keys) == ["n", "lr", "data", "measure", "a.every", "b.every"]
    assert [brief(value) for value in (0.0123456, "0.0123456", 5000, "5000", "word", True, 1e-5)] == [
        "0.0123",
        "0.0123",
        "5000",
        "5000",
        "word",
        "true",
        "1e-05",
    ]
    assert brief({"name": "asam", "eta": 0.0123456}, digits=6) == "asam eta=0.0123456"
