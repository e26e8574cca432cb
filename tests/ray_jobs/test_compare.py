"""`phisam compare`: budgets, choices, baselines, formats; and runs read back from MLflow."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from ray_jobs import cli
from ray_jobs.compare import compare
from ray_jobs.compare_text import as_csv, latex, markdown
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.results import RunRecord
from ray_jobs.tracking.read import read_children, read_run, read_sweep, select
from tests.ray_jobs import synthetic

SWEEP_YAML = "name: small\nmetric: accuracy/validation\nmode: max\n"


def test_at_equal_evaluations_a_costly_method_is_read_earlier() -> None:
    (done,) = compare(synthetic.grid(), axis="gradient_evaluations", baseline="sgd")
    rows = {row.name: row for row in done.rows}
    assert done.budget == 20 * synthetic.STEPS
    assert [rows[name].epochs for name in ("sgd", "sam", "frobenius")] == [20, 10, 6]
    assert rows["sgd"].gradient_evaluations == 20 * synthetic.STEPS
    frobenius = [run for run in synthetic.grid() if run.params["measure"] == "frobenius"]
    assert rows["frobenius"].interval is not None
    assert rows["frobenius"].interval.mean == pytest.approx(
        sum(run.curves["accuracy/test"].values[5] for run in frobenius) / 5
    )


def test_every_setting_is_tested_against_the_baseline_with_holms_correction_over_all() -> None:
    (done,) = compare(synthetic.grid(), baseline="sgd")
    tests = [row.versus for row in done.rows if row.versus is not None]
    assert len(tests) == 4
    smallest = min(tests, key=lambda test: test.p)
    assert smallest.p_holm == pytest.approx(min(1, 4 * smallest.p))
    assert all(test.p <= test.p_holm <= 1 for test in tests)
    two = compare([*synthetic.grid(), *synthetic.grid(data="fashion_mnist")], baseline="sgd")
    again = min((row.versus for row in two[0].rows if row.versus is not None), key=lambda test: test.p)
    assert again.p_holm >= smallest.p_holm  # eight comparisons now
    assert [done.problem for done in two] == ["mnist5k", "fashion_mnist"]


def test_by_takes_the_best_setting_by_validation_not_by_test() -> None:
    good = [synthetic.run("sam", rho=0.05, seed=seed, lift=0.02) for seed in range(3)]
    lucky = [synthetic.run("sam", rho=0.2, seed=seed, lift=-0.03) for seed in range(3)]
    lucky = [_with(run, "accuracy/test", 0.999) for run in lucky]
    (done,) = compare([*lucky, *good], by=["measure"])
    (row,) = done.rows
    assert row.setting.params["rho"] == "0.05"
    assert row.chosen_from == 2
    assert any("best of its settings by accuracy/validation" in note for note in done.notes)


def test_a_lucky_seed_of_several_does_not_win() -> None:
    whole = [synthetic.run("sam", rho=0.05, seed=seed) for seed in range(3)]
    lucky = [synthetic.run("sam", rho=0.2, seed=0, lift=0.2)]
    lucky += [synthetic.run("sam", rho=0.2, seed=seed, stopped=3) for seed in (1, 2)]
    (done,) = compare([*lucky, *whole], by=["measure"])
    assert done.rows[0].setting.params["rho"] == "0.05"


def test_few_seeds_and_lost_ones_are_said() -> None:
    runs = [synthetic.run("sam", seed=seed) for seed in range(2)] + [synthetic.run("sam", seed=2, stopped=3)]
    (done,) = compare([*runs, synthetic.run("sgd")])
    said = "\n".join(done.notes)
    assert "One seed says nothing" in said
    assert "2 seeds are few: an interval over them is 9.0 standard deviations" in said
    assert "sam: 2 of 3" in said
    (enough,) = compare([synthetic.run("sam", seed=seed) for seed in range(5)])
    assert enough.notes == ()


def test_a_budget_lets_stopped_runs_count() -> None:
    stopped = [synthetic.run("sam", seed=seed, stopped=9) for seed in range(3)]
    with pytest.raises(RunError, match=r"none of these 3 runs is finished.*--budget"):
        compare(stopped)
    (done,) = compare(stopped, budget=9)
    assert done.rows[0].seeds == 3
    with pytest.raises(RunError, match="no run has accuracy/test within 10 epochs"):
        compare(stopped, budget=10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metric": "acuracy/test"}, "Did you mean 'accuracy/test'"),
        ({"by": ["mesure"]}, "Did you mean 'measure'"),
        ({"by": ["name"]}, "say which"),
        ({"baseline": "sdg"}, "Did you mean 'sgd'"),
        ({"baseline": "trace"}, "2 settings are called so: trace rho=0.03; trace rho=0.1"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, object], said: str) -> None:
    runs = [*synthetic.grid(range(2)), synthetic.run("trace", rho=0.1)]
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        compare(runs, **arguments)  # type: ignore[arg-type]


def test_formats_say_the_same_numbers() -> None:
    done = compare(synthetic.grid(), baseline="sgd")
    row = next(row for row in done[0].rows if row.name == "trace")
    assert row.interval is not None
    assert row.versus is not None
    (read,) = [line for line in csv.DictReader(io.StringIO(as_csv(done))) if line["setting"] == "trace"]
    assert float(read["mean"]) == row.interval.mean
    assert float(read["p_holm"]) == row.versus.p_holm
    assert f"| trace | {row.interval.mean:.2%} |" in markdown(done)
    assert rf"trace & ${100 * row.interval.mean:.2f} \pm {100 * row.interval.half_width:.2f}$ & 5 &" in latex(done)
    assert next(line for line in csv.DictReader(io.StringIO(as_csv(done))) if line["setting"] == "sgd")["p"] == ""


def _with(run: RunRecord, metric: str, value: float) -> RunRecord:
    curve = dataclasses.replace(run.curves[metric], values=(value,) * len(run.curves[metric].values))
    return dataclasses.replace(run, curves={**run.curves, metric: curve})


# MLflow


def write(uri: str, parent: RunRecord | None, records: Sequence[RunRecord]) -> tuple[str, dict[str, str]]:
    """Into a store as the trainer and the sweep driver do: the parent's id, and each record's id by its own."""
    client, ids = MlflowClient(uri), {}
    found = client.get_experiment_by_name("phisam")
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    experiment = found.experiment_id if found else client.create_experiment("phisam", folder.as_uri())
    parent_id = ""
    if parent is not None:
        parent_id = client.create_run(experiment, run_name=parent.name, tags=dict(parent.tags)).info.run_id
        client.log_text(parent_id, SWEEP_YAML, "sweep.yaml")
        client.set_terminated(parent_id, "FINISHED")
    for record in records:
        tags = {**record.tags, **({"mlflow.parentRunId": parent_id} if parent is not None else {})}
        run_id = client.create_run(experiment, run_name=record.name).info.run_id
        metrics = [
            Metric(name, value, 1_700_000_000_000 + epoch, epoch)
            for name, curve in record.curves.items()
            for epoch, value in zip(curve.epochs, curve.values, strict=True)
        ]
        client.log_batch(
            run_id,
            metrics=metrics,
            params=[Param(key, value) for key, value in record.params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        client.set_terminated(run_id, record.status)
        ids[record.run_id] = run_id
    return parent_id, ids


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a sweep of eight trials, one of them stopped at epoch 3 of the 9 that it has."""
    folder = tmp_path_factory.mktemp("runs")
    trials = [synthetic.run(name, seed=seed, epochs=9) for name in ("sgd", "sam") for seed in range(4)]
    trials = [
        dataclasses.replace(run, tags={**run.tags, "phisam.kind": "trial", "phisam.trial": str(i)})
        for i, run in enumerate(trials)
    ]
    stopped = {**trials[3].tags, "phisam.stopped": "asha", "phisam.stopped_epoch": "3"}
    trials[3] = dataclasses.replace(trials[3], status="KILLED", tags=stopped)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    write(uri, synthetic.parent("small/sweep"), trials[::-1])
    write(uri, None, [dataclasses.replace(synthetic.run("sam", epochs=9), name="single")])
    return folder


