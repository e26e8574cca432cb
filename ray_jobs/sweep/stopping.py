"""The stopping that a sweep file names."""

from __future__ import annotations

import itertools

from ray_jobs.sweep.population import Exploit, Population
from ray_jobs.sweep.rungs import Asha, Median
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.sections import AshaStopping, MedianStopping, NoStopping, PbtStopping, SweepConfig
from ray_jobs.sweep.trajectory import Axis, Continue, Cut, Pending, Point, Stopping, Trajectory, Verdict

__all__ = [
    "Continue",
    "Cut",
    "Exploit",
    "Pending",
    "Point",
    "Population",
    "Stopping",
    "Trajectory",
    "Verdict",
    "make_stopping",
]


def make_stopping(sweep: SweepConfig) -> Stopping:
    """The rule that cuts trials, or a `Population`."""
    budget = sweep.budget if sweep.resource == "seconds" else None
    stopping = sweep.stopping
    if isinstance(stopping, NoStopping):
        return Stopping(Axis(sweep.mode, sweep.resource, budget=budget))
    axis = Axis(sweep.mode, sweep.resource, sweep.last_rung, budget)
    match stopping:
        case AshaStopping():
            return Asha(axis, stopping.first_rung, stopping.eta)
        case MedianStopping():
            return Median(axis, stopping.first_rung, stopping.every or stopping.first_rung, stopping.grace_trials)
        case PbtStopping():
            levels = (stopping.every * (k + 1) for k in itertools.count())
            boundaries = list(itertools.takewhile(lambda level: level <= axis.top, levels))
            bounds = {key: sweep.space[key][0].ends for key in sweep.space}
            members = make_search(sweep, 1).n_trials
            return Population(axis, members, boundaries, stopping.quantile, bounds, stopping.seed)
