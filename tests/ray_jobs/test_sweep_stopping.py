"""Who is cut, and who goes on from whom: against definitions written out plainly, in every order of reports."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import pytest

from ray_jobs.sweep.population import FACTORS, Population
from ray_jobs.sweep.rungs import Asha, Median, RungRule
from ray_jobs.sweep.trajectory import Axis, Continue, Cut, Pending, Point, Stopping, Trajectory

Curve = list[Point]


def curve(*values: float, cost: float = 1.0) -> Curve:
    return [Point(epoch, epoch * cost, value) for epoch, value in enumerate(values, 1)]


def asha(**settings: object) -> Asha:
    return Asha(Axis("max", top=8), first_rung=1, eta=2)


def better(a: float, b: float) -> bool:
    return not math.isnan(a) and (math.isnan(b) or a > b)


def at(points: Curve, rung: float) -> Point | None:
    return next((point for point in points if point.resource >= rung), None)


def asha_by_definition(curves: Sequence[Curve], rungs: Sequence[float], eta: int) -> list[int | None]:
    """The epoch that each trial is cut at."""
    cut: list[int | None] = [None] * len(curves)
    for rung in rungs:
        reached: list[float] = []  # by the trials before this one
        for i, points in enumerate(curves):
            point = at(points, rung)
            if point is None or cut[i] is not None:
                continue
            reached.append(point.value)
            ahead = sum(not better(point.value, other) for other in reached[:-1])  # of equals the earlier one
            if ahead + 1 > max(1, len(reached) // eta):
                cut[i] = point.epoch
    return cut


def median_by_definition(curves: Sequence[Curve], rungs: Sequence[float], grace: int) -> list[int | None]:
    cut: list[int | None] = [None] * len(curves)
    for rung in rungs:
        reached: list[float] = []
        for i, points in enumerate(curves):
            point = at(points, rung)
            if point is None or cut[i] is not None:
                continue
            if i >= grace and sum(better(other, point.value) for other in reached) > len(reached) / 2:
                cut[i] = point.epoch
            reached.append(point.value)
    return cut


RULES: dict[str, tuple[RungRule, object]] = {
    "asha, eta 2": (asha(), lambda curves: asha_by_definition(curves, [1, 2, 4, 8], 2)),
    "asha, eta 3": (
        Asha(Axis("max", top=8), first_rung=0.7, eta=3),
        lambda curves: asha_by_definition(curves, [0.7, 2.1, 6.3], 3),
    ),
    "median": (
        Median(Axis("max", top=8), first_rung=1, every=1.5, grace_trials=2),
        lambda curves: median_by_definition(curves, [1, 2.5, 4, 5.5, 7], 2),
    ),
}


class Replay:
    """Trials that report one epoch after the other, as a sweep sees them; a cut trial reports no more."""

    def __init__(self, rule: RungRule, curves: Sequence[Curve], fails: Sequence[bool]) -> None:
        self.rule, self.curves, self.fails = rule, curves, fails
        self.told = [0] * len(curves)
        self.cuts: dict[int, Cut] = {}
        self.passed: dict[int, float] = {}

    def state(self, trial: int) -> Trajectory:
        done = self.told[trial] == len(self.curves[trial])
        state = "running" if not done else "failed" if self.fails[trial] else "finished"
        return Trajectory(self.curves[trial][: self.told[trial]], state)  # type: ignore[arg-type]

    def report(self, trial: int) -> None:
        """One more epoch; checks that no earlier verdict is taken back."""
        if trial in self.cuts:
            return
        self.told[trial] = min(self.told[trial] + 1, len(self.curves[trial]))
        trials = {i: self.state(i) for i in range(len(self.curves)) if self.told[i] or not self.curves[i]}
        for i, verdict in self.rule.verdicts(trials).items():
            assert self.cuts.get(i, verdict) == verdict, f"the cut of {i} became {verdict}"
            if isinstance(verdict, Cut):
                assert all(verdict.epoch > at(self.curves[i], rung).epoch for rung in self.open_before(i))
                self.cuts[i] = verdict
            elif isinstance(verdict, Continue) and trials[i].points:
                self.passed[i] = trials[i].points[-1].resource

    def open_before(self, trial: int) -> Iterator[float]:
        """Rungs that the trial was allowed to pass."""
        level = self.passed.get(trial, 0.0)
        return iter([rung for rung in self.rule.rungs() if rung <= level])

    def outcome(self) -> list[int | None]:
        last = self.rule.verdicts({i: self.state(i) for i in range(len(self.curves))})
        assert not any(isinstance(verdict, Pending) for verdict in last.values())
        return [self.cuts[i].epoch if i in self.cuts else None for i in range(len(self.curves))]


def random_curves(generator: random.Random, n: int, epochs: int) -> tuple[list[Curve], list[bool]]:
    """Few different values, so that there are ties; some NaN; some trials end early, failed, some at once."""
    values = [0.1, 0.2, 0.3, 0.4, math.nan]
    curves, fails = [], []
    for _ in range(n):
        cost = generator.choice([1.0, 1.0, 0.5, 2.0])
        length = generator.choice([epochs, epochs, epochs, generator.randint(0, epochs)])
        curves.append(curve(*[generator.choice(values) for _ in range(length)], cost=cost))
        fails.append(length < epochs)
    return curves, fails


@pytest.mark.parametrize("name", RULES)
def test_verdicts_are_those_of_the_definition_whatever_the_order_of_reports(name: str) -> None:
    rule, defined = RULES[name]
    for case in range(25):
        generator = random.Random(case)
        curves, fails = random_curves(generator, n=9, epochs=5)
        expected = defined(curves)  # type: ignore[operator]
        for _ in range(5):
            replay = Replay(rule, curves, fails)
            order = [trial for trial, points in enumerate(curves) for _ in range(max(1, len(points)))]
            generator.shuffle(order)
            slow = generator.randrange(len(curves))  # the others run far ahead of it, with verdicts pending
            order.sort(key=lambda trial: trial == slow)
            for trial in order:
                replay.report(trial)
            assert replay.outcome() == expected, (case, order)


def orders(left: list[int]) -> Iterator[list[int]]:
    if not any(left):
        yield []
    for trial, n in enumerate(left):
        if n:
            for rest in orders([m - (i == trial) for i, m in enumerate(left)]):
                yield [trial, *rest]


def test_all_orders_of_three_trials() -> None:
    curves = [curve(0.5, 0.2), curve(0.4, 0.8), curve(0.6, 0.6)]
    expected = asha_by_definition(curves, [1, 2], 2)
    assert expected == [None, 1, None]
    for order in orders([2, 2, 2]):
        replay = Replay(Asha(Axis("max", top=2), first_rung=1, eta=2), curves, [False] * 3)
        for trial in order:
            replay.report(trial)
        assert replay.outcome() == expected, order


def test_points_beyond_a_cut_do_not_count_for_others() -> None:
    """Trial 1 trained past its cut at epoch 1: whether its later epochs are still there changes nothing."""
    rule = Asha(Axis("max", top=3), first_rung=1, eta=2)
    first, cut, third = curve(0.5, 0.5, 0.5), curve(0.4, 0.9, 0.9), curve(0.6, 0.6, 0.6)
    kept = rule.verdicts({0: Trajectory(first), 1: Trajectory(cut), 2: Trajectory(third)})
    trimmed = rule.verdicts({0: Trajectory(first), 1: Trajectory(cut[:1], "cut"), 2: Trajectory(third)})
    assert kept == trimmed
    assert kept[1] == Cut(1, rule.reason(1))
    assert kept[2] == Continue()  # 0.6 is not compared with the 0.9 of epoch 2


def test_a_verdict_waits_for_earlier_trials_and_only_where_they_could_change_it() -> None:
    rule = asha()
    first, second = Trajectory(curve(0.5)), Trajectory(curve(0.6))
    assert rule.verdict(1, {1: second}) == Pending(1)  # trial 0 has not begun: it might be better
    assert rule.verdict(1, {0: first, 1: second}) == Continue()
    poor = Trajectory(curve(0.1))
    assert rule.verdict(2, {0: first, 2: poor}) == Cut(1, rule.reason(1))  # of 3 one goes on, and it is not this one
    assert rule.verdict(3, {0: first, 3: poor}) == Pending(1)  # of 4 two do: trials 1 and 2 may be worse still
    assert rule.verdict(1, {0: Trajectory((), "failed"), 1: poor}) == Continue()


def test_a_verdict_waits_for_trials_that_are_themselves_undecided_below() -> None:
    """One slow trial leaves two others open at rung 1; both have better values than trial 5 at rung 2."""
    rule = Asha(Axis("max", top=2), first_rung=1, eta=2)
    values = {0: (0.5, 0.1), 1: (0.6, 0.2), 3: (0.55, 0.8), 4: (0.58, 0.9), 5: (0.9, 0.5)}
    trials = {i: Trajectory(curve(*v)) for i, v in values.items()}
    waiting = {0: Continue(), 1: Continue(), 3: Pending(1), 4: Pending(1), 5: Pending(2)}
    assert rule.verdicts(trials) == waiting
    poor = rule.verdicts({**trials, 2: Trajectory(curve(0.0))})
    assert [i for i, verdict in poor.items() if isinstance(verdict, Cut)] == [5, 2]


def test_loss_is_better_when_smaller_and_nan_is_worst() -> None:
    rule = Asha(Axis("min", top=1), first_rung=1, eta=2)
    trials = {0: Trajectory(curve(0.5)), 1: Trajectory(curve(math.nan)), 2: Trajectory(curve(0.4))}
    assert [type(verdict) for verdict in rule.verdicts(trials).values()] == [Continue, Cut, Continue]


def test_seconds_end_with_the_last_epoch_within_the_budget() -> None:
    rule = Stopping(Axis("max", "seconds", budget=10.0))
    points = [Point(1, 4.0, 0.1), Point(2, 8.0, 0.2), Point(3, 12.0, 0.3)]
    assert [rule.spent(Trajectory(points[:n])) for n in range(4)] == [None, None, None, 2]
    assert rule.spent(Trajectory([Point(1, 10.0, 0.1)])) == 1
    assert rule.spent(Trajectory([Point(1, 11.0, 0.1)])) == 1  # not even one fits: one it is
    assert Stopping(Axis("max")).spent(Trajectory(points)) is None


# population-based training

START = {i: {"optimizer.rho": 0.01 * (i + 1), "optimizer.lam": 1.0} for i in range(8)}


def population(**settings: object) -> Population:
    bounds = {"optimizer.rho": (0.01, 0.05), "optimizer.lam": (0.5, 2.0)}
    return Population(Axis("max"), 8, [2, 4], 0.25, bounds, **{"seed": 0, **settings})  # type: ignore[arg-type]


def reports(generation: int, generator: random.Random) -> dict[int, Trajectory]:
    return {i: Trajectory(curve(*[generator.random() for _ in range(2 * generation + 2)])) for i in range(8)}


def test_the_worst_members_go_on_from_the_best() -> None:
    trials = reports(0, random.Random(1))
    exploits = population().exploits(0, trials, START)
    assert exploits is not None
    ranked = sorted(trials, key=lambda i: -trials[i].points[1].value)
    assert sorted(exploits) == sorted(ranked[-2:])
    for exploit in exploits.values():
        donor = START[exploit.donor]
        assert exploit.donor in ranked[:2]
        assert exploit.values["optimizer.lam"] in [donor["optimizer.lam"] * factor for factor in FACTORS]
        assert 0.01 <= exploit.values["optimizer.rho"] <= 0.05  # clipped to the space
        assert f"trial {exploit.donor}" in exploit.reason


def test_a_generation_waits_for_all_and_does_without_the_failed() -> None:
    trials = reports(0, random.Random(2))
    assert population().exploits(0, {**trials, 3: Trajectory(curve(0.5))}, START) is None
    assert population().exploits(0, {i: t for i, t in trials.items() if i != 3}, START) is None
    exploits = population().exploits(0, {**trials, 3: Trajectory(curve(0.0), "failed")}, START)
    assert exploits is not None
    assert 3 not in exploits
    assert 3 not in [exploit.donor for exploit in exploits.values()]
    alone = {i: Trajectory((), "failed") for i in range(8)} | {5: trials[5]}
    assert population().exploits(0, alone, START) == {}


def test_exploits_are_the_same_on_replay_and_differ_by_seed_and_generation() -> None:
    trials = reports(1, random.Random(3))
    shuffled = {i: trials[i] for i in random.Random(0).sample(range(8), 8)}
    assert population().exploits(1, trials, START) == population().exploits(1, shuffled, START)
    told = [repr(population(seed=seed).exploits(1, trials, START)) for seed in range(8)]
    assert len(set(told)) > 1
    flat = {i: Trajectory(curve(*[float(i)] * 4)) for i in range(8)}
    choices = []
    for generation in (0, 1):
        exploits = population().exploits(generation, flat, START)
        assert exploits is not None
        choices.append([(exploit.donor, exploit.values) for exploit in exploits.values()])
    assert choices[0] != choices[1]
