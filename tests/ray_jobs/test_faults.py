"""Chaos: what its verdict sees, and a few real faults over a real training."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_jobs.faults import injectors
from ray_jobs.faults.campaign import Outcome, add_outcomes, campaign, read_outcomes, summed, table
from ray_jobs.faults.injectors import INJECTORS
from ray_jobs.faults.schedule import LEAST_STEPS, MOST_STEPS, drawn
from ray_jobs.faults.verdict import Left, Verdict, verdict

POINTS = [("loss/train", 1, 0.5), ("loss/train", 2, math.nan), ("seconds", 1, 3.0), ("seconds", 2, 4.0)]
STATE = {"model": {"w": torch.ones(2)}, "optimizer": {"step": 3, "state": {0: {"m": torch.zeros(2)}}}}
WHOLE = Left("FINISHED", POINTS, STATE)
GOOD = Verdict(0, 0, 0, (), ())


def judged(**change: object) -> Verdict:
    return verdict({"run": WHOLE}, {"run": replace(WHOLE, **change)})  # type: ignore[arg-type]


def test_an_equal_run_is_good_whatever_its_times_are() -> None:
    assert judged() == GOOD
    assert judged(points=[*POINTS[:2], ("seconds", 1, 30.0), ("seconds", 2, 40.0)]) == GOOD


def test_what_is_lost_twice_or_different_is_counted() -> None:
    assert judged(points=POINTS[1:]) == replace(GOOD, lost=1)
    assert judged(points=[*POINTS, POINTS[0], ("seconds", 2, 5.0)]) == replace(GOOD, twice=2)
    assert judged(points=[("loss/train", 1, 0.6), *POINTS[1:]]) == replace(GOOD, different=1)
    assert judged(status="FAILED") == replace(GOOD, unfinished=("run",))
    assert verdict({"run": WHOLE}, {}) == Verdict(4, 0, 0, (), ("run",))
    for left in (GOOD, replace(GOOD, lost=1), replace(GOOD, twice=1), replace(GOOD, unequal=("run",))):
        assert left.good == (left == GOOD)


def test_weights_and_optimizer_are_compared_bit_for_bit() -> None:
    nearly = torch.ones(2) * (1 + 1e-7)
    assert judged(state={**STATE, "model": {"w": nearly}}) == replace(GOOD, unequal=("run",))
    other = {"step": 3, "state": {0: {"m": torch.full((2,), 1e-9)}}}
    assert judged(state={**STATE, "optimizer": other}) == replace(GOOD, unequal=("run",))


def test_faults_follow_from_the_seed_and_come_in_proportion() -> None:
    weights = {"a": 2, "b": 1}
    faults = drawn(weights, 30, seed=1)
    assert faults == drawn(weights, 30, seed=1) != drawn(weights, 30, seed=2)
    assert Counter(fault.kind for fault in faults) == {"a": 20, "b": 10}
    assert all(LEAST_STEPS <= fault.after_steps <= MOST_STEPS for fault in faults)
    assert drawn(weights, 3, seed=1) == faults[:3]


def test_the_table_says_what_came_out() -> None:
    kind = "worker SIGKILL"
    outcome = Outcome("train", [kind, kind], {kind: [3.0, 5.0]}, [GOOD, replace(GOOD, lost=2)], 100, 7, 1)
    lines = table([outcome]).splitlines()
    assert "| worker SIGKILL | 2, 2 | 4.0 |" in lines
    assert "| faults injected | 2 |" in lines
    assert "| steps wasted | 7 |" in lines
    assert "| metrics lost | 2 |" in lines
    assert "| weights equal | yes |" in lines
    assert not outcome.good
    assert "| weights equal | NO |" in table([replace(outcome, verdicts=[replace(GOOD, unequal=("run",))])])


def test_the_outcomes_of_several_calls_make_one_table(tmp_path: Path) -> None:
    a = Outcome("train", ["worker SIGKILL"], {"worker SIGKILL": [3.0]}, [GOOD], 100, 7, 1)
    b = Outcome("train", ["worker SIGKILL"], {"worker SIGKILL": [5.0]}, [replace(GOOD, unequal=("x",))], 50, 3, 0)
    sweep = Outcome("sweep", [], {}, [GOOD], 10, 0, 0)
    add_outcomes(tmp_path / "outcomes.jsonl", [a, sweep])
    add_outcomes(tmp_path / "outcomes.jsonl", [b])
    both, other = summed(read_outcomes(tmp_path / "outcomes.jsonl"))
    assert other == sweep
    assert both.injected == ["worker SIGKILL"] * 2
    assert (both.seconds, both.verdicts) == ({"worker SIGKILL": [3.0, 5.0]}, [*a.verdicts, *b.verdicts])
    assert (both.steps, both.wasted_steps, both.resumes, both.good) == (150, 10, 1, False)


def test_a_damaged_checkpoint_differs_from_what_was_written(tmp_path: Path) -> None:
    import random

    path = tmp_path / "state.pt"
    for how in (injectors.truncate, injectors.flip):
        path.write_bytes(bytes(100))
        how(path, random.Random(0))
        assert path.read_bytes() != bytes(100)


def only(monkeypatch: pytest.MonkeyPatch, some: tuple[str, ...]) -> None:
    """Once each, and no other."""
    for name in INJECTORS:
        once = int(name in some)
        monkeypatch.setitem(INJECTORS, name, replace(INJECTORS[name], train=once, sweep=once))  # type: ignore[misc]


def test_three_faults_over_a_training_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers die and a checkpoint is damaged, MLflow's server is killed, the driver told to end: by the seed."""
    some = ("driver SIGTERM, resumed", "MLflow SIGKILL, started again", "newest checkpoint truncated")
    only(monkeypatch, some)
    lines: list[str] = []
    outcome = campaign("train", 3, 4, tmp_path, 16, lines.append)
    assert sorted(outcome.injected) == sorted(some), lines
    assert outcome.recoveries == 3
    assert outcome.wasted_steps > 0
    assert outcome.good, outcome.verdicts


@pytest.mark.slow
def test_two_faults_over_a_sweep_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's own process is killed, and the sweep's driver, which is resumed."""
    some = ("driver SIGKILL, resumed", "trial's process SIGKILL")
    only(monkeypatch, some)
    lines: list[str] = []
    outcome = campaign("sweep", 2, 4, tmp_path, 16, lines.append)
    assert sorted(outcome.injected) == sorted(some), lines
    assert outcome.recoveries == 2
    assert outcome.resumes >= 1
    assert outcome.good, outcome.verdicts