def test_a_sweep_is_read_back_in_order_and_cut(home: Path) -> None:
    uri = f"sqlite:///{home / 'mlflow.db'}"
    sweep = read_sweep(uri, "small/sweep")
    assert [run.trial for run in sweep.trials] == list(range(8))
    assert (sweep.metric, sweep.mode, sweep.description) == ("accuracy/validation", "max", SWEEP_YAML)
    original = synthetic.run("sgd", seed=3, epochs=9)
    stopped = sweep.trials[3]
    assert stopped.status == "KILLED"
    assert stopped.curves["accuracy/test"].values == original.curves["accuracy/test"].values[:3]
    assert stopped.spent == original.spent  # what it trained beyond is paid for
    assert sweep.trials[0].curves == synthetic.run("sgd", seed=0, epochs=9).curves
    assert sweep.trials[0].params == synthetic.run("sgd", seed=0, epochs=9).params
    few = read_children(uri, sweep.parent.run_id, ["accuracy/test"])
    assert {name for run in few for name in run.curves} == {"accuracy/test"}


def test_names_select_runs_and_sweeps_stand_for_their_trials(home: Path) -> None:
    uri = f"sqlite:///{home / 'mlflow.db'}"
    assert len(select(uri, ["small/sweep"], [])) == 8
    (single,) = select(uri, ["single"], [])
    assert [run.run_id for run in select(uri, [single.run_id[:8], "single"], [])] == [single.run_id]
    assert read_run(uri, single.run_id).name == "single"
    assert len(select(uri, ["mnist5k-sgd"], [])) == 4  # a name that several runs have
    with pytest.raises(RunError, match="no run or sweep 'nothing'"):
        select(uri, ["nothing"])
    with pytest.raises(RunError, match="single run, not a sweep"):
        read_sweep(uri, "single")


def test_the_commands(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(home)
    assert cli.main(["compare", "small/sweep", "--by", "measure", "--baseline", "sgd", "--at", "seconds"]) == 0
    said = capsys.readouterr().out
    assert "accuracy/test within" in said
    assert "sgd: 3 of 4" in said
    assert cli.main(["compare", "small/sweep", "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["compare", "small/sweep", "--metric", "accuracy"]) == 2
    assert "Reported: accuracy/test, accuracy/validation, gradient_evaluations, loss/test, " in capsys.readouterr().err
    assert cli.main(["report", "small/sweep"]) == 0
    page = (home / "small-sweep.html").read_text(encoding="utf-8")
    assert "8 trials (7 finished, 1 stopped)" in page
    assert SWEEP_YAML.splitlines()[0] in page
    assert cli.main(["report", "small/sweep", "--folder", "reports"]) == 0
    shared = (home / "reports" / "small-sweep.html").read_text(encoding="utf-8")
    assert '<script src="plotly.min.js"></script>' in shared
    assert len(shared) < len(page) / 20
    assert (home / "reports" / "plotly.min.js").read_text(encoding="utf-8") in page
    assert cli.main(["report", "small/sweep", "none", "--folder", "others"]) == 1
    assert not (home / "others").exists()
    assert cli.main(["report", "small/sweep", "another"]) == 2
    assert "name their folder with --folder" in capsys.readouterr().err
    assert cli.main(["report", "small/sweep", "--output", str(home / "no" / "folder.html")]) == 2
