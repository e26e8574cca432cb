"""The study's tables from what its runs measured. Pure: records in, Markdown out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from curvature import AtLoss, at_equal_loss
from design import BASELINES, METRIC
from seconds import WORKERS, Ratios

from ray_jobs.formatting import difference, p_value, shown
from ray_jobs.results import Paired, RunRecord, Setting, holm, interval, paired, settings

MEASURED = {
    "accuracy/early_test": "test accuracy",
    "loss/early_test": "test loss",
    "ece/early_test": "ECE",
    "loss/early_train": "train loss",
    "early_epoch": "epoch",
    "gradient_evaluations": "evaluations",
}
COMPARED = ("accuracy/early_test", "loss/early_test")
RATE = "optimizer.base.lr"
DRAWN = {RATE: RATE, "optimizer.rho": "rho", "optimizer.lam": "lam", "optimizer.n_samples": "n_samples"}
"""Dotted keys, and what MLflow calls them."""
Difference = tuple[str, str, str, str, str]
"""What is equal, task, method, baseline, metric."""
Differences = Mapping[Difference, tuple[Paired, float]]
Found = Mapping[str, Mapping[str, "Results"]]
"""What is equal -> task -> results."""


@dataclass(frozen=True)
class Results:
    """Of one task. tuned and final: the trials of its two sweeps. seconds: as `seconds.ratios` has them."""

    tuned: Sequence[RunRecord]
    final: Sequence[RunRecord]
    seconds: Ratios


def page(found: Found) -> str:
    """What tuning found, then for each task means, differences to the baselines seed by seed, curvature and cost.

    Intervals are of 95 %, over seeds. p is corrected, by Holm's method, for all differences on the page.
    """
    compared = differences(found)
    parts = []
    for equal, tasks in found.items():
        parts += [
            f"# At {equal}\n",
            "## Tuning: the lowest validation loss of each method, over the base optimizer's\n",
        ]
        parts += [*_tuning({task: lowest(results.tuned) for task, results in tasks.items()}), ""]
        for task, results in tasks.items():
            methods = by_method(results.final)
            parts += [f"## {task}, at {equal}\n", *_means(methods, results.seconds), ""]
            parts += [*_differences(equal, task, methods, compared), ""]
            parts += [*_curvature(at_equal_loss(methods)), ""]
    return "\n".join(parts)


def method_of(setting: Setting) -> str:
    """Its name in the design: the description of its run, which MLflow has as a note."""
    return setting.runs[0].tags["mlflow.note.content"]


def drawn(setting: Setting) -> dict[str, float | int]:
    """What tuning chose for a method: dotted key -> value."""
    keys = DRAWN if setting.measure != "sgd" else (RATE,)
    return {key: _number(setting.params[DRAWN[key]]) for key in keys}


def by_method(records: Sequence[RunRecord]) -> dict[str, Setting]:
    """Method -> its one setting of a final sweep."""
    return {method_of(setting): setting for setting in settings(records)}


def best(records: Sequence[RunRecord]) -> dict[str, tuple[float, Setting]]:
    """Method -> the lowest validation loss of its settings in tuning, and the setting."""
    found: dict[str, tuple[float, Setting]] = {}
    for setting in settings(records):
        values = list(setting.values(METRIC).values())
        method = method_of(setting)
        if values and (method not in found or values[0] < found[method][0]):
            found[method] = (values[0], setting)
    return found


def lowest(records: Sequence[RunRecord]) -> dict[str, float]:
    """Method -> the lowest validation loss of its settings in tuning."""
    return {method: loss for method, (loss, _) in best(records).items()}


def differences(found: Found) -> dict[Difference, tuple[Paired, float]]:
    """Each difference of final runs to a baseline, with its p after Holm's correction over all of them."""
    tests: dict[Difference, Paired] = {}
    for equal, tasks in found.items():
        for task, results in tasks.items():
            methods = by_method(results.final)
            for baseline, method in product(BASELINES, methods):
                if baseline not in methods or method == baseline or (method, baseline) == BASELINES:
                    continue
                for metric in COMPARED:
                    if (test := paired(methods[method], methods[baseline], metric)) is not None:
                        tests[equal, task, method, baseline, metric] = test
    adjusted = holm([test.p for test in tests.values()])
    return {key: (test, p) for (key, test), p in zip(tests.items(), adjusted, strict=True)}


