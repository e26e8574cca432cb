"""Figures of methods, as Plotly's JSON. Colours are names of variables in page.css: a figure follows its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray_jobs.report.content import SERIES, Method, band
from ray_jobs.results import RunRecord

Figure = dict[str, Any]

DASHES = ("solid", "solid", "dash", "solid", "dot", "dash", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
assert len(DASHES) == len(SYMBOLS) == SERIES

AXIS_TITLES = {
    "epochs": "epochs",
    "gradient_evaluations": "gradient evaluations",
    "seconds": "training time in seconds",
}
BAND_SEEDS = 3  # two seeds have a band of nine standard deviations, from chance alone
PLOT_HEIGHT = 300  # about what of a figure's height on the page lies between its axes
LABEL_HEIGHT = 15


def colour(series: int, alpha: float | None = None) -> str:
    """--series-3, or --series-3/0.15."""
    return f"--series-{series}" + ("" if alpha is None else f"/{alpha}")


def title(metric: str) -> str:
    """accuracy/test -> test accuracy; loss/early_test -> early-stopped test loss; hessian/trace -> Hessian: trace."""
    kind, _, part = metric.partition("/")
    if kind == "hessian":
        return {"frobenius_squared": "‖H‖²_F"}.get(part, f"Hessian: {part.replace('_', ' ')}")
    if not part:
        return {"sharpness": "R_rho"}.get(kind, kind.replace("_", " "))
    part = f"early-stopped {part.removeprefix('early_')}" if part.startswith("early_") else part
    return f"{part} {kind}" if kind in ("accuracy", "loss") else metric


def tick_format(metric: str) -> str:
    """Per cent for accuracies."""
    return ".3~p" if metric.startswith("accuracy") else ".3~g"


def layout(x_title: str, y_title: str, **more: Any) -> Figure:
    """What all figures share."""
    axis: Figure = {"gridcolor": "--grid", "zerolinecolor": "--grid", "linecolor": "--axis", "ticks": "outside"}
    axis |= {"tickcolor": "--axis", "automargin": True}
    x, y = more.pop("xaxis", {}), more.pop("yaxis", {})
    return {
        "font": {"color": "--ink-soft", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--axis", "font": {"color": "--ink"}, "align": "left"},
        "xaxis": {**axis, "title": {"text": x_title, "standoff": 8}, **x},
        "yaxis": {**axis, "title": {"text": y_title, "standoff": 8}, **y},
        **more,
    }


def log_axis(values: Sequence[float]) -> Figure:
    """A logarithmic axis with as many ticks as it has room for."""
    if not values:
        return {"type": "log"}
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.05 * (high - low) or 0.1
    axis: Figure = {"type": "log", "range": [low - pad, high + pad], "tickformat": ".3~g", "tickangle": 0}
    if high - low < 0.7:  # Plotly's own ticks would run into each other
        return axis | {"tickvals": sorted({float(f"{10 ** (low + (high - low) * k / 2):.2g}") for k in range(3)})}
    return axis | {"dtick": max(1, round((high - low) / 5)) if high - low > 1.6 else "D2"}


def rounded(values: Sequence[float]) -> list[float | None]:
    """Five digits: what a screen shows, at a third of the size. None for what JSON cannot hold."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def curves(methods: Sequence[Method], metric: str, axis: str) -> Figure:
    """Mean over seeds with its 95 % band, a line for each method, labelled at its end."""
    data: list[Figure] = []
    ends: list[tuple[Method, float, float]] = []
    seen: list[float] = []
    for method in methods:
        drawn = band(method.setting, metric, axis)
        if not drawn.x:
            continue
        x, means = rounded(drawn.x), [over.mean for over in drawn.intervals]
        if all(over.n >= BAND_SEEDS for over in drawn.intervals):
            data += _band_traces(method, x, drawn.intervals)
        data.append(
            {
                "type": "scatter",
                "mode": "lines" if len(x) > 1 else "markers",
                "x": x,
                "y": rounded(means),
                "name": method.label,
                "line": {"color": colour(method.series), "width": 2, "dash": DASHES[method.series]},
                "marker": {"color": colour(method.series), "symbol": SYMBOLS[method.series], "size": 8},
                "hovertemplate": f"%{{y:{tick_format(metric)}}} at %{{x:,.4~g}}<extra>{method.label}</extra>",
            }
        )
        ends.append((method, drawn.x[-1], means[-1]))
        seen += means[len(means) // 3 :]  # the first epochs would press the rest together
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bounds = (low - pad, high + pad)
    return {
        "data": data,
        "layout": layout(
            AXIS_TITLES.get(axis, axis),
            title(metric),
            hovermode="closest",
            xaxis={"rangemode": "tozero"},
            yaxis={"range": list(bounds), "tickformat": tick_format(metric)},
            annotations=_end_labels(ends, bounds),
            margin={"l": 8, "r": 14 + 7 * max((len(m.label) for m, *_ in ends), default=0), "t": 8, "b": 8},
        ),
    }


def _band_traces(method: Method, x: Sequence[float | None], intervals: Sequence[Any]) -> list[Figure]:
    shared = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        {**shared, "y": rounded([over.low for over in intervals])},
        {
            **shared,
            "y": rounded([over.high for over in intervals]),
            "fill": "tonexty",
            "fillcolor": colour(method.series, 0.14),
        },
    ]


