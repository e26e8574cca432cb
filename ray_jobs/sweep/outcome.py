"""What a sweep comes to: its settings over their seeds, and the winner on each data set. Pure."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

from rich.table import Table

from ray_jobs.formatting import brief, short_names, shown, shown_interval
from ray_jobs.results import Interval, interval
from ray_jobs.sweep.ledger import Trial
from ray_jobs.sweep.sections import SEED


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


@dataclass(frozen=True)
class Winner:
    """The setting of the best mean, and its best trial."""

    setting: Setting
    trial: Trial

    def told(self, metric: str, data: str) -> tuple[dict[str, str], dict[str, float]]:
        """Tags and metrics of the parent run. data: what stands in their names; "": all trials are on the same."""
        tag, name = (f"phisam.winner.{data}", f"winner/{data}") if data else ("phisam.winner", "winner")
        score, trial = self.setting.score, self.trial
        assert score is not None
        assert trial.value is not None
        metrics = {f"{name}/mean": score.mean, f"{name}/seeds": float(score.n), f"{name}/{metric}": trial.value}
        if score.n > 1:
            metrics |= {f"{name}/low": score.low, f"{name}/high": score.high}
        return {f"{tag}.{key}": str(value) for key, value in trial.values.items()}, metrics


def winner(found: Sequence[Setting], better: Callable[[float, float], bool]) -> Winner | None:
    """The first of equals; None: no trial trained to its end.

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
    return Winner(best, trial)


def best_table(found: Sequence[Setting], metric: str, better: Callable[[float, float], bool], rows: int = 10) -> Table:
    """The best settings, as the terminal shows them."""
    judged = [setting for setting in found if setting.score is not None]
    judged.sort(key=cmp_to_key(lambda a, b: _compare(a, b, better)))
    keys = [key for key in dict.fromkeys(k for s in judged for k in s.values) if _differs(judged, key)]
    table = Table(box=None, pad_edge=False)
    for head in [*short_names(keys), metric, "95 % interval", "seeds", "trials"]:
        table.add_column(head, no_wrap=True)
    for setting in judged[:rows]:
        score = setting.score
        assert score is not None
        numbers = [shown(metric, score.mean), shown_interval(metric, score), str(score.n)]
        trials = _ranges([trial.index for trial in setting.trials])
        table.add_row(*(brief(setting.values.get(key, "")) for key in keys), *numbers, trials)
    return table


def _differs(found: Sequence[Setting], key: str) -> bool:
    return len(found) == 1 or any(setting.values.get(key) != found[0].values.get(key) for setting in found)


def _ranges(numbers: Sequence[int]) -> str:
    """0-4 7 for 0, 1, 2, 3, 4, 7: trials of a setting are neighbours."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _compare(one: Setting, other: Setting, better: Callable[[float, float], bool]) -> int:
    assert one.score is not None
    assert other.score is not None
    return -1 if better(one.score.mean, other.score.mean) else int(better(other.score.mean, one.score.mean))


def as_csv(found: Mapping[str, Sequence[Setting]], metric: str) -> str:
    """The settings, for the parent's artifacts. found: by what they are on."""
    keys = list(dict.fromkeys(key for group in found.values() for setting in group for key in setting.values))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["data", *keys, f"mean of {metric}", "95% low", "95% high", "seeds", "trials"])
    for data, group in found.items():
        for setting in group:
            score = setting.score
            numbers = ["", "", "", 0] if score is None else [score.mean, score.low, score.high, score.n]
            trials = " ".join(str(trial.index) for trial in setting.trials)
            writer.writerow([data, *(setting.values.get(key, "") for key in keys), *numbers, trials])
    return out.getvalue()
