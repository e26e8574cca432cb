"""What is sent to a cluster and told of its jobs, over a small HTTP server in place of Ray's."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import cli
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.jobs import driver as job_driver
from ray_jobs.jobs import heartbeat, logs, status
from ray_jobs.jobs.address import Head, dashboard_url, find_head
from ray_jobs.jobs.client import JobsClient
from ray_jobs.jobs.package import module_files, own_modules, packed
from ray_jobs.jobs.token import ensure_token
from tests.ray_jobs.fake_head import TOKEN, FakeHead, fake_head, job


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHead]:
    """A head, and a home with its token."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with fake_head(FakeHead()) as served:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", served.url)
        yield served


def client(head: FakeHead) -> JobsClient:
    return JobsClient(Head(head.url, TOKEN))


def beat(**known: Any) -> bytes:
    now = time.time()
    return json.dumps({"version": 1, "time": now, "moved": now, "run_id": "3f2a", "name": "run", **known}).encode()


# the output


def followed(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch, say: Callable[[str], object] = lambda _: None
) -> tuple[bytes, str]:
    monkeypatch.setattr(logs, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(logs, "RETRY_SECONDS", 0.01)
    output = io.BytesIO()
    ended = logs.follow(client(head), "run-0", output.write, say)
    return output.getvalue(), ended


def test_a_stream_that_breaks_is_connected_again_and_loses_and_repeats_nothing(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.jobs["run-0"] = job()
    head.output = "".join(f"line {number} ü\n" for number in range(50)).encode()
    head.breaks = [0, 13, 13, 100, 101, 300]
    head.on_stream = lambda: head.jobs["run-0"].update(status="SUCCEEDED")
    assert followed(head, monkeypatch) == (head.output, "succeeded")
    assert head.streams == len(head.breaks) + 1
    assert {path for method, path in head.asked if method != "GET"} == set(), "the job was touched"


def test_what_is_printed_while_the_stream_is_away_comes_at_the_end(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.jobs["run-0"] = job()
    head.output = b"first\n"

    def over() -> None:
        head.output += b"last words\n"
        head.jobs["run-0"]["status"] = "FAILED"

    head.on_stream = over
    assert followed(head, monkeypatch) == (b"first\nlast words\n", "failed")


@pytest.mark.parametrize("path", ["run-0", "stream", "file"])
def test_a_proxy_that_does_not_reach_the_head_ends_nothing(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    head.jobs["run-0"] = job()
    head.output = b"first\nlast words\n"
    head.errors = {path: [502, 503, 504]}
    head.on_stream = lambda: head.jobs["run-0"].update(status="SUCCEEDED")
    assert followed(head, monkeypatch) == (head.output, "succeeded")
    assert head.errors == {path: []}


def test_a_head_that_is_away_at_the_end_is_given_up_too(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PATIENCE", 0.2)
    head.jobs["run-0"] = job(status="SUCCEEDED")
    head.errors = {"file": [503] * 9999}
    with pytest.raises(RunError, match=r"give job-driver-run-0\.log, but the head is away \(HTTP 503\)"):
        followed(head, monkeypatch)


def test_an_end_that_cannot_be_read_is_tried_again_and_then_told(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head.jobs["run-0"] = job(status="FAILED")
    head.output = b"last words\n"
    head.errors = {"file": [500, 500]}
    said: list[str] = []
    assert followed(head, monkeypatch, said.append) == (head.output, "failed")
    assert said == []

    monkeypatch.setattr(logs, "END_SECONDS", 0.05)
    head.jobs["run-0"]["driver_node_id"] = "gone"
    assert followed(head, monkeypatch, said.append) == (b"", "failed")
    assert said == ["the output of run-0 cannot be read to its end: its node is gone, or it printed nothing"]
    assert cli.main(["logs", "run-0"]) == 0
    assert said[0] in capsys.readouterr().err

    head.jobs["run-0"]["driver_node_id"] = None  # it never began
    assert followed(head, monkeypatch, said.append) == (b"", "failed")
    assert len(said) == 1


def test_what_is_printed_of_an_output_has_no_secrets(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "RETRY_SECONDS", 0.01)
    head.jobs["run-0"] = job()
    head.output = b"one\nMLFLOW_TRACKING_PASSWORD=planted-word\nlast"
    head.breaks = [20]
    head.on_stream = lambda: head.jobs["run-0"].update(status="SUCCEEDED")
    for words in (["-f"], []):
        assert cli.main(["logs", "run-0", *words]) == 0
        assert capsys.readouterr().out == "one\nMLFLOW_TRACKING_PASSWORD=***\nlast\n"


def test_a_head_that_stays_away_is_given_up_with_what_to_do(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PATIENCE", 0.0)
    monkeypatch.setattr(logs, "RETRY_SECONDS", 0.0)
    away = JobsClient(Head("http://127.0.0.1:9", None))
    said: list[str] = []
    with pytest.raises(RunError, match=r"connection refused.*the job goes on unread: phisam logs run-0 -f"):
        logs.follow(away, "run-0", lambda _: None, said.append)


# the submission


def test_a_head_that_has_just_begun_is_asked_again(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = ["No available agent to submit job, please try again later.", "no such package"]
    asking = client(head)

    def ask(*_: object, **__: object) -> None:
        raise RunError(f"asked to start job j, but: {refusals.pop(0)} (HTTP 500)")

    monkeypatch.setattr(asking, "_ask", ask)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(RunError, match="no such package"):
        asking.submit("j", "python", {}, {})
    assert refusals == []


# the status


def told(head: FakeHead) -> dict[str, Any]:
    asking = client(head)
    return status.status(asking, status.find(asking, "run-0"))


def test_a_heartbeat_tells_the_place_and_an_old_one_is_called_so(head: FakeHead) -> None:
    head.jobs["run-0"] = job()
    name = heartbeat.file_name("run-0")
    at = {"epoch": 3, "step": 4, "steps": 10}
    head.files[name] = beat(epoch=2, epochs=12, at=at, metrics={"loss/train": 0.5})
    found = told(head)
    assert (found["run_id"], found["heartbeat"]["stale"], found["heartbeat"]["at"]) == ("3f2a", False, at)
    text = status.told(found)
    assert "2 of 12 epochs, at epoch 3, step 4 of 10  loss/train 0.5" in text
    assert "no heartbeat" not in text

    head.files[name] = beat(time=time.time() - 95, epoch=2, epochs=12)
    assert told(head)["heartbeat"]["stale"]
    assert "no heartbeat for 1:3" in status.told(told(head))

    head.jobs["run-0"]["status"] = "SUCCEEDED"  # nobody expects a word of it any more
    assert not told(head)["heartbeat"]["stale"]
    assert "no heartbeat" not in status.told(told(head))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"time": "yesterday"}', b'{"time": 1}'])
def test_a_heartbeat_that_is_half_written_is_none(head: FakeHead, text: bytes) -> None:
    head.jobs["run-0"] = job()
    head.jobs["run-0"]["job_id"] = None
    head.files[heartbeat.file_name("run-0")] = text
    assert told(head)["heartbeat"] is None
    assert "no heartbeat yet" in status.told(told(head))


def test_a_driver_whose_node_is_gone_is_not_called_a_starting_one(head: FakeHead) -> None:
    head.jobs["run-0"] = job(driver_node_id="gone")
    assert "no heartbeat can be read: the driver's node is gone" in status.told(told(head))
    head.jobs["run-0"]["job_id"] = None  # it has not spoken to Ray
    assert "no heartbeat yet: the driver is starting" in status.told(told(head))


def test_the_age_of_a_heartbeat_is_by_the_heads_clock(head: FakeHead) -> None:
    head.jobs["run-0"] = job()
    head.ahead = 3600.0
    head.files[heartbeat.file_name("run-0")] = beat(time=time.time() + 3600 - 100, moved=time.time() + 3600 - 200)
    found = told(head)["heartbeat"]
    assert 95 < found["age"] < 195 < found["still"] < 300
    assert found["stale"]


def test_a_job_without_room_says_what_it_waits_for(head: FakeHead) -> None:
    head.jobs["run-0"] = job()
    bundles = [{"unit_resources": {"CPU": 1.0, "GPU": 1.0}}] * 2
    head.rows["placement_groups"] = [
        {"creator_job_id": "01000000", "state": "PENDING", "bundles": bundles},
        {"creator_job_id": "01000000", "state": "CREATED", "bundles": bundles},
        {"creator_job_id": "02000000", "state": "PENDING", "bundles": bundles},
    ]
    alone = {"job_id": "01000000", "state": "PENDING_CREATION", "required_resources": {"CPU": 2.0}}
    inside = {**alone, "required_resources": {"CPU_group_0_ab": 1.0}}
    placed = {**alone, "required_resources": {"node:__internal_head__": 0.001}}
    head.rows["actors"] = [alone, inside, placed, {**alone, "state": "ALIVE"}]
    head.usage = {"CPU": (3.0, 4.0), "GPU": (1.0, 2.0), "node:127.0.0.1": (0.0, 1.0)}
    found = told(head)
    assert found["waiting_for"] == [
        {"count": 2, "resources": {"CPU": 1.0, "GPU": 1.0}},
        {"count": 1, "resources": {"CPU": 2.0}},
    ]
    assert found["usage"] == {"CPU": [3.0, 4.0], "GPU": [1.0, 2.0]}
    assert "waits for 2 x {CPU 1, GPU 1}; 1 of 4 CPU are free, 1 of 2 GPU are free" in status.told(found)


def test_the_json_has_the_shape_that_the_docs_describe(head: FakeHead, capsys: pytest.CaptureFixture[str]) -> None:
    head.jobs = {"run-0": job(), "run-1": job("run-1", status="FAILED", start_time=2000, driver_exit_code=2)}
    assert cli.main(["status", "--json"]) == 0
    all_of = json.loads(capsys.readouterr().out)
    assert sorted(all_of) == ["address", "jobs", "time", "version"]
    assert [found["id"] for found in all_of["jobs"]] == ["run-0"], "those that are not over, if there are any"
    keys = "connected ended exit_code heartbeat id kind message name run_id state submitted usage waiting_for"
    assert sorted(all_of["jobs"][0]) == keys.split()
    page = (Path(__file__).parents[2] / "docs/cluster.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in keys.split())

    assert cli.main(["list", "--json"]) == 0
    assert [found["id"] for found in json.loads(capsys.readouterr().out)["jobs"]] == ["run-1", "run-0"]
    assert cli.main(["status", "run-1"]) == 0
    assert "run-1  train  failed (exit code 2)" in capsys.readouterr().out


def test_an_id_may_be_cut_where_it_is_clear(head: FakeHead, capsys: pytest.CaptureFixture[str]) -> None:
    head.jobs = {name: job(name) for name in ("run-0a", "run-0b", "other-1")}
    assert cli.main(["stop", "oth"]) == 0
    assert capsys.readouterr().out == "other-1 stopped\n"
    assert cli.main(["stop", "run-0"]) == 1
    assert "2 jobs begin with 'run-0'; say which: run-0a, run-0b" in capsys.readouterr().err
    assert cli.main(["status", "nothing"]) == 1
    assert "no job 'nothing'" in capsys.readouterr().err


# the heart


def test_a_driver_leaves_its_place_and_a_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat.Heart, "_found", lambda _: tmp_path / heartbeat.file_name("run-0"))
    with heartbeat.kept("run-0", "train"):
        heartbeat.tell_run("3f2a", "run", 12, {}, [])
        place = {"epoch": 2, "step": 4, "steps": 9, "loss": 1.0, "rate": 5.0}
        heartbeat.tell_run("3f2a", "run", 12, place, [])
        assert heartbeat._heart is not None
        assert heartbeat._heart.told("at", None) == {"epoch": 3, "step": 4, "steps": 9}
        epoch = {"epoch": 3, "loss/train": 0.5, "accuracy/test": float("nan"), "seconds": 1}  # JSON has no NaN
        heartbeat.tell_run("3f2a", "run", 12, place, [epoch, "workers failed"])
        heartbeat.tell_run("3f2a", "run", 12, place, [])
        left = heartbeat._heart._word
        heartbeat.tell_run("4a3b", "next", 20, {"epoch": 0, "step": 1, "steps": 9}, [])
    assert left["at"] is None, "a word of an epoch that is over is no place"
    assert (left["epoch"], left["metrics"], left["said"]) == (3, {"loss/train": 0.5}, "workers failed")
    following = json.loads((tmp_path / heartbeat.file_name("run-0")).read_text())
    assert (following["run_id"], following["epoch"], following["metrics"]) == ("4a3b", 0, {}), "of the run before"
    assert following["at"] == {"epoch": 1, "step": 1, "steps": 9}
    heartbeat.tell_run("3f2a", "run", 12, {}, [])  # outside of a job it is nothing


def test_a_sweeps_last_word_counts_its_trials_as_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat.Heart, "_found", lambda _: tmp_path / heartbeat.file_name("run-0"))
    states = ["finished", "running"]
    with heartbeat.kept("run-0", "sweep"):
        heartbeat.watch_sweep("3f2a", "rho", lambda: states, 3)
        states[1:] = ["cut", "finished"]
    left = json.loads((tmp_path / heartbeat.file_name("run-0")).read_text())
    assert left["trials"] == {"cut": 1, "finished": 2, "of": 3}


# what travels


def test_a_mistake_is_told_as_train_tells_it_and_nothing_is_sent(
    head: FakeHead, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["digits-sgd", "--set", "optimizer.rhoo=1"]
    assert cli.main(["train", *wrong]) == 2
    of_train = capsys.readouterr().err
    assert cli.main(["submit", "train", *wrong]) == 2
    assert capsys.readouterr().err == of_train
    assert cli.main(["submit", "sweep", "digits-rho", "--set", "space.optimizer.rhoo.grid=[1]"]) == 2
    assert cli.main(["submit", "train", "digits-sgd", "--set", "tracking.uri=http://me:word@mlflow:5000"]) == 2
    assert head.asked == []


def test_a_run_travels_resolved_with_its_modules_and_the_changes_of_here(
    head: FakeHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    (work / "notes.txt").write_text("before\n")
    for words in (["init", "--quiet"], ["add", "notes.txt"], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (work / "notes.txt").write_text("after\napi_key = 'planted-in-a-file'\n")
    (work / "secret.env").write_text("PASSWORD=planted")

    assert cli.main(["submit", "train", "digits-sgd", "--set", "training.epochs=3", "--key", "mine"]) == 0
    job_id = capsys.readouterr().out.splitlines()[0]
    (asked,) = head.submitted
    assert asked["submission_id"] == job_id
    name = asked["runtime_env"]["working_dir"].removeprefix("gcs://")
    files = unpacked(head.packages[name])
    assert sorted(files) == ["code.diff", "job.json", "run-0.yaml", "source.json"]
    assert json.loads(files["job.json"])["arguments"] == ["run-0.yaml", "--key=mine"]
    assert json.loads(files["source.json"]) == {"git.commit": commit, "git.dirty": "true"}
    assert "-before\n+after\n+api_key = '***'" in files["code.diff"]
    assert "epochs: 3" in files["run-0.yaml"]
    everything = json.dumps(asked) + "".join(files.values())
    assert TOKEN not in everything
    assert "planted" not in everything


@pytest.mark.parametrize(("given", "seconds"), [([], "60"), (["--set", "checkpoint.grace_seconds=99.5"], "140")])
def test_a_stopped_job_has_the_time_that_its_run_needs_to_save_itself(
    head: FakeHead, given: list[str], seconds: str
) -> None:
    assert cli.main(["submit", "train", "digits-sgd", *given]) == 0
    assert head.submitted[0]["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": seconds}


def unpacked(package: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        return {info.filename: archive.read(info).decode() for info in archive.infolist()}


def test_own_modules_are_those_that_a_description_names() -> None:
    settings = {
        "description": "as in my_pkg.notes:of",
        "model": {"name": "my_pkg.nets:make", "options": {"note": "a:b"}},
        "optimizer": {"measure": {"name": "my_measures:mine"}},
        "data": {"name": "digits"},
        "tracking": {"uri": "http://mlflow:5000"},
        "space": {"model.name": [{"grid": ["other.nets:make", "mlp"]}], "data": [{"choice": ["sets:load"]}]},
    }
    assert own_modules(settings) == ["my_measures", "my_pkg.nets", "other.nets", "sets"]


def test_own_modules_are_found_without_being_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_pkg" / "parts").mkdir(parents=True)
    bomb = "import torch\nraise SystemExit('executed')\n"
    (tmp_path / "my_pkg" / "__init__.py").write_text(bomb)
    (tmp_path / "my_pkg" / "nets.py").write_text("import helpers.deep\nfrom . import parts\n" + bomb)
    (tmp_path / "my_pkg" / "parts" / "__init__.py").write_text("")
    (tmp_path / "my_pkg" / "data.csv").write_text("1")
    (tmp_path / "helpers.py").write_text(bomb)
    (tmp_path / "unrelated.py").write_text("")
    names = ["helpers.py", "my_pkg/__init__.py", "my_pkg/nets.py", "my_pkg/parts/__init__.py"]
    assert sorted(module_files(["my_pkg.nets"])) == names
    assert module_files(["sklearn.datasets"]) == {}, "installed: the cluster must have it"
    with pytest.raises(ConfigError, match=r"my_pkg\.netz: the package my_pkg has no such module"):
        module_files(["my_pkg.netz"])
    with pytest.raises(ConfigError, match="there is no module my_package in"):
        module_files(["my_package.nets"])
    (tmp_path / "helpers.py").write_text("def (")
    with pytest.raises(ConfigError, match=r"helpers\.py:1: not Python"):
        module_files(["my_pkg.nets"])


def test_a_link_out_of_a_package_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "outside.py").write_text("SECRET = 1")
    (tmp_path / "my_pkg" / "nets.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(ConfigError, match="a link to a file outside"):
        module_files(["my_pkg.nets"])


@pytest.mark.parametrize("name", ["../a.py", "/a.py", "a/../../b.py", "a\\b.py", "", ".", "a//b.py", "a\0.py"])
def test_no_name_leaves_the_folder_that_a_package_is_unpacked_in(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a file of a job"):
        packed({name: b""})


def test_the_same_files_make_the_same_package() -> None:
    files = {"b.py": b"2", "a/c.py": b"3"}
    assert packed(files) == packed(dict(reversed(files.items())))
    assert unpacked(packed(files)) == {"a/c.py": "3", "b.py": "2"}


# the token


def test_a_cluster_beyond_this_machine_needs_a_token_that_nobody_else_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    far = "https://ray.example.com"
    with pytest.raises(ConfigError, match=r"a token is needed there, but .*token does not exist"):
        find_head(far)
    token.write_text(TOKEN + "\n")
    token.chmod(0o640)
    with pytest.raises(ConfigError, match=f"mode 640.*chmod 600 {token}"):
        find_head(far)
    with pytest.raises(ConfigError, match="mode 640"):  # here too: it is the same secret
        find_head("127.0.0.1:8265")
    token.chmod(0o600)
    found = find_head(far)
    assert (found.url, found.token) == ("https://ray.example.com:443", TOKEN)
    assert TOKEN not in repr(found)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN is set") as refused:
        find_head(far)
    assert TOKEN not in str(refused.value)


def test_a_token_of_this_machine_is_made_for_us_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "private" / "token"))
    old = os.umask(0)
    try:
        path = ensure_token()
    finally:
        os.umask(old)
    made = path.read_text()
    assert (path.stat().st_mode & 0o777, len(made)) == (0o600, 64)
    assert list(path.parent.iterdir()) == [path]
    path.chmod(0o644)  # as Ray makes it
    assert ensure_token() == path
    assert (path.stat().st_mode & 0o777, path.read_text()) == (0o600, made)


def test_a_wrong_token_is_told_with_the_file_it_came_from(head: FakeHead, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    path.write_text("another")
    assert cli.main(["list"]) == 1
    assert f"does not take the token in {path} (HTTP 401)" in capsys.readouterr().err
    path.unlink()
    assert cli.main(["list"]) == 1
    assert f"asks for a token: write it into {path} and chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [{}, [], None, "pong", {"data": 1}, [1]])
def test_another_server_is_told_from_rays_dashboard(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = JobsClient(Head("http://127.0.0.1:8265", None))
    monkeypatch.setattr(asking, "_json", lambda *_, **__: answer)
    for method in (asking.version, asking.usage, lambda: asking.rows("nodes")):
        with pytest.raises(RunError, match="is it another server"):
            method()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("head:8265", "http://head:8265"),
        ("http://head/", "http://head:8265"),
        ("https://ray.example.com", "https://ray.example.com:443"),
        ("[::1]:8265", "http://[::1]:8265"),
        ("ray://head:10001", None),
        ("http://me:word@head:8265", None),
        ("http://head:8265/path", None),
        ("http://head:port", None),
        ("", None),
    ],
)
def test_addresses(given: str, url: str | None) -> None:
    if url is not None:
        assert dashboard_url(given) == url
        return
    with pytest.raises(ConfigError, match="no address of a dashboard"):
        dashboard_url(given)


def test_a_job_of_another_version_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.json").write_text('{"version": "0.0.1", "id": "x", "kind": "train", "arguments": []}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    monkeypatch.setattr(job_driver.cli, "main", lambda arguments: pytest.fail("it ran"))
    assert job_driver.main() == 2
    assert "submitted by phisam 0.0.1, but the cluster has" in capsys.readouterr().err
