"""What is looked at before a sweep's first trial starts, and how a sweep that was begun is found. No Ray, no MLflow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from ray_jobs import config
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.journal import Journal
from ray_jobs.sweep import begun, prepare
from ray_jobs.sweep import run as sweeps
from ray_jobs.sweep.config import dump_sweep, load_sweep
from ray_jobs.sweep.prepare import Checks, concurrency
from ray_jobs.sweep.search import make_search
from ray_jobs.sweep.variety import cpus_at_once
from ray_jobs.trainer import alone
from tests.ray_jobs.test_sweep_driver import sweep_of


def test_a_place_in_the_cluster_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 5.0})
    described = config.load("digits-frob", ["scaling.num_workers=2"])
    assert concurrency([described], Checks(), None) == 2
    with pytest.raises(ConfigError, match=r"3 trials at once: a trial needs 2 CPUs, and the cluster has 5, .* for 2"):
        concurrency([described], Checks(), 3)
    with pytest.raises(ConfigError, match=r"num_workers = 6 .* needs 6 CPUs, but the cluster has 5"):
        concurrency([config.load("digits-frob", ["scaling.num_workers=6"])], Checks(), None)


def test_trials_of_one_worker_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    shared = config.load("digits-frob", ["scaling.num_workers=1", "scaling.gpus_per_worker=0.5"])
    assert concurrency([shared], Checks(), None) == 4
    with pytest.raises(ConfigError, match=r"gpus_per_worker.*must be 1 with num_workers = 2"):
        config.load("digits-frob", ["scaling.num_workers=2", "scaling.gpus_per_worker=0.5"])


def test_a_trial_that_cannot_run_is_said_before_the_first_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\nrun: digits-frob\nspace: {training.batch_size: {grid: [32, 5000]}}\nsearch: {name: grid}\n"
        "stopping: {name: none}\n"
    )
    sweep = load_sweep(str(path))
    with pytest.raises(ConfigError, match=r"trial 1 of s: training.batch_size = 5000"):
        prepare.Checks().known_trials(sweep, make_search(sweep, 1))


def test_another_space_under_the_same_name_and_a_second_driver_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    sweep = sweep_of(tmp_path, "tpe-asha")
    other = load_sweep(str(tmp_path / "tpe-asha.yaml"), ["search.trials=5"])
    folder = tmp_path / "a1b2c3d4e5"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(dump_sweep(sweep))
    journal = Journal(folder / "journal.jsonl")
    begun.check_name(other)  # it had not begun
    journal.append({"event": "begin", "max_concurrent": 1, "register": None, "time": 0.0})
    with pytest.raises(ConfigError, match=r"a1b2c3d4e5\) was begun with other settings: .*trials"):
        begun.check_name(other)
    with pytest.raises(RunError, match="phisam sweep --resume a1b2c3d4e5"):
        begun.check_name(sweep)
    assert begun.find("tpe-asha").folder == begun.find("a1b2c3d4").folder == folder
    with alone(folder, "sweep"), pytest.raises(RunError, match="sweep a1b2c3d4e5 is being trained by another process"):
        sweeps.resume(begun.find("tpe-asha"), None, None, None)  # type: ignore[arg-type]
    journal.append({"event": "end", "winner": 0, "time": 0.0})
    begun.check_name(sweep)  # the same again, once it is over, is a new sweep


def test_data_that_is_missing_is_said_at_once_and_data_that_changed_stops_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\nrun: digits-frob\nset: {data.root: nowhere}\nseeds: [0, 1]\n"
        "space: {data.name: {grid: [digits, fashion_mnist, cifar10]}}\n"
    )
    sweep = load_sweep(str(path))
    with pytest.raises(ConfigError) as caught:
        Checks().data(sweep)
    first, *missing = str(caught.value).splitlines()
    assert first == "sweep s: not all of its data is there"
    assert [line.partition(":")[0] for line in missing] == ["data.name = fashion_mnist", "data.name = cifar10"]
    assert all("/nowhere" in line for line in missing)

    begin = {"event": "start", "trial": 1, "values": {"data.name": "digits", "training.seed": 1}, "data": "f"}
    monkeypatch.setattr(prepare, "load_dataset", lambda data, seed: SimpleNamespace(fingerprint="fg"[seed]))
    with pytest.raises(RunError, match="trial 1 of s began on data with fingerprint f, but digits is g now"):
        Checks().same_data(sweep, [{"event": "begin"}, begin])
    Checks().same_data(sweep, [{**begin, "values": {"data.name": "digits", "training.seed": 0}}])


def test_only_the_sweep_that_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    good = dump_sweep(sweep_of(tmp_path, "tpe-asha"))
    old = good.replace("name: tpe-asha", "name: old\nno_key_of_today: 1")
    for name, text in {"a": old, "b": "name: [", "c": good, "d": "name: torn"}.items():
        (tmp_path / (name * 32)).mkdir()
        (tmp_path / (name * 32) / "sweep.yaml").write_text(text)
        (tmp_path / (name * 32) / "journal.jsonl").write_text('{"event": "begin"}\n{"even\n{"event": "end"}\n')
    (tmp_path / ("c" * 32) / "journal.jsonl").write_text('{"event": "begin"}\n')
    assert begun.find("tpe-asha").folder.name == "c" * 32
    found = begun.begun_before(sweep_of(tmp_path, "tpe-asha"))
    assert found is not None
    assert not found.over
    begun.check_name(sweep_of(tmp_path, "pbt"))
    for name in ("old", "a" * 8):
        with pytest.raises(ConfigError, match=r"sweep a{32} was begun with a description that .*\n.*no_key_of_today"):
            begun.find(name)


def test_concurrency_is_by_the_largest_of_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 9.0})
    shapes = [config.load("digits-frob", [f"scaling.num_workers={n}"]) for n in (1, 4, 2)]
    assert concurrency(shapes, Checks(), None) == 2
    with pytest.raises(ConfigError, match="3 trials at once: a trial needs 4 CPUs"):
        concurrency(shapes, Checks(), 3)


def test_an_unfinished_sweep_goes_on_before_one_of_its_name_that_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    sweep = sweep_of(tmp_path, "pbt")
    for name, events in {"a": ["begin", "end"], "b": ["begin"], "c": ["begin", "end"]}.items():
        folder = tmp_path / (name * 32)
        folder.mkdir()
        (folder / "sweep.yaml").write_text(dump_sweep(sweep))
        journal = Journal(folder / "journal.jsonl")
        for event in events:
            journal.append({"event": event, "time": 0.0})
    found = begun.begun_before(sweep)
    assert found is not None
    assert found.folder.name == "b" * 32


def test_a_local_ray_has_cpus_for_as_many_of_the_largest_trials_as_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\nrun: digits-frob\nspace: {scaling.num_workers: {grid: [1, 3, 2]}}\n")
    assert cpus_at_once(load_sweep(str(path)), None) == 3
    assert cpus_at_once(load_sweep(str(path)), 2) == 6
