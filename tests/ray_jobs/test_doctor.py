"""The doctor's verdicts, from numbers; and that what cannot be done is a line and no traceback."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ray_jobs import cli
from ray_jobs.doctor import findings, here, run
from ray_jobs.doctor.findings import GIB, Finding
from ray_jobs.jobs import heartbeat
from ray_jobs.jobs.address import Head
from tests.ray_jobs.fake_head import TOKEN, FakeHead, fake_head

OURS = {"python": "3.11", "ray": "2.60.0", "torch": "2.14.1", "CUDA": "none"}


def verdicts(found: list[Finding]) -> list[str]:
    return [finding.verdict for finding in found]


def test_versions_that_differ_are_told_with_the_nodes_that_have_them() -> None:
    assert verdicts(findings.versions(OURS, {"a": OURS, "b": OURS})) == ["pass"]
    nodes = {"a": OURS, "b": {**OURS, "torch": "2.8.0"}, "c": {**OURS, "torch": "2.8.0", "ray": "2.59.0"}}
    ray, torch = findings.versions(OURS, nodes)
    assert (ray.verdict, ray.check, ray.told) == ("fail", "version of ray", "2.60.0 at the driver, 2.59.0 on c")
    assert torch.told == "2.14.1 at the driver, 2.8.0 on b, c"
    assert "install torch 2.14.1 everywhere" in torch.remedy
    (missing,) = findings.versions(OURS, {"a": {**OURS, "torch": "missing"}})
    assert missing.told.endswith("missing on a")


def test_gpus_that_torch_does_not_see() -> None:
    assert findings.devices({"a": 0, "b": 0}, {}).verdict == "pass"
    assert findings.devices({"a": 4, "b": 0}, {"a": 4}).told == "4, seen by torch"
    blind = findings.devices({"a": 4, "b": 2}, {"a": 4, "b": 0})
    assert (blind.verdict, "on b that torch" in blind.told) == ("fail", True)


@pytest.mark.parametrize(
    ("writes", "unseen", "given", "verdict", "part"),
    [
        ({"a": "", "b": ""}, [], True, "pass", "written and read by 2 nodes"),
        ({"a": ""}, [], False, "warn", "PHISAM_HOME is not set"),
        ({"a": "", "b": ""}, ["b"], True, "fail", "another folder on b"),
        ({"a": "", "b": "Permission denied"}, [], True, "fail", "b: Permission denied"),
    ],
)
def test_storage(writes: dict[str, str], unseen: list[str], given: bool, verdict: str, part: str) -> None:
    found = findings.storage("/runs", given, writes, unseen)
    assert found.verdict == verdict
    assert part in found.told
    assert bool(found.remedy) == (verdict != "pass")


@pytest.mark.parametrize(("free", "verdict"), [(20, "pass"), (10, "pass"), (9.9, "warn"), (1, "warn"), (0.9, "fail")])
def test_the_fullest_node_counts(free: float, verdict: str) -> None:
    found = findings.disk("/runs", {"a": 100 * GIB, "b": int(free * GIB)})
    assert (found.verdict, "on b, the least" in found.told) == (verdict, True)
    assert findings.shared_memory({"a": 2**20}).verdict == "fail"


def test_files_that_others_can_read_or_change() -> None:
    assert verdicts(findings.open_files({"a": {"/home/me/.ray/auth_token": 0o600, "/runs/": 0o755}})) == ["pass"]
    token, folder = findings.open_files({"a": {"/home/me/.ray/auth_token": 0o644, "/runs/": 0o777}})
    assert (token.verdict, token.remedy) == ("fail", "chmod 600 /home/me/.ray/auth_token")
    assert (folder.verdict, folder.remedy) == ("warn", "chmod o-w /runs/")


def test_a_cluster_without_a_token_fails() -> None:
    assert findings.token("token", False).verdict == "pass"
    assert findings.token("token", True).verdict == "warn"
    assert findings.token("", False).verdict == "fail"
    assert findings.token("disabled", False).verdict == "fail"


def test_a_clock_counts_as_wrong_only_where_the_measurement_is_sure_of_it() -> None:
    assert findings.clocks({"a": (0.01, 0.01), "b": (2.0, 1.5)}).verdict == "pass"
    late = findings.clocks({"a": (0.0, 0.1), "b": (-5.0, 0.5)})
    assert (late.verdict, late.told) == ("warn", "the clock of b is 5 s behind")
    assert findings.clocks({"a": (3600.0, 0.5)}).verdict == "fail"


def test_the_speed_of_an_all_reduce() -> None:
    fast = findings.all_reduce("nccl", 8, 32, 0.001, True)
    assert (fast.verdict, fast.told) == ("pass", "nccl, 8 ranks, 32 MB: 32,000 MB/s")
    assert findings.all_reduce("gloo", 2, 32, 1.0, True).verdict == "warn"
    assert findings.all_reduce("nccl", 2, 32, 0.001, False).verdict == "fail"
    assert findings.all_reduce("nccl", 1, 32, 0.001, True).verdict == "pass"


def test_one_failure_is_enough_for_the_exit_code() -> None:
    well, unwell = Finding("a", "warn", "b"), findings.failed("a", "b")
    assert [findings.exit_code([well]), findings.exit_code([well, unwell])] == [0, 1]


# by a job, on a head that is none


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def over(head: FakeHead, left: dict[str, Any] | None, **known: Any) -> None:
    """The job that the doctor sends is over at once, with what its driver left."""

    def submitted(job: dict[str, Any]) -> None:
        job.update(known)
        if left is not None:
            head.files[heartbeat.file_name(job["submission_id"])] = json.dumps({"time": 1, "moved": 1, **left}).encode()

    head.on_submit = submitted


def test_what_a_job_finds_is_told_beside_what_is_seen_from_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_head(FakeHead()) as head:
        lines = [vars(Finding("disk", "warn", "little", "delete")), vars(findings.failed("MLflow", "away"))]
        over(head, {"findings": lines}, status="FAILED", driver_exit_code=1)
        code, told = doctor(capsys, "--address", head.url)
        assert sorted(told) == ["address", "findings", "ok", "version"]
        assert (code, told["ok"], told["address"]) == (1, False, head.url)
        found = {finding["check"]: finding["verdict"] for finding in told["findings"]}
        assert found == {"cluster": "pass", "job": "pass", "disk": "warn", "MLflow": "fail"}
        (asked,) = head.submitted
        assert asked["metadata"]["phisam"] == "doctor"


def test_the_environment_names_the_cluster_as_for_the_other_commands(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_probed", lambda _: [])
    with fake_head(FakeHead()) as head:
        over(head, {"findings": [vars(Finding("disk", "pass", "much"))]}, status="SUCCEEDED", driver_exit_code=0)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
        code, told = doctor(capsys)
        assert (code, told["address"], len(head.submitted)) == (0, head.url, 1)


def test_a_job_that_cannot_even_look_is_a_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_head(FakeHead()) as head:
        message = "Job entrypoint command failed\npython: No module named ray_jobs"
        over(head, None, status="FAILED", message=message)
        code, told = doctor(capsys, "--address", head.url)
    (line,) = (finding for finding in told["findings"] if finding["check"] == "job")
    assert (code, line["verdict"]) == (1, "fail")
    assert "No module named ray_jobs" in line["told"]
    assert "needs phisam" in line["remedy"]


@pytest.mark.parametrize(
    ("address", "mode", "check", "part"),
    [
        ("127.0.0.1:9", 0o600, "cluster", "does not answer"),
        ("127.0.0.1:9", 0o644, "address and token", "chmod 600"),
        ("ray://head:1", 0o600, "address and token", "no address of a dashboard"),
    ],
)
def test_wrong_and_missing_things_are_lines(
    home: Path, capsys: pytest.CaptureFixture[str], address: str, mode: int, check: str, part: str
) -> None:
    (home / "token").chmod(mode)
    code, told = doctor(capsys, "--address", address)
    (line,) = told["findings"]
    assert (code, line["check"], line["verdict"]) == (1, check, "fail")
    assert part in line["told"]


@pytest.mark.parametrize(
    ("ours", "checks"),
    [("2.59.0", ["cluster"]), ("2.60.0", ["cluster", "Ray of this machine"]), (None, ["cluster"])],
)
def test_another_ray_here_is_a_warning_and_none_is_not(
    monkeypatch: pytest.MonkeyPatch, ours: str | None, checks: list[str]
) -> None:
    def version(package: str) -> str:
        if ours is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return ours

    monkeypatch.setattr(importlib.metadata, "version", version)
    client = mock.Mock(head=Head("http://127.0.0.1:1", None), now=time.time(), version=lambda: "2.59.0")
    found = here.reached(client)
    assert [finding.check for finding in found] == checks
    assert {finding.verdict for finding in found[1:]} <= {"warn"}


def test_a_check_that_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_jobs.doctor.probe import _tried

    def broken() -> list[Finding]:
        raise KeyError("NodeID")

    (line,) = _tried("storage", broken)
    assert (line.verdict, line.told) == ("fail", "not to be found out: 'NodeID'")
