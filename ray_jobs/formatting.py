"""How numbers and settings are written in tables, so that the terminal and the report say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_jobs.progress import duration
from ray_jobs.yaml_source import shown as as_yaml

if TYPE_CHECKING:
    from ray_jobs.results import Interval


def shown(metric: str, value: float) -> str:
    """Per cent with two decimals for accuracies, else three digits; "-" for what is not a number."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2%}" if metric.startswith("accuracy") else f"{value:.3g}"


def shown_interval(metric: str, over: Interval) -> str:
    """92.1 to 93.4; "-" for one seed."""
    if over.n == 1:
        return "-"
    if metric.startswith("accuracy"):
        return f"{100 * over.low:.2f} to {100 * over.high:.2f}"
    return f"{over.low:.3g} to {over.high:.3g}"


def difference(metric: str, value: float) -> str:
    """Percentage points for accuracies."""
    return f"{100 * value:+.2f}" if metric.startswith("accuracy") else f"{value:+.3g}"


def p_value(p: float) -> str:
    """Two digits are more than a few seeds can carry."""
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def axis_value(axis: str, value: float) -> str:
    """2,240 evaluations as 2,240; 75 seconds as 1:15, 36 seconds as 36 s."""
    if not math.isfinite(value):
        return "-"
    if axis == "seconds":
        return duration(value) if round(value) >= 60 else f"{value:.2g} s"
    return f"{value:,.0f}"


# settings


def short(key: str) -> str:
    """optimizer.base.lr -> lr, optimizer.n_samples -> n, data.name -> data."""
    head, _, last = key.rpartition(".")
    if last == "name" and head:
        return short(head)
    return "n" if last == "n_samples" else last


def short_names(keys: Sequence[str]) -> list[str]:
    """The short name of each key; the whole key where another has the same short name."""
    names = [short(key) for key in keys]
    return [name if names.count(name) == 1 else key for key, name in zip(keys, names, strict=True)]


def brief(value: Any, digits: int = 3) -> str:
    """A setting's value: real numbers to so many digits, also where MLflow has them as text; a section in words."""
    if isinstance(value, dict):
        parts = (f"{'' if key == 'name' else f'{key}='}{brief(part, digits)}" for key, part in value.items())
        return " ".join(parts)
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return _brief_text(value, digits) if isinstance(value, str) else as_yaml(value)


def _brief_text(text: str, digits: int) -> str:
    try:
        number = float(text)
    except ValueError:
        return text
    return text if text.lstrip("+-").isdecimal() else f"{number:.{digits}g}"
