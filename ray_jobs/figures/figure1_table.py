"""What Figure 1's runs gave, as numbers: every epoch in a CSV file, and the two claims' numbers in a Markdown table."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import fmean

from ray_jobs.errors import RunError
from ray_jobs.figures.curves import Band, band
from ray_jobs.figures.figure1 import Setting
from ray_jobs.results import RunRecord

NORM = "hessian/frobenius_squared"
LOSS = "loss/train"
COLUMNS = {  # in the CSV file -> in MLflow
    "frobenius_squared": NORM,
    "frobenius_squared_standard_error": f"{NORM}.standard_error",
    "train_loss": LOSS,
    "test_loss": "loss/test",
    "validation_accuracy": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "gradient_evaluations": "gradient_evaluations",
}
LEVELS = (0.3, 0.1, 0.03, 0.01)  # training losses that norms are compared at
LAST = 5  # epochs at the end that a norm is averaged over: at a constant rate single ones jump


@dataclass(frozen=True)
class Curves:
    """One setting's finished runs, one for each seed."""

    setting: Setting
    records: Sequence[RunRecord]

    def of(self, metric: str) -> list[dict[int, float]]:
        """Epoch -> value, for each seed that has the metric."""
        curves = [record.curves[metric] for record in self.records if metric in record.curves]
        return [dict(zip(curve.epochs, curve.values, strict=True)) for curve in curves]

    def band(self, metric: str) -> Band:
        """Geometric mean and one standard error over seeds; of one seed alone, its value and that of its probes."""
        over_seeds = band(self.of(metric), geometric=True)
        errors = self.of(f"{metric}.standard_error") if len(self.records) == 1 else []
        if not errors:
            return over_seeds
        pairs = list(zip(over_seeds.mean, errors[0].values(), strict=True))
        return replace(over_seeds, low=tuple(m - e for m, e in pairs), high=tuple(m + e for m, e in pairs))

    @property
    def seeds(self) -> list[int]:
        return [record.seed for record in self.records]


def write_csv(curves: Sequence[Curves], path: Path) -> None:
    """A line for each setting, seed and epoch.

    Raises:
        RunError: the file cannot be written.
    """
    settings = ("measure", "rho", "lam", "strength", "n_samples")
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["setting", "label", *settings, "seed", "epoch", *COLUMNS, "run_id"])
            for of_setting in curves:
                for record, seed in zip(of_setting.records, of_setting.seeds, strict=True):
                    columns = [_by_epoch(record, metric) for metric in COLUMNS.values()]
                    for epoch in columns[0]:
                        writer.writerow(
                            [
                                of_setting.setting.key,
                                of_setting.setting.label,
                                *(record.params.get(key, "") for key in settings),
                                seed,
                                epoch,
                                *(f"{column[epoch]:.8g}" if epoch in column else "" for column in columns),
                                record.run_id,
                            ]
                        )
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror})") from None


def table(curves: Sequence[Curves]) -> str:
    """Markdown: a line for each setting, geometric means over seeds of the norm, plain means of the others."""
    header = ["setting", "seeds", "norm after epoch 1", "largest", "mean of the last 5", "last", "train loss"]
    header += ["test loss", "test accuracy", *(f"norm at loss {level:g}" for level in LEVELS)]
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *map(_line, curves)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(curves: Curves) -> list[str]:
    norms = curves.of(NORM)
    mean = curves.band(NORM)
    last = [fmean(list(curve.values())[-LAST:]) for curve in norms]
    peak = max(range(len(mean.mean)), key=lambda index: mean.mean[index])
    losses, test_losses, accuracies = (curves.of(metric) for metric in (LOSS, "loss/test", "accuracy/test"))
    at_levels = [norms_at(level, losses, norms) for level in LEVELS]
    return [
        curves.setting.label,
        str(len(norms)),
        f"{mean.mean[0]:.3g}",
        f"{mean.mean[peak]:.3g} (epoch {mean.epochs[peak]})",
        f"{geometric(last):.3g}",
        f"{mean.mean[-1]:.3g} ({mean.low[-1]:.2g} to {mean.high[-1]:.2g})",
        f"{_last(losses):.2g}",
        f"{_last(test_losses):.3f}",
        f"{_last(accuracies):.1%}",
        *(f"{geometric(values):.3g}{_of(values, norms)}" if values else "" for values in at_levels),
    ]


def norms_at(level: float, losses: Sequence[Mapping[int, float]], norms: Sequence[Mapping[int, float]]) -> list[float]:
    """Each seed's norm where its training loss first falls to a level, between two epochs on a line in logarithms.

    Seeds that never fall so low, or lie below it after the first epoch already, are left out.
    """
    found = []
    for loss, norm in zip(losses, norms, strict=True):
        epochs = sorted(set(loss) & set(norm))
        for before, after in pairwise(epochs):
            if loss[after] <= level < loss[before]:
                part = log(loss[before] / level) / log(loss[before] / loss[after])
                found.append(exp((1 - part) * log(norm[before]) + part * log(norm[after])))
                break
    return found


def geometric(values: Sequence[float]) -> float:
    """Geometric mean."""
    return exp(fmean(map(log, values)))


def _of(values: Sequence[float], norms: Sequence[object]) -> str:
    return "" if len(values) == len(norms) else f" ({len(values)} of {len(norms)} seeds)"


def _last(curves: Sequence[Mapping[int, float]]) -> float:
    return fmean([curve[max(curve)] for curve in curves])


def _by_epoch(record: RunRecord, metric: str) -> dict[int, float]:
    curve = record.curves.get(metric)
    return {} if curve is None else dict(zip(curve.epochs, curve.values, strict=True))
