"""The page: content and figures in one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2
from markupsafe import Markup

import phisam
from ray_jobs import compare
from ray_jobs.errors import RunError
from ray_jobs.report import content, plots, space_plots, tables
from ray_jobs.report.content import TEST, Method
from ray_jobs.results import AXES, SEED, RunRecord, settings

MOST_AXES = 8  # of the parallel coordinates: what else differs is in the table of trials
SCRIPT = "plotly.min.js"
"""Of pages that share one."""
LEAST_WIDTH, LETTER = 96, 8  # pixels that an axis of the parallel coordinates takes, and a letter of its name


def page(
    parent: RunRecord,
    trials: Sequence[RunRecord],
    metric: str,
    mode: str,
    description: str | None = None,
    shared: bool = False,
) -> str:
    """A sweep as one HTML page that loads nothing from a network.

    Args:
        metric, mode: what the sweep optimised, "max" or "min".
        description: the text of its sweep.yaml.
        shared: `plotly()` is not in the page, but in the file SCRIPT beside it.
    """
    figures: dict[str, plots.Figure] = {}
    parts = [
        _part(index, name, parent, group, metric, mode, figures)
        for index, (name, group) in enumerate(compare.problems(trials).items())
    ]
    figures["trial-curves"] = space_plots.trials(trials, metric)
    head, words, rows = tables.trials(trials, metric)
    return _template().render(
        name=parent.name,
        summary=_summary(trials),
        parts=parts,
        metric_title=plots.title(metric),
        stopping_text=tables.stopping_text(trials),
        trial_curves=[_named("trial-curves", f"{plots.title(metric)} of every trial".capitalize())],
        costs=tables.costs(trials),
        trials={"head": head, "words": words, "rows": rows},
        commands=tables.commands(parent),
        description=description,
        environment=content.environment(trials),
        version=phisam.__version__,
        figures=Markup(json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
        css=Markup(_own("page.css")),
        js=Markup(_own("page.js")),
        script=SCRIPT,
        plotly=None if shared else Markup(plotly()),
    )


def _summary(trials: Sequence[RunRecord]) -> str:
    """How many trials ended how, and what they took."""
    ends = ", ".join(f"{count} {name}" for name, count in content.states(trials).items())
    spent = content.cost(trials)
    return (
        f"{len(trials)} trials ({ends}); {spent.gradient_evaluations:,.0f} gradient evaluations, "
        f"{spent.device_hours:.3g} device-hours of training."
    )


def _part(
    index: int,
    name: str,
    parent: RunRecord,
    records: Sequence[RunRecord],
    metric: str,
    mode: str,
    figures: dict[str, plots.Figure],
) -> dict[str, Any]:
    """One problem's section; adds its figures."""
    found = content.methods(records, metric, mode)
    shown = TEST if any(TEST in run.curves for run in records) else metric

    def add(kind: str, figure: plots.Figure, caption: str, aside: str = "") -> dict[str, str]:
        figures[f"{kind}-{index}"] = figure
        return _named(f"{kind}-{index}", caption, aside)

    aside = "mean and 95 % band"
    title = plots.title(shown).capitalize()
    sharp, sharp_text = _sharpness(records, shown, add)
    maps = space_plots.maps(records, metric, mode)
    keys = content.trial_parameters(records)
    axes = content.most_varied(records, [key for key in keys if key != SEED], MOST_AXES)
    parallel = space_plots.parallel(records, axes, metric, mode)
    if parallel is not None:
        add("parallel", parallel, "")
    return {
        "id": f"part-{index}",
        "name": name,
        "winner": tables.winner(content.winner(parent, records, metric, mode), metric, len(settings(records))),
        "tables": _tables(index, records, found, shown, parent.params.get("resource")),
        "curves": [
            add("evaluations", plots.curves(found, shown, "gradient_evaluations"), f"{title}, by cost", aside),
            add("seconds", plots.curves(found, shown, "seconds"), f"{title}, by training time", aside),
        ],
        "sharpness": sharp,
        "sharpness_text": sharp_text,
        "maps": [add(f"map{i}", drawn.figure, drawn.heading) for i, drawn in enumerate(maps)],
        "maps_text": f"{plots.title(metric).capitalize()}, mean over finished seeds; the same colours in all maps. "
        "What acts is the strength s = lam rho².",
        "parallel": parallel and {"id": f"parallel-{index}", "width": _width(parallel)},
    }


def _width(parallel: plots.Figure) -> int:
    """So many pixels that the names of neighbouring axes do not touch."""
    names = [dimension["label"] for dimension in parallel["data"][0]["dimensions"]]
    return len(names) * max(LEAST_WIDTH, *(LETTER * (len(a) + len(b)) // 2 for a, b in pairwise(names)))


def _sharpness(records: Sequence[RunRecord], shown: str, add: Any) -> tuple[list[dict[str, str]], str]:
    metric = content.sharpness_metric(records)
    order = sorted({run.params.get("measure", "?") for run in records})
    records = [run for run in records if run.status == "FINISHED"] or records  # a stopped one had fewer epochs
    against = plots.sharpness(records, order, metric, shown)
    if not against["data"]:
        return [], ""
    loss = plots.sharpness(records, order, metric, "loss/train", log_y=True)
    name = plots.title(metric)
    told = "It goes to 0 with the training loss, so compare it at equal training loss: the second plot. "
    if metric == "sharpness":
        told += "R_rho is what each measure makes of its own losses: compare it within a measure alone."
    figures = [add("sharpness", against, f"{plots.title(shown).capitalize()} against {name}", "finished trials")]
    if loss["data"]:
        figures.append(add("flatness", loss, f"Training loss against {name}", "finished trials"))
    return figures, told


def _tables(
    index: int, records: Sequence[RunRecord], found: Sequence[Method], metric: str, resource: str | None
) -> list[dict[str, Any]]:
    """The methods at equal epochs, evaluations and time: what the sweep gave its trials equally comes first."""
    if len(found) < 2 or not any(run.status == "FINISHED" for run in records):
        return []
    chosen = {run.run_id for method in found for run in method.setting.runs}
    runs = [run for run in records if run.run_id in chosen]
    base = "sgd" if sum(method.setting.measure == "sgd" for method in found) == 1 else None
    told = []
    for axis in sorted(AXES, key=lambda axis: axis != resource):
        try:
            (done,) = compare.compare(runs, metric, axis, baseline=base)
        except RunError:
            continue
        told.append(tables.methods(f"table-{index}-{axis}", done, found))
    return told


def _named(name: str, caption: str, aside: str = "") -> dict[str, str]:
    return {"id": name, "caption": caption, "aside": aside}


@cache
def _template() -> jinja2.Template:
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_own("page.html"))


def _own(name: str) -> str:
    return (resources.files("ray_jobs") / "report" / name).read_text(encoding="utf-8")


def plotly() -> str:
    """Plotly's own script, whole."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
