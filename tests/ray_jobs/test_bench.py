"""`phisam bench`: what it counts is what was sent and allocated, and its peers take the step that they should.

No test looks at how long something took.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import phisam
from ray_jobs import cli
from ray_jobs.bench import breakdown, command, counting, first_step, methods, report, timing
from ray_jobs.bench.cell import Cell, Row, measure_cell
from ray_jobs.bench.timing import Clock, Spread
from ray_jobs.bench.workloads import Workload, workload
from ray_jobs.errors import ConfigError, RunError
from tests.phisam import gloo

CPU = torch.device("cpu")
SMALL = Workload("mlp", (1, 6, 6), 8)


def small_cell(workers: int, **settings: Any) -> Cell:
    return Cell(SMALL, workers, (1, 2), None, "cpu", seconds=0, turn_seconds=0.001, min_rounds=2, **settings)


def after_two_steps(method: methods.Method) -> dict[str, Tensor]:
    """x before, and how far two steps move it, in float64."""
    model = SMALL.make_model(CPU, torch.float64)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    step = method.build(model)
    for _ in range(2):
        step(*SMALL.examples(CPU, torch.float64))
    return {"before": before, "moved": nn.utils.parameters_to_vector(model.parameters()).detach() - before}


def naive_and_ours(workers: int) -> dict[str, dict[str, Tensor]]:
    measure = phisam.frobenius()
    naive = methods.Method("", "naive", 2, 3, 1.0, workers, False, methods.Naive(measure, 2))
    return {
        "naive": after_two_steps(naive),
        "ours": after_two_steps(methods.phisam_method("", measure, 2, workers)),
        "sgd": after_two_steps(methods.Method("", "sgd", 0, 1, 1.0, 1, True, methods.sgd)),
    }


def on_rank(rank: int) -> dict[str, Any]:
    workers = dist.get_world_size()
    return {"rows": [asdict(row) for row in measure_cell(small_cell(workers), rank)], "steps": naive_and_ours(workers)}


@pytest.fixture(scope="module")
def two_workers() -> list[dict[str, Any]]:
    return gloo.run(2, on_rank)


@pytest.fixture(scope="module")
def rows(two_workers: list[dict[str, Any]]) -> list[Row]:
    return [*measure_cell(small_cell(1)), *(Row.from_dict(row) for row in two_workers[0]["rows"])]


# What is compared


def test_rows_are_sgd_ours_and_the_peers(rows: list[Row]) -> None:
    alone = ["SGD", "trace n = 1", "trace n=1, lam=1", "frobenius n = 2", "sam", "pytorch_optimizer SAM"]
    several = ["SGD", "DDP-SGD", "trace n = 1", "frobenius n = 2", "sam", "naive n = 1", "naive n = 2"]
    assert [row.method for row in rows] == alone + several
    limits = {(row.workers, row.method): row.limit for row in rows}
    assert limits[1, "SGD"] == limits[2, "DDP-SGD"] == limits[2, "trace n = 1"] == 1
    assert limits[1, "frobenius n = 2"] == 3
    assert limits[2, "frobenius n = 2"] == limits[2, "naive n = 2"] == 1.5
    assert all(row.rounds == 2 and row.ratio.low <= row.ratio.median <= row.ratio.high for row in rows)
    assert {row.clock for row in rows if row.workers == 1} == {"CPU time"}
    assert {row.clock for row in rows if row.workers == 2} == {"wall time"}


def assert_same_step(steps: dict[str, dict[str, Tensor]]) -> None:
    ours, naive, sgd = (steps[name] for name in ("ours", "naive", "sgd"))
    assert torch.equal(ours["before"], naive["before"])
    torch.testing.assert_close(naive["moved"], ours["moved"], rtol=0, atol=1e-15)
    assert float((ours["moved"] - sgd["moved"]).abs().max()) > 1e-10  # it is not SGD that both compute


def test_the_naive_loop_takes_our_step() -> None:
    assert_same_step(naive_and_ours(1))


def test_the_naive_loop_takes_our_step_on_two_workers(two_workers: list[dict[str, Any]]) -> None:
    for rank in two_workers:
        assert_same_step(rank["steps"])


def test_pytorch_optimizers_sam_takes_our_step() -> None:
    """Up to the norm of the gradient, which the package rounds to float32."""
    ours = methods.phisam_method("", phisam.sam(), 1, 1, lam=1.0)
    theirs = methods.Method("", "", 1, 2, 2.0, 1, False, methods.pytorch_optimizer_sam)
    a, b = after_two_steps(ours)["moved"], after_two_steps(theirs)["moved"]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


# What is counted


def test_collectives_are_counted(rows: list[Row]) -> None:
    several = {row.method: row for row in rows if row.workers == 2}
    d = several["SGD"].d
    assert d == sum(p.numel() for p in SMALL.make_model(CPU).parameters())
    reduced = {name: (row.all_reduces, row.all_reduced_bytes) for name, row in several.items()}
    assert reduced["SGD"] == (0, 0)
    assert reduced["DDP-SGD"] == reduced["trace n = 1"] == reduced["frobenius n = 2"] == (1, 4 * d)
    assert reduced["sam"] == (2, 8 * d)  # its direction is one more
    assert reduced["naive n = 1"] == (3, 2 * 4 * d + 2 * 8)  # and the losses, in float64
    assert reduced["naive n = 2"] == (4, 3 * 4 * d + 3 * 8)
    trace = several["trace n = 1"]
    assert (trace.other_collectives, trace.other_bytes) == (1, 8)  # this rank's one loss
    assert all(row.all_reduces == row.other_collectives == 0 for row in rows if row.workers == 1)


def test_peak_is_what_was_alive_at_once() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        torch.empty(2000).fill_(1)  # freed at once
        torch.empty(500).fill_(1)

    counts = counting.count(lambda: kept.append(torch.empty(1000).fill_(1)), step, CPU)
    assert counts == counting.Counts(4 * 3000, 0, 0, 0, 0)


def test_peak_orders_events_by_time_and_knows_addresses() -> None:
    def event(ts: float, size: int, address: int, kind: int = 0) -> dict[str, Any]:
        arguments = {"Ev Idx": 0, "Bytes": size, "Addr": address, "Device Type": kind}
        return {"name": "[memory]", "ts": ts, "args": arguments}

    seen = [event(3, 5, 1), event(1, 10, 1), event(2, -10, 1), event(4, 4, 2), {}]
    assert counting.peak_of(seen) == 10
    assert counting.peak_of([*seen, event(5, 99, 3, kind=1)]) == 10  # of another device
    assert counting.peak_of([*seen, event(6, 7, 1)]) == 11  # address 1 was freed unseen
    assert counting.peak_of([*seen, event(7, -50, 4)]) == 10  # allocated before


def test_bytes_follow_the_type_and_only_the_counted_step_counts() -> None:
    def event(name: str, ts: float, shape: list[int], kind: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "ts": ts, "dur": 1, "args": {"Input Dims": [shape], "Input type": [kind]}, **more}

    events = [
        {"name": counting.COUNTED, "ts": 10, "dur": 100, "args": {}},
        event("gloo:all_reduce", 5, [7], "float"),
        event("gloo:all_reduce", 20, [2, 3], "float"),
        event("nccl:all_reduce", 30, [3], "c10::BFloat16"),
        event("nccl:all_reduce", 30, [3], "c10::BFloat16", cat="gpu_user_annotation"),
        event("nccl:_all_gather_base", 40, [4], "double"),
        event("gloo:broadcast", 200, [4], "double"),
    ]
    assert counting.collectives_of(events) == (2, 24 + 6, 1, 32)


def test_memory_is_beyond_sgds(rows: list[Row]) -> None:
    """At least v and the copy of x where several points are on a rank; of SGD itself nothing."""
    memory = {(row.workers, row.method): row.memory for row in rows}
    assert memory[1, "SGD"] == pytest.approx(0, abs=0.01)
    assert memory[2, "SGD"] is None
    assert memory[2, "DDP-SGD"] == pytest.approx(0, abs=0.01)
    for name in ("trace n = 1", "frobenius n = 2"):
        assert (memory[1, name] or 0) > 2
    assert (memory[1, "pytorch_optimizer SAM"] or 0) > 0.9


# Statistics


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_ratios_are_to_the_sgd_turns_around() -> None:
    assert timing.ratios([1.0, 2.0], [3.0, 9.0], [2.0, 4.0]) == [2.0, 3.0]


def test_turns_last_alike() -> None:
    assert timing.steps_per_turn(0.01, 0.2) == 20
    assert timing.steps_per_turn(5.0, 0.2) == 1
    assert timing.steps_per_turn(0.0, 0.2) == 200


# Where the time goes


class Ticks:
    """A clock that goes on by one second each time it is read."""

    def __init__(self) -> None:
        self.time = -1.0

    def __call__(self) -> float:
        self.time += 1
        return self.time


def test_a_stopwatch_gives_each_second_to_one_part() -> None:
    watch = breakdown.Stopwatch(Clock("ticks", Ticks()))
    noise = watch.around("noise", lambda: "drawn")
    assert watch.around("move", noise)() == "drawn"  # 1 s until move, 1 in it, 1 noise, 1 move
    watch.around("weights", watch.around("backward", lambda: None))()  # 1 between, and what weights calls is its own
    watch.switch(breakdown.OTHER)
    spent = {part: seconds for part, seconds in watch.seconds.items() if seconds}
    assert spent == {"other": 3, "move": 2, "noise": 1, "weights": 1}


def test_parts_are_those_of_the_step_and_sum_to_it(rows: list[Row]) -> None:
    for row in rows:
        if row.kind in ("naive", "pytorch_optimizer"):
            assert row.parts == {}
            continue
        parts = row.parts
        assert all(share >= 0 for share in parts.values())
        assert min(parts["forward"], parts["backward"], parts["base"]) > 0
        perturbed = row.kind in ("phisam", "lam = 1")
        assert (parts["weights"] > 0) == (parts["exchange"] > 0) == perturbed
    noisy = {(row.workers, row.method): row.parts["noise"] > 0 for row in rows if row.kind == "phisam"}
    assert noisy[1, "trace n = 1"]
    assert noisy[1, "frobenius n = 2"]
    assert not noisy[1, "sam"]


def test_the_stopwatch_leaves_no_trace() -> None:
    owned = [(owner, name) for functions in breakdown.PARTS.values() for owner, name in functions]
    before = [getattr(owner, name) for owner, name in owned]
    with breakdown.watched(timing.clock_for(CPU, 1)):
        assert all(getattr(owner, name) is not f for (owner, name), f in zip(owned, before, strict=True))
    assert [getattr(owner, name) for owner, name in owned] == before


# What people read


def test_tables_fit_a_terminal_and_are_markdown(rows: list[Row]) -> None:
    # A loaded machine has no say in how wide a ratio is.
    calm = [replace(row, ratio=Spread(10.25, 9.75, 10.75), parts=dict.fromkeys(row.parts, 0.105)) for row in rows]
    lines = report.text(calm, {"torch": torch.__version__}).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines.count("## mlp, batch 8, 1 worker") == lines.count("## mlp, batch 8, 2 workers") == 1
    headers = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| step")]
    one = ["step", "ratio", "quartiles", "limit", "over", "memory"]
    parts = ["step", "noise", "move", "forward", "backward", "rows", "weights", "exchange", "base", "other"]
    assert headers == [one, parts, [*one[:-1], "all-reduced", "memory"], parts]
    tables = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith("|:--") for line in tables) == 4
    assert any(line.startswith("| frobenius n = 2 ") and "| 1.00 d in 1 |" in line for line in tables)
    assert any(line.startswith("| frobenius n = 2 ") and "| +241.7 % |" in line for line in tables)  # 10.25 over 3


def test_parts_that_have_no_column_are_under_other(rows: list[Row]) -> None:
    row = replace(rows[1], parts={**dict.fromkeys(breakdown.PARTS, 0.0), "guards": 0.25, "other": 0.5})
    assert report.parts_table([row])[-1].split("|")[-2].strip() == "75.0"


def test_csv_has_every_number(rows: list[Row], tmp_path: Path) -> None:
    report.write_csv(rows, {"torch": "2"}, tmp_path / "speed.csv")
    with (tmp_path / "speed.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["method"] == row.method
        assert float(line["ratio_median"]) == row.ratio.median
        assert float(line["seconds_high"]) == row.seconds.high
        assert int(line["all_reduced_bytes"]) == row.all_reduced_bytes
        assert line["memory"] == ("" if row.memory is None else str(row.memory))
        assert line["part_forward"] == (str(row.parts["forward"]) if row.parts else "")
        assert line["torch"] == "2"


def test_plot_is_written(rows: list[Row], tmp_path: Path) -> None:
    other = [replace(row, model="resnet18") for row in rows]
    report.write_plot([*rows, *other], tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")
    with pytest.raises(ConfigError, match="bench --plot"):
        report.write_plot(rows, tmp_path / "speed.xyz")


# The command


def test_bench_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_processes = command.measured
    monkeypatch.setattr(command, "measured", lambda cell: in_processes(replace(cell, turn_seconds=0.001)))
    files = ["--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")]
    asked = ["bench", "--model", "mlp", "--n", "1", "--workers", "1", "--batch", "4", "--seconds", "1"]
    assert cli.main([*asked, *files]) == 0
    printed = capsys.readouterr().out
    assert "## mlp, batch 4, 1 worker" in printed
    assert f"torch: {torch.__version__}" in printed
    assert (tmp_path / "a.csv").stat().st_size > 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "mlq"], "there is no model 'mlq': choose mlp, convnet, resnet18, torchvision/NAME or a function"),
        (["--model", "torchvision/resnet51"], "torchvision/resnet50"),
        (["--batch", "9", "--workers", "2"], "a batch of 9 cannot be shared by 2 workers: choose a multiple of 2"),
        (["--batch", "1"], "a batch of 1 cannot be shared by 1 workers"),
        (["--measure", "frobenius", "--n", "1"], "n_samples"),
        (["--device", "cuda", "--workers", "99"], "99 worker(s) need as many GPUs"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--workers", "1", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("phisam: ")
    assert told in captured.err
    assert "Traceback" not in captured.err


def test_usual_batches_are_the_documented_ones() -> None:
    assert workload("mlp", 1) == Workload("mlp", (1, 28, 28), 128)
    assert workload("mlp", 2) == Workload("mlp", (1, 28, 28), 512)
    assert workload("resnet18", 2).batch == workload("resnet18", 1).batch == 32
    assert workload("torchvision/resnet50", 1, batch=64) == Workload("torchvision/resnet50", (3, 224, 224), 64)


def test_rows_survive_json(rows: list[Row]) -> None:
    assert [Row.from_dict(json.loads(json.dumps(asdict(row)))) for row in rows] == rows


def test_seconds_to_a_word() -> None:
    said = [sys.executable, "-c", "print('one'); print('epoch 1/1  loss')"]
    assert first_step.seconds_to(said, "epoch 1/1") > 0
    with pytest.raises(RunError, match=r"ended without 'epoch 2':\none"):
        first_step.seconds_to(said, "epoch 2")
    with pytest.raises(RunError, match="ended without"):
        first_step.seconds_to([sys.executable, "-c", "import time; time.sleep(60)"], "never", limit=0.2)
    assert first_step.text({"bare": 1.25}).endswith("\n   1.2 s  bare")
