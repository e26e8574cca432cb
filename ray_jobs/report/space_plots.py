"""Figures of the space that a sweep went through: rho x lam, parallel coordinates, every trial's curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray_jobs.formatting import brief, short
from ray_jobs.report.content import mean_of, parameter, state
from ray_jobs.report.plots import Figure, describe, layout, log_axis, rounded, tick_format, title
from ray_jobs.results import RunRecord, Setting, settings

MOST_COLUMNS, MOST_ROWS = 8, 12  # of a heat map that still shows its numbers
SCALE = "Viridis"  # reads the same with every colour vision


@dataclass(frozen=True)
class Map:
    """A figure for one measure and one n."""

    heading: str
    figure: Figure


def maps(records: Sequence[RunRecord], metric: str, mode: str) -> list[Map]:
    """The metric over rho and lam for each measure and n that was run at several; mean over seeds.

    Where a grid was run: a heat map. Where rho and lam were drawn: a dot for each setting. Where lam is one: a line.
    """
    groups: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings(records):
        if math.isfinite(mean_of(setting, metric)) and "rho" in setting.params and "lam" in setting.params:
            groups.setdefault((setting.measure, setting.params.get("n_samples", "")), []).append(setting)
    values = [mean_of(setting, metric) for group in groups.values() for setting in group]
    if not values:
        return []
    bounds = _bounds(values, mode)
    return [
        Map(f"{measure}, n = {n}", figure)
        for (measure, n), group in sorted(groups.items(), key=lambda item: (item[0][0], _number(item[0][1])))
        if (figure := _map(group, metric, bounds, mode)) is not None
    ]


def _bounds(values: Sequence[float], mode: str) -> tuple[float, float]:
    """Of the colours: the better three quarters of the values, so that one that diverged does not flatten the rest."""
    ordered = sorted(values, reverse=mode == "min")
    cut, end = ordered[len(ordered) // 4], ordered[-1]
    low, high = min(cut, end), max(cut, end)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _map(group: Sequence[Setting], metric: str, bounds: tuple[float, float], mode: str) -> Figure | None:
    rhos, lams = (sorted({float(s.params[key]) for s in group}) for key in ("rho", "lam"))
    if len(rhos) < 2 and len(lams) < 2:
        return None
    if len(rhos) < 2 or len(lams) < 2:
        return _line(group, metric, "rho" if len(rhos) > 1 else "lam")
    if len(rhos) * len(lams) <= 2 * len({(s.params["rho"], s.params["lam"]) for s in group}):
        return _heat_map(group, rhos, lams, metric, bounds, mode)
    return _cloud(group, metric, bounds)


def _heat_map(
    group: Sequence[Setting],
    rhos: Sequence[float],
    lams: Sequence[float],
    metric: str,
    bounds: tuple[float, float],
    mode: str,
) -> Figure:
    cells: dict[tuple[float, float], float] = {}
    for setting in group:  # what else differs is shown at its best
        at = float(setting.params["rho"]), float(setting.params["lam"])
        pick = max if mode == "max" else min
        cells[at] = pick(mean_of(setting, metric), cells.get(at, mean_of(setting, metric)))
    best = (max if mode == "max" else min)(cells, key=cells.__getitem__)
    x, y = map(_names, (rhos, lams))
    rows = [[cells.get((rho, lam), math.nan) for rho in rhos] for lam in lams]
    shown = len(rhos) <= MOST_COLUMNS and len(lams) <= MOST_ROWS
    return {
        "data": [
            {
                "type": "heatmap",
                "x": x,
                "y": y,
                "z": [rounded(row) for row in rows],
                "customdata": [[f"{lam * rho**2:.3g}" for rho in rhos] for lam in lams],
                "colorscale": SCALE,
                "zmin": bounds[0],
                "zmax": bounds[1],
                "reversescale": mode == "min",
                "showscale": not shown,
                "colorbar": _colour_bar(metric),
                "texttemplate": f"%{{z:{_cell_format(metric)}}}" if shown else "",
                "textfont": {"size": 11},
                "xgap": 2,
                "ygap": 2,
                "hovertemplate": f"rho %{{x}}, lam %{{y}}<br>s = lam rho² = %{{customdata}}<br>{title(metric)} "
                f"%{{z:{tick_format(metric)}}}<extra></extra>",
            },
        ],
        "layout": layout(
            "rho",
            "lam",
            xaxis={"type": "category", "showgrid": False, "ticks": "", "tickangle": 0 if len(rhos) <= 5 else -90},
            yaxis={"type": "category", "showgrid": False, "ticks": ""},
            shapes=[_frame(rhos.index(best[0]), lams.index(best[1]))],
        ),
    }


def _names(values: Sequence[float]) -> list[str]:
    """Three digits tell the columns of a map apart, or else all digits do."""
    names = [f"{value:.3g}" for value in values]
    return names if len(set(names)) == len(names) else [f"{value:g}" for value in values]


def _frame(column: int, row: int) -> Figure:
    """Around the best cell."""
    box = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    return {"type": "rect", "xref": "x", "yref": "y", **box, "line": {"color": "--mark", "width": 3}}


def _cell_format(metric: str) -> str:
    return ".1%" if metric.startswith("accuracy") else ".2~g"


def _colour_bar(metric: str) -> Figure:
    return {
        "title": {"text": title(metric), "side": "right"},
        "thickness": 12,
        "outlinewidth": 0,
        "tickformat": tick_format(metric),
        "tickfont": {"color": "--ink-soft"},
    }


def _cloud(group: Sequence[Setting], metric: str, bounds: tuple[float, float]) -> Figure:
    """Settings as dots on logarithmic axes, and lines of equal strength."""
    rhos, lams = ([float(s.params[key]) for s in group] for key in ("rho", "lam"))
    positive = min(lams) > 0
    lines = _strength_lines(rhos, lams) if positive else []
    return {
        "data": [
            *lines,
            {
                "type": "scatter",
                "mode": "markers",
                "x": rounded(rhos),
                "y": rounded(lams),
                "text": [f"{s.label}<br>s = lam rho² = {float(s.params['strength']):.3g}" for s in group],
                "marker": {
                    "size": 11,
                    "color": rounded([mean_of(s, metric) for s in group]),
                    "cmin": bounds[0],
                    "cmax": bounds[1],
                    "colorscale": SCALE,
                    "showscale": True,
                    "colorbar": _colour_bar(metric),
                    "line": {"color": "--surface", "width": 1},
                },
                "hovertemplate": f"%{{text}}<br>%{{marker.color:{tick_format(metric)}}}<extra></extra>",
            },
        ],
        "layout": layout(
            "rho",
            "lam",
            hovermode="closest",
            xaxis=log_axis(rhos),
            yaxis=log_axis(lams) if positive else {},
        ),
    }


def _strength_lines(rhos: Sequence[float], lams: Sequence[float]) -> list[Figure]:
    """lam = s / rho^2 for the powers of ten, every second one: settings along one act alike."""
    low = math.ceil(math.log10(min(lams) * min(rhos) ** 2))
    high = math.floor(math.log10(max(lams) * max(rhos) ** 2))
    ends = [min(rhos), max(rhos)]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": rounded(ends),
            "y": rounded([10.0**power / rho**2 for rho in ends]),
            "line": {"color": "--grid", "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
        }
        for power in range(low, high + 1, 2)
    ]


def _line(group: Sequence[Setting], metric: str, key: str) -> Figure:
    points = sorted((float(setting.params[key]), mean_of(setting, metric)) for setting in group)
    positive = points[0][0] > 0
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": rounded([x for x, _ in points]),
                "y": rounded([y for _, y in points]),
                "line": {"color": "--series-0", "width": 2},
                "marker": {"size": 8},
                "hovertemplate": f"%{{x:.3~g}}: %{{y:{tick_format(metric)}}}<extra></extra>",
            }
        ],
        "layout": layout(
            key,
            title(metric),
            xaxis=log_axis([x for x, _ in points]) if positive else {},
            yaxis={"tickformat": tick_format(metric)},
        ),
    }


def parallel(records: Sequence[RunRecord], keys: Sequence[str], metric: str, mode: str) -> Figure | None:
    """A line for each trial through its parameters to its metric; None with fewer than two trials to tell apart."""
    runs = [run for run in records if (value := run.at(metric)) is not None and math.isfinite(value)]
    if len(runs) < 2 or not keys:
        return None
    values = [float(run.at(metric) or 0.0) for run in runs]
    low, high = _bounds(values, mode)
    dimensions = [_dimension(key, [parameter(run, key) for run in runs]) for key in keys]
    longest = max(map(len, dimensions[0].get("ticktext", [""])))
    dimensions.append({"label": title(metric), "values": rounded(values), "tickformat": tick_format(metric)})
    return {
        "data": [
            {
                "type": "parcoords",
                "dimensions": dimensions,
                "line": {
                    "color": rounded(values),
                    "colorscale": SCALE,
                    "cmin": low,
                    "cmax": high,
                    "reversescale": mode == "min",
                },
                "labelfont": {"color": "--ink", "size": 12},
                "tickfont": {"color": "--ink-soft", "size": 11},
                "rangefont": {"color": "rgba(0,0,0,0)", "size": 1},
            }
        ],
        "layout": layout(
            "", "", margin={"l": max(64, 12 + 7 * longest), "r": max(64, 4 * len(title(metric))), "t": 44, "b": 16}
        ),
    }


def _dimension(key: str, texts: Sequence[str | None]) -> Figure:
    """Numbers as they are or by their logarithm, words by their order; what a trial does not have lies below."""
    label = short(key)
    known = [text for text in texts if text is not None]
    numbers = [_number(text) for text in known]
    if not all(map(math.isfinite, numbers)) or len(set(known)) <= 2:
        words = sorted(set(known), key=lambda text: (_number(text), text)) + ["-"] * (len(known) < len(texts))
        places = [words.index("-" if text is None else text) for text in texts]
        return {
            "label": label,
            "values": places,
            "tickvals": list(range(len(words))),
            "ticktext": [brief(word, 6) for word in words],
        }
    positive = [number for number in numbers if number > 0]
    log = min(numbers) >= 0 and max(positive) >= 20 * min(positive)
    scaled = [_log10(number) if log else number for number in numbers]
    finite = [value for value in scaled if math.isfinite(value)]
    low, high = min(finite), max(finite)
    below = low - 0.12 * (high - low)  # where what a trial does not have lies, and 0 on a logarithmic axis
    walk = iter(scaled)
    values = [below if text is None else max(below, next(walk)) for text in texts]
    ticks = {max(below, place): f"{number:.3g}" for place, number in zip(scaled, numbers, strict=True)}
    if len(ticks) > 8:
        rounds = range(math.ceil(low), math.floor(high) + 1) if log else ()
        ticks = {float(power): f"{10.0**power:g}" for power in rounds} or {low: f"{low:g}", high: f"{high:g}"}
    if len(known) < len(texts):
        ticks[below] = "-"
    return {"label": label, "values": rounded(values), "tickvals": rounded(list(ticks)), "ticktext": [*ticks.values()]}


def _log10(number: float) -> float:
    return math.log10(number) if number > 0 else -math.inf


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def trials(records: Sequence[RunRecord], metric: str) -> Figure:
    """Every trial's curve by how it ended, thin, and a dot where it was stopped or failed."""
    looks = {
        "finished": ("--series-0", "circle"),
        "stopped": ("--series-1", "x"),
        "failed": ("--series-2", "diamond"),
        "interrupted": ("--series-2", "square"),
        "running": ("--series-3", "circle"),
    }
    data: list[Figure] = []
    for name, (shade, symbol) in looks.items():
        x: list[float | None] = []
        y: list[float | None] = []
        last: list[tuple[float, float, RunRecord]] = []
        for run in records:
            curve = run.curves.get(metric)
            if curve is None or state(run) != name:
                continue
            x += [*curve.epochs, None]
            y += [*rounded(curve.values), None]
            last.append((curve.epochs[-1], curve.values[-1], run))
        if not last:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": x,
                "y": y,
                "line": {"color": f"{shade}/0.35", "width": 1},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "showlegend": True,
                "x": [epoch for epoch, _, _ in last],
                "y": rounded([value for _, value, _ in last]),
                "text": [describe(run) for _, _, run in last],
                "marker": {"color": shade, "symbol": symbol, "size": 6},
                "hovertemplate": f"%{{text}}<br>epoch %{{x}}: %{{y:{tick_format(metric)}}}<extra>{name}</extra>",
            }
        )
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"color": "--ink-soft"}}
    return {
        "data": data,
        "layout": layout(
            "epochs",
            title(metric),
            hovermode="closest",
            showlegend=True,
            legend=legend,
            yaxis={"tickformat": tick_format(metric)},
        ),
    }
