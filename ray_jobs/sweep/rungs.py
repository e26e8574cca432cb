"""Which trials are cut before their end: pure functions of what the trials have reported.

Trials are judged at rungs, levels on the resource axis, and in trial order: trial i is compared with the trials j < i
that have reached the rung, whenever they did. So a verdict does not depend on which trial was faster, and a sweep that
is replayed from its reports decides as it did. The price: a verdict may have to wait for an earlier trial. Trial i
trains on meanwhile; if it is cut in the end, what it did beyond the rung does not count.

A verdict does not wait where no outcome of the others could change it.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ray_jobs.sweep.trajectory import Axis, Continue, Cut, Key, Pending, Stopping, Trajectory, Verdict, sort_key


class RungRule(Stopping, ABC):
    """A rule that asks, at each rung, how many of the earlier trials were better there."""

    name: str
    ties: bool
    """Whether an earlier trial with an equal value counts as better."""

    @abstractmethod
    def rungs(self) -> Iterator[float]:
        """Levels up to `axis.top`, ascending; where it is infinite, there may be infinitely many."""

    @abstractmethod
    def survives(self, index: int, better: int, worse: int) -> bool:
        """Whether trial `index` goes on where so many of the earlier trials at the rung were better and worse.

        One more that is better must never save a trial, and one more that is worse never end it.
        """

    @abstractmethod
    def reason(self, rung: float) -> str:
        """Why a trial is cut; the same whenever it is found out."""

    def verdicts(self, trials: Mapping[int, Trajectory]) -> dict[int, Verdict]:
        """In one pass over rungs and trials."""
        found: dict[int, Verdict] = {}
        furthest = max((t.points[-1].resource for t in trials.values() if t.points), default=-math.inf)
        for rung in itertools.takewhile(lambda level: level <= furthest, self.rungs()):
            self._judge(rung, trials, found)
        return {index: found.get(index, Continue()) for index in trials}

    def _judge(self, rung: float, trials: Mapping[int, Trajectory], found: dict[int, Verdict]) -> None:
        """Adds the verdicts of one rung to those of the rungs below."""
        field_ = _Field(ties=self.ties)
        for index in range(max(trials) + 1):
            trajectory, below = trials.get(index, Trajectory(())), found.get(index)
            point = trajectory.at(rung)
            if isinstance(below, Cut) or (point is None and trajectory.state != "running"):
                continue  # it will never be here
            if point is None:
                field_.blank += 1
                continue
            key = sort_key(point.value, self.axis.mode)
            if isinstance(below, Pending):
                insort(field_.perhaps, key)
                continue
            if not self.survives(index, *field_.best_case(key)):
                found[index] = Cut(point.epoch, self.reason(rung))
            elif not self.survives(index, *field_.worst_case(key)):
                found[index] = Pending(rung)
            insort(field_.there, key)


@dataclass
class _Field:
    """The earlier trials at a rung. there: reached it; perhaps: did, if they pass the rungs below; blank: not yet."""

    ties: bool
    there: list[Key] = field(default_factory=list)
    perhaps: list[Key] = field(default_factory=list)
    blank: int = 0

    def best_case(self, key: Key) -> tuple[int, int]:
        """(better, worse) if all that is open turns out well for a trial."""
        better, might = self._better(self.there, key), self._better(self.perhaps, key)
        return better, len(self.there) - better + len(self.perhaps) - might + self.blank

    def worst_case(self, key: Key) -> tuple[int, int]:
        """(better, worse) if all that is open turns out badly for it."""
        better, might = self._better(self.there, key), self._better(self.perhaps, key)
        return better + might + self.blank, len(self.there) - better

    def _better(self, keys: list[Key], key: Key) -> int:
        return (bisect_right if self.ties else bisect_left)(keys, key)


class Asha(RungRule):
    """Asynchronous successive halving, in trial order.

    Rungs lie at first_rung * eta^k up to `axis.top`. Of the trials 0..i that reached a rung, trial i is among the best
    max(1, floor(n / eta)) of n, or it is cut. Of equal values the earlier trial's is the better one.
    """

    name = "asha"
    ties = True

    def __init__(self, axis: Axis, first_rung: float, eta: int) -> None:
        super().__init__(axis)
        self.first_rung, self.eta = first_rung, eta

    def rungs(self) -> Iterator[float]:
        levels = (self.first_rung * self.eta**k for k in itertools.count())
        return itertools.takewhile(lambda level: level <= self.axis.top, levels)

    def survives(self, index: int, better: int, worse: int) -> bool:
        return better < max(1, (better + worse + 1) // self.eta)

    def reason(self, rung: float) -> str:
        return f"asha: not among the best 1/{self.eta} of the trials so far at {rung:g} {self.axis.name}"


class Median(RungRule):
    """The median rule, in trial order.

    Rungs lie at first_rung, first_rung + every, ... up to `axis.top`. Trial i is cut at a rung where more than half of
    the trials before it that reached the rung were better there; the first `grace_trials` trials never are.
    """

    name = "median"
    ties = False

    def __init__(self, axis: Axis, first_rung: float, every: float, grace_trials: int) -> None:
        super().__init__(axis)
        self.first_rung, self.every, self.grace_trials = first_rung, every, grace_trials

    def rungs(self) -> Iterator[float]:
        levels = (self.first_rung + self.every * k for k in itertools.count())
        return itertools.takewhile(lambda level: level <= self.axis.top, levels)

    def survives(self, index: int, better: int, worse: int) -> bool:
        return index < self.grace_trials or better <= worse

    def reason(self, rung: float) -> str:
        return f"median: more than half of the trials before it were better at {rung:g} {self.axis.name}"
