"""The study in pictures: the test loss of each method against that of the base optimizer and that of SAM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from design import BASELINES
from matplotlib.axes import Axes
from page import Differences, Found, Results, by_method, differences

from ray_jobs.figures.style import COLORS, figure, save, styled, title

METRIC = "loss/early_test"
TOLD = {"base": "the base", "sam": "SAM"}
TICKS = (-100, -30, -10, 0, 10, 30, 100)
LINEAR = 10.0
"""Per cent: beyond it the axis is logarithmic, since what ends far too early is worse by more than all else differs."""


def draw(found: Found, folder: Path) -> list[Path]:
    """Differences of test loss with 95 % intervals, filled where p < 0.05 (Holm): a picture for each thing held equal.

    They are in per cent of the baseline's mean test loss. Writes which-member-equal-....png and .svg.
    """
    compared = differences(found)
    return [path for equal, tasks in found.items() if tasks for path in _draw(equal, tasks, compared, folder)]


def _draw(equal: str, tasks: Mapping[str, Results], compared: Differences, folder: Path) -> list[Path]:
    methods = {task: by_method(results.final) for task, results in tasks.items()}
    rows = [(task, method) for task, of in methods.items() for method in ("", *of) if method != BASELINES[0]]
    with styled():
        drawn = figure(9.0, 1.2 + 0.23 * len(rows))
        panels = drawn.subplots(1, len(BASELINES), sharey=True)
        for panel, baseline in zip(panels, BASELINES, strict=True):
            for height, (task, method) in enumerate(rows):
                test, p = compared.get((equal, task, method, baseline, METRIC), (None, 1.0))
                if test is None:
                    continue
                losses = methods[task][baseline].values(METRIC).values()
                scale = 100 * len(losses) / math.fsum(losses)
                color = COLORS[list(tasks).index(task) % len(COLORS)]
                ends = [scale * test.interval.low, scale * test.interval.high]
                panel.plot(ends, [height, height], color=color, linewidth=2)
                face = color if p < 0.05 else "white"
                panel.plot([scale * test.difference], [height], "o", color=color, markerfacecolor=face, markersize=6)
            _axis(panel, TOLD[baseline])
        panels[0].set_yticks(range(len(rows)), [f"   {method}" if method else task for task, method in rows])
        panels[0].invert_yaxis()
        drawn.supxlabel(f"at {equal}; 95 % intervals over seeds; filled: p < 0.05 after Holm's correction")
    return save(drawn, folder, f"which-member-{equal.replace(' ', '-')}")


def _axis(panel: Axes, baseline: str) -> None:
    title(panel, f"test loss against {baseline}, %")
    panel.axvline(0, color="#444444", linewidth=1)
    panel.set_xscale("symlog", linthresh=LINEAR)
    low, high = panel.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("◀ better        worse ▶")