def _end_labels(ends: Sequence[tuple[Method, float, float]], bounds: tuple[float, float]) -> list[Figure]:
    """Names in the right margin, pushed apart where lines end together, with a thin line to each end."""
    low, high = bounds
    gap = (high - low) * LABEL_HEIGHT / PLOT_HEIGHT
    ordered = sorted(ends, key=lambda end: end[2])
    places: list[float] = []
    for _, _, y in ordered:
        places.append(max(min(y, high), places[-1] + gap if places else low))
    over = max(0.0, places[-1] - high) if places else 0.0
    for i in range(len(places) - 1, -1, -1):  # what was pushed over the top comes back down
        places[i] = min(places[i], (places[i + 1] - gap) if i + 1 < len(places) else places[i] - over)
    return [
        {
            "xref": "paper",
            "x": 1,
            "xanchor": "left",
            "xshift": 4,
            "yref": "y",
            "y": min(max(float(f"{place:.5g}"), low), high),  # Plotly leaves out what lies beyond the axis
            "yanchor": "middle",
            "text": method.label,
            "showarrow": False,
            "font": {"color": colour(method.series), "size": 12},
        }
        for (method, _, _), place in zip(ordered, places, strict=True)
    ]


def sharpness(
    records: Sequence[RunRecord], order: Sequence[str], x_metric: str, y_metric: str, *, log_y: bool = False
) -> Figure:
    """A dot for each trial at its end: sharpness along x, accuracy or training loss along y."""
    data: list[Figure] = []
    for series, measure in enumerate(order):
        dots = []
        for run in records:
            x, y = run.at(x_metric), run.at(y_metric)
            if run.params.get("measure") != measure or x is None or y is None:
                continue
            if math.isfinite(x) and math.isfinite(y) and x > 0 and (y > 0 or not log_y):
                dots.append((x, y, run))
        if not dots:
            continue
        slot = series % SERIES
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": measure,
                "showlegend": True,
                "x": rounded([x for x, _, _ in dots]),
                "y": rounded([y for _, y, _ in dots]),
                "text": [describe(run) for _, _, run in dots],
                "marker": {"color": colour(slot), "symbol": SYMBOLS[slot], "size": 8, "opacity": 0.8},
                "hovertemplate": f"%{{text}}<br>%{{x:.3~g}}, %{{y:{tick_format(y_metric)}}}<extra></extra>",
            }
        )
    return {
        "data": data,
        "layout": layout(
            title(x_metric),
            title(y_metric),
            hovermode="closest",
            showlegend=True,
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"color": "--ink-soft"}},
            xaxis=log_axis([x for trace in data for x in trace["x"]]),
            yaxis=log_axis([y for trace in data for y in trace["y"]])
            if log_y
            else {"tickformat": tick_format(y_metric)},
        ),
    }


def describe(run: RunRecord) -> str:
    """What a trial is, for the hover."""
    parts = [f"{key}={float(run.params[key]):.3g}" for key in ("rho", "lam") if key in run.params]
    number = "" if run.trial is None else f"trial {run.trial}: "
    return f"{number}{run.params.get('measure')} {' '.join(parts)} n={run.params.get('n_samples')} seed {run.seed}"
