"""What a sweep comes to: its settings over their seeds, and the winner. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

from rich.table import Table

from ray_jobs.results import Interval, interval
from ray_jobs.sweep.ledger import Trial
from ray_jobs.sweep.progress import short, shown_value

SEED = "training.seed"


@dataclass(frozen=True)
class Setting:
    """Trials that differ in their seed alone. score: over those that trained to their end; None: there is none."""

    values: Mapping[str, Any]
    trials: tuple[Trial, ...]
    score: Interval | None

    @property
    def finished(self) -> list[Trial]:
        """Those that trained to their end and measured a number."""
        return [t for t in self.trials if t.status == "finished" and t.value is not None and not math.isnan(t.value)]


def settings(trials: Sequence[Trial], setting_of: Callable[[int], int]) -> list[Setting]:
    """In the order of their first trials."""
    groups: dict[int, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[setting_of(trial.index)].append(trial)
    made = []
    for members in groups.values():
        values = {key: value for key, value in members[0].values.items() if key != SEED}
        setting = Setting(values, tuple(members), None)
        scores = [float(trial.value) for trial in setting.finished if trial.value is not None]
        made.append(Setting(values, tuple(members), interval(scores) if scores else None))
    return made


def winner(found: Sequence[Setting], better: Callable[[float, float], bool]) -> tuple[Setting, Trial] | None:
    """The setting of the best mean, and its best trial; the first of equals. None: no trial trained to its end.

    Settings are compared that have the most seeds at their end: one lucky seed of five must not win.
    """
    most = max((len(setting.finished) for setting in found), default=0)
    best: Setting | None = None
    for setting in found:
        if setting.score is None or len(setting.finished) < most:
            continue
        if best is None or best.score is None or better(setting.score.mean, best.score.mean):
            best = setting
    if best is None:
        return None
    trial = best.finished[0]
    for other in best.finished[1:]:
        if better(float(other.value or 0), float(trial.value or 0)):
            trial = other
    return best, trial


def best_table(found: Sequence[Setting], metric: str, better: Callable[[float, float], bool], rows: int = 10) -> Table:
    """The best settings, as the terminal shows them."""
    judged = [setting for setting in found if setting.score is not None]
    judged.sort(key=cmp_to_key(lambda a, b: _compare(a, b, better)))
    keys = list(dict.fromkeys(key for setting in judged for key in setting.values))
    shown = Table(box=None, pad_edge=False)
    for head in [*(short(key) for key in keys), metric, "95 %", "seeds", "trials"]:
        shown.add_column(head, no_wrap=True)
    for setting in judged[:rows]:
        score = setting.score
        assert score is not None
        half = f"± {score.high - score.mean:.4f}" if score.n > 1 else ""
        numbers = [f"{score.mean:.4f}", half, str(score.n), " ".join(str(trial.index) for trial in setting.trials)]
        shown.add_row(*(shown_value(setting.values.get(key, "")) for key in keys), *numbers)
    return shown


def _compare(one: Setting, other: Setting, better: Callable[[float, float], bool]) -> int:
    assert one.score is not None
    assert other.score is not None
    return -1 if better(one.score.mean, other.score.mean) else int(better(other.score.mean, one.score.mean))


def table(found: Sequence[Setting], metric: str) -> str:
    """The settings as CSV, for the parent's artifacts."""
    keys = list(dict.fromkeys(key for setting in found for key in setting.values))
    lines = [",".join([*keys, f"mean of {metric}", "95% low", "95% high", "seeds", "trials"])]
    for setting in found:
        score = setting.score
        numbers = (
            ["", "", "", "0"] if score is None else [repr(score.mean), repr(score.low), repr(score.high), str(score.n)]
        )
        cells = [_cell(setting.values.get(key, "")) for key in keys]
        lines.append(",".join([*cells, *numbers, " ".join(str(trial.index) for trial in setting.trials)]))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\n') else text