def _tuning(tasks: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sorted by the geometric mean over the tasks that a method is there for."""
    rows = []
    for method in dict.fromkeys(method for losses in tasks.values() for method in losses):
        ratios = {
            t: losses[method] / losses["base"] for t, losses in tasks.items() if {method, "base"} <= losses.keys()
        }
        if ratios:
            mean = math.exp(math.fsum(map(math.log, ratios.values())) / len(ratios))
            cells = [f"{ratios[task]:.2f}" if task in ratios else "-" for task in tasks]
            rows.append((mean, _row([method, *cells, f"{mean:.2f}"])))
    head = ["method", *tasks, "geometric mean"]
    return [_row(head), _row(["---"] * len(head)), *(line for _, line in sorted(rows))]


def _means(methods: Mapping[str, Setting], seconds: Ratios) -> list[str]:
    steps = [f"a step on {workers} worker{'s' if workers > 1 else ''}" for workers in WORKERS]
    head = ["method", "setting", *MEASURED.values(), *steps, "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    for method, setting in methods.items():
        cells = [", ".join(f"{key.rpartition('.')[2]} {value:.3g}" for key, value in drawn(setting).items())]
        for metric in MEASURED:
            values = list(setting.values(metric).values())
            cells.append(_interval(metric, values) if values else "-")
        times = seconds.get(method, {})
        cells += [f"{times[workers]:.2f}" if workers in times else "-" for workers in WORKERS]
        lines.append(_row([method, *cells, str(len(setting.by_seed))]))
    return lines


def _interval(metric: str, values: Sequence[float]) -> str:
    over = interval(values)
    told = f"{over.mean:,.0f}" if metric == "gradient_evaluations" else shown(metric, over.mean)
    if not over.half_width > 1e-9 * abs(over.mean):  # one seed, or sums of the same floats in another order
        return told
    half = f"{100 * over.half_width:.2f}" if metric.startswith("accuracy") else f"{over.half_width:.2g}"
    return f"{told} ± {half}"


def _differences(equal: str, task: str, methods: Mapping[str, Setting], compared: Differences) -> list[str]:
    heads = ["method", "against"]
    for metric in COMPARED:
        heads += [f"{MEASURED[metric]}: difference", "95 % interval", "p (Holm)"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for method in methods:
        for baseline in BASELINES:
            cells = []
            for metric in COMPARED:
                test, p = compared.get((equal, task, method, baseline, metric), (None, math.nan))
                if test is not None:
                    ends = [difference(metric, end) if math.isfinite(end) else "-" for end in _ends(test)]
                    cells += [difference(metric, test.difference), " to ".join(ends), p_value(p)]
            if cells:
                lines.append(_row([method, baseline, *cells]))
    return lines


def _curvature(found: Mapping[str, AtLoss]) -> list[str]:
    if not found:
        return ["The Hessian was not measured where all methods had the same training loss."]
    level = next(iter(found.values())).loss
    head = [
        "method",
        "squared Frobenius norm",
        "95 % interval",
        "trace",
        "95 % interval",
        "error of the probes",
        "seeds",
    ]
    lines = [f"At the training loss {level:.3g}, which every seed of every method came down to:\n"]
    lines += [_row(head), _row(["---"] * len(head))]
    for method, at in found.items():
        norm, trace = at.frobenius, at.trace
        cells = [f"{norm.mean:.3g}", f"{norm.low:.3g} to {norm.high:.3g}"]
        cells += [f"{trace.mean:.3g}", f"{trace.low:.3g} to {trace.high:.3g}", f"{at.probes:.0%}", str(norm.n)]
        lines.append(_row([method, *cells]))
    return lines


def _number(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def _ends(test: Paired) -> tuple[float, float]:
    return test.interval.low, test.interval.high


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
