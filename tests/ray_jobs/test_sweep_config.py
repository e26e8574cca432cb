"""Sweep files: what is accepted, what is refused and how, what comes with the package."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from ray_jobs.config import load
from ray_jobs.errors import ConfigError
from ray_jobs.sweep import variety
from ray_jobs.sweep.config import dump_sweep, load_sweep, sweep_names
from ray_jobs.sweep.cost import evaluations
from ray_jobs.sweep.preview import preview
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.stopping import Population, make_stopping

SWEEP = """\
name: example
run: digits-frob
set:
  scaling.num_workers: 1
space:
  optimizer.rho: {log_uniform: [1.0e-3, 0.3]}
  optimizer.n_samples: {choice: [2, 4]}
search:
  name: random
  trials: 6
stopping:
  name: asha
  first_rung: 3
metric: loss/validation
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "sweep.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def changed(*changes: tuple[str, str]) -> str:
    text = SWEEP
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(text), overrides)
    return str(caught.value).splitlines()


RHO, N = "optimizer.rho: {log_uniform: [1.0e-3, 0.3]}", "optimizer.n_samples: {choice: [2, 4]}"
GRID = ("search:\n  name: random\n  trials: 6\n", "search: grid\n")

# changes of SWEEP, what the one line of the error must start with, what it must name
MISTAKES: dict[str, tuple[list[tuple[str, str]], str, list[str]]] = {
    "unknown field": ([(RHO, "optimizer.rhoo: {choice: [0.1]}")], "sweep.yaml:6: optimizer.rhoo: ", ["'rho'", "0.1"]),
    "unknown section": ([(RHO, "optimiser.rho: {choice: [0.1]}")], "sweep.yaml:6: optimiser: ", ["'optimizer'"]),
    "unknown key in set": (
        [("scaling.num_workers", "scaling.workers")],
        "sweep.yaml:4: scaling.workers: ",
        ["unknown"],
    ),
    "unknown key of the sweep": ([("metric:", "metrics:")], "sweep.yaml:14: metrics: ", ["'metric'"]),
    "inside of a number": ([(RHO, "optimizer.rho.x: {choice: [1]}")], "sweep.yaml:6: optimizer.rho: ", ["0.03", "'x'"]),
    "a value of the wrong kind": ([("[2, 4]", "[2, 4.5]")], "sweep.yaml:7: optimizer.n_samples: ", ["integer", "4.5"]),
    "a value out of range": ([("[2, 4]", "[0, 4]")], "sweep.yaml:7: optimizer.n_samples: ", [">= 1", "0"]),
    "a value that does not fit the others": (
        [("[2, 4]", "[1, 4]")],
        "sweep.yaml:7: optimizer.n_samples: ",
        ["2 or more for frobenius", "optimizer.n_samples = 1"],
    ),
    "an end of an interval": (
        [("log_uniform: [1.0e-3", "uniform: [-0.1")],
        "sweep.yaml:6: optimizer.rho: ",
        ["> 0", "-0.1"],
    ),
    "an interval upside down": (
        [("[1.0e-3, 0.3]", "[0.3, 0.1]")],
        "sweep.yaml:6: space.optimizer.rho.log_uniform: ",
        ["0.3"],
    ),
    "log of zero": ([("1.0e-3", "0.0")], "sweep.yaml:6: space.optimizer.rho.log_uniform: ", ["> 0"]),
    "two kinds": (
        [("{choice: [2, 4]", "{choice: [2, 4], grid: [2]")],
        "sweep.yaml:7: space.optimizer.n_samples: ",
        ["2 of"],
    ),
    "unknown kind": ([("choice: [2", "choise: [2")], "sweep.yaml:7: space.optimizer.n_samples.choise: ", ["'choice'"]),
    "no list": ([("[2, 4]", "4")], "sweep.yaml:7: space.optimizer.n_samples.choice: ", ["list of values", "4"]),
    "no values": ([("[2, 4]", "[]")], "sweep.yaml:7: space.optimizer.n_samples.choice: ", ["list of values"]),
    "a value twice": ([("[2, 4]", "[2, 2]")], "sweep.yaml:7: space.optimizer.n_samples.choice: ", ["2 twice"]),
    "a bare list": ([("{choice: [2, 4]}", "[2, 4]")], "sweep.yaml:7: space.optimizer.n_samples: ", ["grid", "choice"]),
    "an empty space": ([(f"space:\n  {RHO}\n  {N}\n", "space: {}\n")], "sweep.yaml:5: space: ", ["empty"]),
    "a missing recipe": ([("digits-frob", "digits-frop")], "sweep.yaml:2: run: ", ["'digits-frop'", "'digits-frob'"]),
    "no base run": ([("run: digits-frob\n", "")], "sweep.yaml:1: run: ", ["missing"]),
    "a metric that is never reported": (
        [("loss/validation", "loss/valid")],
        "sweep.yaml:14: metric: ",
        ["'loss/valid'", "'loss/validation'", "accuracy/test"],
    ),
    "an unknown search": ([("name: random", "name: bayes")], "sweep.yaml:9: search.name: ", ["bayes", "tpe"]),
    "search without a number": ([("  trials: 6\n", "")], "sweep.yaml:8: search.trials: ", ["missing"]),
    "a setting of another stopping": (
        [("first_rung: 3", "first_rung: 3\n  quantile: 0.2")],
        "sweep.yaml:14: stopping.quantile: ",
        ["belongs to pbt", "not to asha"],
    ),
    "a rung that no trial passes": (
        [("first_rung: 3", "first_rung: 20")],
        "sweep.yaml:13: stopping.first_rung: ",
        ["19", "20"],
    ),
    "an interval in a grid search": ([GRID], "sweep.yaml:6: space.optimizer.rho.log_uniform: ", ["grid search"]),
    "nothing to draw": (
        [(RHO + "\n  ", ""), ("choice: [2", "grid: [2")],
        "sweep.yaml:7: search: ",
        ["nothing to draw", "grid"],
    ),
    "a condition on an unknown key": (
        [("[2, 4]}", "[2, 4], when: {optimizer.mesure: frobenius}}")],
        "sweep.yaml:7: space.optimizer.n_samples.when.optimizer.mesure: ",
        ["'optimizer.measure'"],
    ),
    "a condition that never holds": (
        [("[2, 4]}", "[2, 4], when: {optimizer.measure: frobenious}}")],
        "sweep.yaml:7: space.optimizer.n_samples.when.optimizer.measure: ",
        ["'frobenious'", "'frobenius'"],
    ),
    "a circle of conditions": (
        [
            (RHO, "optimizer.rho: {choice: [0.1], when: {optimizer.n_samples: 2}}"),
            ("[2, 4]}", "[2, 4], when: {optimizer.rho: 0.1}}"),
        ],
        "sweep.yaml:6: space.optimizer.rho: ",
        ["circle", "optimizer.n_samples"],
    ),
    "a grid under a drawn condition": (
        [(RHO, "optimizer.lam: {grid: [1, 2], when: {optimizer.n_samples: 2}}")],
        "sweep.yaml:6: space.optimizer.lam.grid: ",
        ["optimizer.n_samples", "choice"],
    ),
    "the tracking of a trial": (
        [(N, "tracking.experiment: {choice: [a, b]}")],
        "sweep.yaml:7: space.tracking",
        ["under set"],
    ),
    "epochs beside a budget": (
        [(N, "training.epochs: {choice: [5, 9]}"), ("metric:", "budget: 9\nmetric:")],
        "sweep.yaml:7: space.training.epochs: ",
        ["budget = 9"],
    ),
    "seeds twice": (
        [(N, "training.seed: {grid: [0, 1]}"), ("metric:", "seeds: [0, 1]\nmetric:")],
        "sweep.yaml:7: space.training.seed: ",
        ["seeds"],
    ),
    "a budget that pays nothing": (
        [("metric:", "resource: gradient_evaluations\nbudget: 50\nmetric:")],
        "sweep.yaml:1: budget: ",
        ["50", "one epoch", "20 steps"],
    ),
    "half an epoch": ([("metric:", "budget: 9.5\nmetric:")], "sweep.yaml:14: budget: ", ["whole number", "9.5"]),
    "pbt over something else": (
        [("name: asha\n  first_rung: 3", "name: pbt\n  every: 3")],
        "sweep.yaml:7: space.optimizer.n_samples: ",
        ["optimizer.rho and optimizer.lam"],
    ),
    "stopping by results on other data": (
        [(N, "data.name: {grid: [digits, mnist5k]}")],
        "sweep.yaml:11: stopping: ",
        ["asha", "2 data sets (digits, mnist5k)", "none"],
    ),
    "learning from results on other data": (
        [
            (N, "data.name: {choice: [digits, mnist5k]}"),
            ("name: random", "name: tpe"),
            ("stopping:\n  name: asha\n  first_rung: 3\n", ""),
        ],
        "sweep.yaml:7: space.data.name: ",
        ["tpe", "2 data sets", "grid"],
    ),
    "too many trials": ([("trials: 6", "trials: 10001")], "sweep.yaml:5: space: ", ["10000"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_at_its_place(mistake: str) -> None:
    changes, start, named = MISTAKES[mistake]
    (line,) = errors(changed(*changes))
    assert line.startswith(start), line
    for word in named:
        assert word in line.removeprefix(start), (word, line)


def test_all_mistakes_are_told_at_once() -> None:
    lines = errors(changed((RHO, "optimizer.rhoo: {choice: [1]}"), ("[2, 4]", "[0, 2.5]")))
    assert [line.partition(" ")[0] for line in lines] == ["sweep.yaml:6:", "sweep.yaml:7:", "sweep.yaml:7:"]


def test_a_mistake_in_the_base_run_is_told_at_its_own_line() -> None:
    write(
        "name: base\ndata: {name: digits}\nmodel: {name: mlp}\noptimizer: {measure: sgdd}\ntraining: {epochs: 2}\n",
        "b.yaml",
    )
    (line,) = errors(changed(("digits-frob", "b.yaml")))
    assert line.startswith("b.yaml:4: optimizer.measure: ")


def test_a_run_is_no_sweep_and_a_sweep_has_a_near_name() -> None:
    with pytest.raises(ConfigError, match="is a run, not a sweep: phisam train mnist5k-frob"):
        load_sweep("mnist5k-frob")
    with pytest.raises(ConfigError, match="Did you mean 'small/table2'"):
        load_sweep("small/table")


def test_overrides_reach_the_sweep_its_settings_and_its_space() -> None:
    overrides = [
        "search.trials=3",
        "training.batch_size=32",
        "set.optimizer.lam=0.5",
        "space.optimizer.rho={grid: [0.1, 0.2]}",
        "seeds=[4]",
    ]
    sweep = load_sweep(write(SWEEP), overrides)
    search = make_search(sweep, 1)
    assert search.n_trials == 6
    config = sweep.trial(search.suggest(5, {}), 5)
    assert (config.training.batch_size, config.optimizer.lam, config.training.seed) == (32, 0.5, 4)
    assert config.optimizer.rho in (0.1, 0.2)
    assert config.name == "example/5"
    (line,) = errors(SWEEP, "search.trails=3")
    assert line.startswith("--set search.trails=3: search.trails: ")


def test_a_resolved_sweep_needs_neither_the_recipe_nor_the_folder() -> None:
    rest = "model: {name: mlp}\noptimizer: {measure: sgd}\ntraining: {epochs: 9}"
    write(f"name: base\ndata: {{name: mnist, root: here}}\n{rest}\n", "b.yaml")
    sweep = load_sweep(
        write("name: s\nrun: b.yaml\nspace:\n  training.seed: {grid: [0, 1]}\n  data.root: {grid: [a, b]}\n")
    )
    text, here = dump_sweep(sweep), Path.cwd()
    os.remove("b.yaml")
    (here / "elsewhere").mkdir()
    os.chdir("elsewhere")
    again = load_sweep(write(text))
    assert again == sweep
    assert again.differences(sweep) == []
    assert again.seeds == (0, 1)
    search = make_search(again, 1)
    roots = [again.trial(search.suggest(i, {}), i).data.root for i in range(search.n_trials)]
    assert roots == [here / "a", here / "a", here / "b", here / "b"]


def test_differences_are_what_decides_trials() -> None:
    sweep = load_sweep(write(SWEEP))
    other = load_sweep(write(changed(("0.3]", "0.4]"))), ["search.seed=1"])
    assert [line.partition(":")[0] for line in sweep.differences(other)] == ["space", "search"]
    free = ["max_concurrent=2", "retries=0", "description=x"]
    assert sweep.differences(load_sweep(write(SWEEP), free)) == []


def test_a_value_that_makes_no_run_names_the_trial() -> None:
    with pytest.raises(
        ConfigError, match=r"example: trial 3 \(optimizer.n_samples=1\): optimizer.n_samples: must be 2 or"
    ):
        load_sweep(write(SWEEP)).trial({"optimizer.n_samples": 1}, 3)


def test_mode_follows_the_metric() -> None:
    assert load_sweep(write(SWEEP)).mode == "min"
    best = load_sweep(write(SWEEP), ["metric=accuracy/validation"])
    assert best.mode == "max"
    assert best.better(0.9, 0.8)
    assert best.better(0.1, float("nan"))
    assert not best.better(float("nan"), 0.1)


def test_pbt_clips_to_its_space_and_ends_its_generations_before_the_run() -> None:
    text = changed((f"\n  {N}", ""), ("name: asha\n  first_rung: 3", "name: pbt\n  every: 5"))
    population = make_stopping(load_sweep(write(text)))
    assert isinstance(population, Population)
    assert population.boundaries == (5, 10, 15)  # of 20 epochs
    assert population.bounds == {"optimizer.rho": (1e-3, 0.3)}
    assert population.members == 6


def test_the_preview_tells_trials_and_what_they_cost() -> None:
    sweep = load_sweep(write(changed(("name: random\n  trials: 6", "name: tpe\n  trials: 12\n  startup: 3"))))
    text = preview(sweep, 2)
    lines = text.splitlines()
    assert "12 trials" in lines[0]
    assert "rungs at 3, 9 epochs" in text
    rows = [line.split() for line in lines if line[:1].isdigit() and line[-1:].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert row[3:] == ["20", f"{int(row[2]) + 1}", f"{20 * 20 * (int(row[2]) + 1):,}"]  # 20 epochs of 20 steps
    assert "3-11: chosen by TPE" in text
    most = sum(int(row[5].replace(",", "")) for row in rows) + 9 * 2000
    assert f"at most {most:,} gradient evaluations" in text
    assert text.endswith("1 worker a trial, 2 trials at once.")
    text = preview(sweep, None)
    assert text.endswith("1 worker a trial, as many trials at once as the cluster has place for.")


def test_what_trials_may_have_is_told_by_the_largest_and_by_each_data_set() -> None:
    changes = [(N, "scaling.num_workers: {choice: [1, 4]}"), ("name: random\n  trials: 6", "name: tpe\n  trials: 12")]
    sweep = load_sweep(write(changed(*changes, ("  scaling.num_workers: 1\n", "  scaling.cpus_per_worker: 0.5\n"))))
    assert preview(sweep, 1).endswith("1 or 4 workers a trial, one trial at a time.")
    assert variety.cpus_at_once(sweep, 3) == 6  # not by trial 0, which has one worker
    none = ("stopping:\n  name: asha\n  first_rung: 3\n", "")
    sweep = load_sweep(write(changed((N, "data.name: {grid: [digits, mnist5k]}"), none)))
    assert "On 2 data sets (digits, mnist5k), with a winner on each." in preview(sweep, 1)
    with pytest.raises(ConfigError, match=r"--register best: the trials are on 2 data sets \(digits, mnist5k\)"):
        variety.check_one_winner(sweep, "best")
    variety.check_one_winner(sweep, None)


# the sweeps that come with the package


@pytest.mark.parametrize("name", sweep_names())
def test_every_recipe_is_valid_and_previewed(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.name == name
    assert sweep.description in dump_sweep(sweep).replace("\n ", "")
    assert f"{make_search(sweep, 2).n_trials} trials" in preview(sweep, 2)


def test_paper_table2_is_its_42_cells_with_the_papers_rho() -> None:
    sweep = load_sweep("paper/table2")
    search = make_search(sweep, 1)
    configs = [sweep.trial(search.suggest(i, {}), i) for i in range(0, search.n_trials, len(sweep.seeds))]
    cells = Counter((c.data.name, c.data.fraction, c.optimizer.measure.name) for c in configs)
    assert len(cells) == 3 * 2 * 7
    rho = {(c.data.name, c.optimizer.measure.name): c.optimizer.rho for c in configs}
    for method, papers in {"sam": (0.05, 0.1, 0.05), "asam": (0.5, 1.0, 0.5), "ssam": (0.1, 0.2, 0.1)}.items():
        assert tuple(rho[data, method] for data in ("cifar10", "cifar100", "svhn")) == papers
    recipe = load("paper/svhn-s-asam")
    assert recipe.optimizer in [c.optimizer for c in configs if c.data == recipe.data]


def test_small_table2_gives_all_methods_the_same_evaluations() -> None:
    sweep = load_sweep("small/table2")
    search = make_search(sweep, 2)
    assert search.n_trials == 7 * 3 * 5
    configs = [sweep.trial(search.suggest(i, {}), i) for i in range(search.n_trials)]
    assert {(c.data.name, c.model.name) for c in configs} == {
        ("mnist5k", "mlp"),
        ("fashion_mnist", "mlp"),
        ("digits", "convnet"),
    }
    assert {(c.data.name, c.data.fraction) for c in configs} == {("mnist5k", 1), ("fashion_mnist", 0.1), ("digits", 1)}
    for data in ("mnist5k", "fashion_mnist", "digits"):
        costs = [evaluations(c) for c in configs if c.data.name == data]
        assert len(costs) == 35
        assert max(costs) - min(costs) <= 0.05 * max(costs)
