"""How numbers are written in tables, so that the terminal and the report say the same."""

from __future__ import annotations

import math

from ray_jobs.progress import duration
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
    """2,240 evaluations as 2,240; 75 seconds as 1:15."""
    if not math.isfinite(value):
        return "-"
    if axis == "seconds":
        return duration(value) if value >= 10 else f"{value:.2g} s"
    return f"{value:,.0f}"
