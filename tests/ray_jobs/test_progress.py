"""What a person sees, in a terminal and without one."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from ray_jobs.progress import Board, ProgressView, Summary, duration, summary_table


def metrics(epoch: int, accuracy: float = 0.5) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "loss/train": 1.0 / epoch,
        "accuracy/validation": accuracy,
        "loss/validation": 1.0,
        "accuracy/test": accuracy - 0.01,
        "examples_per_second": 1234.0,
        "rho": 0.03,
        "lam": 1e-3,
        "strength": 9e-7,
        "sharpness": 3.1,
        "gradient_evaluations": 4 * epoch,
        "skipped_steps": 0,
        "restarts": 0,
        "wasted_steps": 0,
        "checkpoint_seconds": 0.25,
    }


def test_plain_lines_once_for_each_epoch() -> None:
    board = Board()
    output = io.StringIO()
    with ProgressView(Console(file=output, width=100), "run", 2, board.read, interval=0.01):
        board.tell_event(metrics(1))
        board.tell_event("workers failed")
        board.tell_event(metrics(2))
    lines = output.getvalue().splitlines()
    assert lines[0] == "run: starting workers"
    assert [line.split("  ")[0] for line in lines[1:]] == ["run: epoch 1/2", "run: workers failed", "run: epoch 2/2"]
    assert lines[3] == "run: epoch 2/2  loss 0.5000  val acc 50.00%  1,234 examples/s"


def test_the_words_of_an_error_are_printed_as_they_are() -> None:
    """An error of gloo names its source file in brackets, which rich would take for markup; it may be long, too."""
    output = io.StringIO()
    told = "workers failed (worker 0: [/pytorch/gloo/pair.cc:545] Connection closed by peer [127.0.0.1]:2048) " * 3
    with ProgressView(Console(file=output, width=80), "run", 2, Board().read, interval=0.01) as view:
        view._say(told)
    assert f"run: {told}\n" in output.getvalue()


def test_the_live_line_says_place_loss_accuracy_rate_and_eta() -> None:
    view = ProgressView(Console(file=io.StringIO(), force_terminal=True), "run", 10, Board().read)
    first = view._live_line({"epoch": 0, "step": 1, "steps": 4, "loss": 2.0, "rate": 1000.0})
    assert first.startswith("epoch 1/10  step 1/4  loss 2.0000  1,000 examples/s")
    view._newest = metrics(1)
    later = view._live_line({"epoch": 1, "step": 3, "steps": 4, "loss": 0.4, "rate": 1000.0})
    assert later.startswith("epoch 2/10  step 3/4  loss 0.4000  val acc 50.00%  1,000 examples/s  ETA ")


def test_a_board_that_is_gone_ends_the_drawing_and_not_the_driver() -> None:
    def gone(_: int) -> Any:
        raise ConnectionError

    output = io.StringIO()
    with ProgressView(Console(file=output), "run", 2, gone, interval=0.01):
        time.sleep(0.1)
    assert output.getvalue() == "run: starting workers\n"


def test_the_table_fits_80_columns_and_shows_strength_beside_rho_and_lam() -> None:
    output = io.StringIO()
    history = [metrics(1, 0.7), metrics(2, 0.6)]
    summaries = [
        Summary("mnist5k-sgd", "a" * 32, "sgd", 0, history, 61),
        Summary("mnist5k-frob", "b" * 32, "frobenius", 3, history, 3725),
    ]
    Console(file=output, width=80).print(summary_table(summaries))
    rows = {line[:26].strip(): line[26:].split() for line in output.getvalue().splitlines()}
    assert rows["run"] == ["mnist5k-sgd", "mnist5k-frob"]
    assert rows["strength s = lam rho^2"] == ["-", "9e-07"]
    assert rows["at the best validation"] == ["69.00%", "(epoch", "1)"] * 2
    assert rows["time"] == ["1:01", "1:02:05"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
