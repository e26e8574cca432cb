"""A sweep's memory: what is known, and what follows from it. No Ray, no MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_jobs.journal import Event
from ray_jobs.sweep import outcome
from ray_jobs.sweep.ledger import Ledger, Trial
from ray_jobs.sweep.population import Population
from ray_jobs.sweep.trajectory import Axis, Cut, Point, Stopping, Trajectory, Verdict


class InOrder:
    """Trial i tries rho = i, and waits for the result of trial i - lag."""

    def __init__(self, n_trials: int, lag: int = 0) -> None:
        self.n_trials, self._lag = n_trials, lag

    def needs(self, index: int) -> range:
        return range(index - self._lag + 1) if self._lag and index >= self._lag else range(0)

    def suggest(self, index: int, results: Mapping[int, float | None]) -> dict[str, Any]:
        return {"optimizer.rho": float(index), "seen": sorted(results)}


class CutsBelowHalf(Stopping):
    def verdicts(self, trials: Mapping[int, Trajectory]) -> dict[int, Verdict]:
        def verdict(trajectory: Trajectory) -> Verdict:
            low = [point for point in trajectory.points if point.value < 0.5]
            return Cut(low[0].epoch, "below half") if low else super(CutsBelowHalf, self).verdicts({0: trajectory})[0]

        return {index: verdict(trajectory) for index, trajectory in trials.items()}


def ledger(n_trials: int, stopping: Stopping | None = None, lag: int = 0) -> Ledger:
    return Ledger(InOrder(n_trials, lag), stopping or CutsBelowHalf(Axis("max")))


def begin(of: Ledger, index: int) -> None:
    of.apply({"event": "start", "trial": index, "values": {"optimizer.rho": float(index)}, "run": f"run{index}"})


def epoch(of: Ledger, index: int, number: int, value: float) -> None:
    of.apply({"event": "epoch", "trial": index, "epoch": number, "resource": float(number), "value": value})


def settle(of: Ledger) -> list[Event]:
    made = []
    while events := of.decisions():
        for event in events:
            of.apply(event)
        made += events
    return made


def test_a_trial_starts_when_those_it_learns_from_are_over() -> None:
    of = ledger(4, lag=2)
    for index in range(2):
        assert of.next_start() == (index, {"optimizer.rho": float(index), "seen": []})
        begin(of, index)
    assert of.next_start() is None
    epoch(of, 1, 1, 0.9)
    of.apply({"event": "trained", "trial": 1})
    settle(of)
    assert of.next_start() is None  # trial 0 is not over, whatever trial 1 is
    of.apply({"event": "failed", "trial": 0, "cause": "x"})
    assert of.next_start() == (2, {"optimizer.rho": 2.0, "seen": [0, 1]})


def test_what_a_cut_trial_did_beyond_its_rung_does_not_count() -> None:
    of = ledger(1)
    begin(of, 0)
    for number, value in enumerate([0.8, 0.4, 0.99], start=1):
        epoch(of, 0, number, value)
    assert settle(of) == [{"event": "cut", "trial": 0, "epoch": 2, "reason": "below half"}]
    assert (of.trials[0].status, of.trials[0].value, of.trials[0].stopped) == ("cut", 0.4, 2)
    assert of.over


def test_an_epoch_that_is_reported_again_after_a_restart_is_no_news() -> None:
    of = ledger(1)
    begin(of, 0)
    metrics = {"epoch": 1, "accuracy/validation": 0.9, "gradient_evaluations": 80}
    news = of.news(of.trials[0], metrics, "accuracy/validation", "gradient_evaluations")
    assert news == {"event": "epoch", "trial": 0, "epoch": 1, "resource": 80.0, "value": 0.9}
    of.apply(news)
    assert of.news(of.trials[0], metrics, "accuracy/validation", "gradient_evaluations") is None


def test_a_budget_of_seconds_ends_a_trial_at_its_last_epoch_within() -> None:
    of = ledger(1, CutsBelowHalf(Axis("max", "seconds", budget=2.5)))
    begin(of, 0)
    for number in (1, 2):
        epoch(of, 0, number, 0.9)
    assert settle(of) == []
    epoch(of, 0, 3, 0.95)
    assert [event["event"] for event in settle(of)] == ["trained", "finished"]
    assert (of.trials[0].status, of.trials[0].stopped, of.trials[0].value) == ("finished", 2, 0.9)


def test_generations_wait_for_every_member_and_members_for_the_last_generation() -> None:
    of = ledger(2, Population(Axis("max"), 2, (2.0,), 0.5, {"optimizer.rho": (0.0, 10.0)}, seed=0))
    for index in range(2):
        begin(of, index)
    for index in range(2):
        for number in (1, 2):
            epoch(of, index, number, 0.5 + index / 4)
        of.apply({"event": "trained", "trial": index})
        assert settle(of) == []  # at the end of a generation nobody is over
        assert (of.generation_over() is None) == (index == 0)
    exploits = of.generation_over()
    assert exploits is not None
    assert {member: exploit.donor for member, exploit in exploits.items()} == {0: 1}
    start = {"checkpoint": "/1/checkpoint", "values": exploits[0].values, "reason": "r"}
    stay = {"checkpoint": "/1/checkpoint", "values": of.trials[1].values, "reason": None}
    of.apply({"event": "generation", "generation": 0, "starts": {"0": start, "1": stay}})  # as JSON has the keys
    assert (of.trials[0].start, of.trials[0].generation, of.trials[0].status) == ("/1/checkpoint", 1, "running")
    for index in range(2):
        epoch(of, index, 3, 0.9)
        of.apply({"event": "trained", "trial": index})
    assert [event["event"] for event in settle(of)] == ["finished", "finished"]
    assert of.generation_over() is None


def trial(index: int, value: float, status: Any = "finished") -> Trial:
    return Trial(
        index, {"optimizer.rho": index // 2, "training.seed": index % 2}, f"run{index}", status, [Point(1, 1.0, value)]
    )


def test_a_setting_wins_by_the_mean_over_its_seeds_and_not_by_one_lucky_seed() -> None:
    better = float.__gt__
    trials = [trial(0, 0.7), trial(1, 0.8), trial(2, 0.99), trial(3, 0.2, "cut"), trial(4, 0.6), trial(5, 0.95)]
    found = outcome.settings(trials, lambda index: index // 2)
    best = outcome.winner(found, better)
    assert best is not None
    assert (best.setting.values, best.trial.index) == ({"optimizer.rho": 2}, 5)
    assert outcome.winner(outcome.settings([trial(0, 0.5, "failed")], lambda index: index), better) is None
    text = outcome.as_csv({"digits": found}, "accuracy").splitlines()
    assert text[0] == "data,optimizer.rho,mean of accuracy,95% low,95% high,seeds,trials"
    assert text[2] == "digits,1,0.99,nan,nan,1,2 3"
