"""What a person sees of a sweep, in a terminal and without one."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from ray_jobs.sweep import progress
from ray_jobs.sweep.ledger import Trial
from ray_jobs.sweep.progress import SweepBoard, SweepView, turn_line
from ray_jobs.sweep.trajectory import Point

METRIC = "accuracy/validation"


def trial(index: int, status: Any, values: list[float], **more: Any) -> Trial:
    settings = {"optimizer.measure": "frobenius", "optimizer.n_samples": 3, "optimizer.rho": 0.03 * (index + 1)}
    points = [Point(epoch, float(epoch), value) for epoch, value in enumerate(values, 1)]
    return Trial(index, settings, f"run{index}", status, points, **more)


TRIALS = [
    trial(0, "finished", [0.5, 0.7, 0.8, 0.9]),
    trial(1, "cut", [0.4, 0.41], stopped=1, reason="asha: not among the best"),
    trial(2, "failed", [], reason="ValueError: [no]"),
    trial(3, "running", [0.6, 0.65]),
]


def view_of(trials: list[Trial], console: Console, board: SweepBoard | None = None) -> SweepView:
    read = (board or SweepBoard()).read
    return SweepView(console, "rho", METRIC, 8, dict.fromkeys(range(8), 4), lambda: trials, read)


def rendered(view: SweepView) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_table_says_state_epoch_metric_and_settings() -> None:
    view = view_of(TRIALS, Console(file=io.StringIO(), height=24))
    view._places = {3: {"epoch": 2, "step": 5, "steps": 20}}
    head, columns, *rows = rendered(view)
    assert head == "rho 3/8 trials over"
    assert columns == "trial state epoch accuracy/validation rho n measure"  # rho first, wherever the space has it
    assert rows == [
        "0 finished 4/4 90.00% 0.03 3 frobenius",
        "1 cut 2/4 40.00% 0.06 3 frobenius",  # judged at epoch 1
        "2 failed 0/4 0.09 3 frobenius",
        "3 running 2/4 +25% 65.00% 0.12 3 frobenius",
    ]


def test_a_low_terminal_shows_trials_that_run_and_the_newest_of_the_others() -> None:
    trials = [trial(0, "running", [0.5]), *(trial(i, "finished", [0.5]) for i in range(1, 12))]
    rows = rendered(view_of(trials, Console(file=io.StringIO(), height=6)))[2:]
    assert [row.split()[0] for row in rows] == ["0", "8", "9", "10", "11"]


def test_the_eta_is_by_the_pace_since_this_driver_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    trials = TRIALS[:3]
    view = view_of(trials, Console(file=io.StringIO(), height=24))
    assert "ETA" not in rendered(view)[0]
    now[0] += 60
    trials.append(TRIALS[3])  # half a trial in a minute; four and a half are left
    assert rendered(view)[0].endswith("3/8 trials over ETA 9:00")


def test_without_a_terminal_a_turn_is_a_line_and_brackets_are_no_markup() -> None:
    output = io.StringIO()
    view = view_of(TRIALS, Console(file=output, width=60))
    for each in [trial(3, "running", []), *TRIALS[:3]]:
        view.turn(each)
    assert output.getvalue().splitlines() == [
        "rho: trial 3 starts  measure frobenius  n 3  rho 0.12",
        "rho: trial 0 finished at epoch 4  accuracy/validation 90.00%  measure frobenius  n 3  rho 0.03",
        "rho: trial 1 cut at epoch 1  accuracy/validation 40.00%  measure frobenius  n 3  rho 0.06"
        "  (asha: not among the best)",
        "rho: trial 2 failed at epoch 0  measure frobenius  n 3  rho 0.09  (ValueError: [no])",
    ]
    assert turn_line(TRIALS[1], "loss/validation").startswith("trial 1 cut at epoch 1  loss/validation 0.4  ")


def test_in_a_terminal_the_table_says_turns_and_workers_words_stay() -> None:
    output, board = io.StringIO(), SweepBoard()
    board.tell(3, epoch=2, step=5, steps=20)
    board.tell_event(3, "workers failed")
    board.tell_event(3, {"epoch": 1})  # its metrics come another way
    view = view_of(TRIALS, Console(file=output, width=100, height=24, force_terminal=True, color_system=None), board)
    view.turn(TRIALS[0])
    assert output.getvalue() == ""
    with view:
        for _ in range(400):
            if "trial 3: workers failed" in output.getvalue() and "+25%" in output.getvalue():
                break
            time.sleep(0.05)
    assert "+25%" in output.getvalue()
    assert output.getvalue().count("rho: trial 3: workers failed") == 1
