"""Ray, started while something else is done."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_jobs import cluster
from ray_jobs.errors import ConfigError, RunError


def test_what_needs_no_ray_is_done_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    starting = threading.Event()
    done = threading.Event()

    def start(*_: object) -> None:
        starting.set()
        assert done.wait(30), "Ray's start waits for what is done meanwhile, so they were not side by side"

    def meanwhile() -> str:
        assert starting.wait(30), "it waits for the start of Ray"
        done.set()
        return "a data set"

    monkeypatch.setattr(cluster, "_start", start)
    with cluster.connected(None, 1, False, meanwhile) as result:
        assert result == "a data set"


def test_a_mistake_that_is_found_meanwhile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile() -> None:
        raise ConfigError("data.root is not set")

    monkeypatch.setattr(cluster, "_start", lambda *_: None)
    with pytest.raises(ConfigError, match=r"data\.root is not set"), cluster.connected(None, 1, False, meanwhile):
        pytest.fail("the run began")


@pytest.mark.parametrize(("failures", "starts"), [(1, 2), (2, 2)])
def test_a_local_ray_that_was_too_slow_is_started_once_again(
    failures: int, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def init(**given: str) -> None:
        started.append(given["address"])
        if len(started) <= failures:
            raise Exception("The current node timed out during startup. This could happen because ...")  # Ray's words

    monkeypatch.setattr(ray, "init", init)
    if failures < starts:
        with cluster.connected(None, 1, False):
            pass
    else:
        with pytest.raises(RunError, match="no Ray at this machine: The current node timed out"):
            cluster._start(None, 1, False)
    assert started == ["local"] * starts


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head:6379", "ray://head:10001", "[2001:db8::1]:6379"])
def test_a_cluster_beyond_this_machine_is_not_joined_without_a_token(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it was asked for, without a token"))
    with pytest.raises(ConfigError, match="a token is needed there"), cluster.connected(address, 1, False):
        pytest.fail("the run began")


def test_auto_with_rays_own_variable_is_no_way_past_the_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head.example.com:6379")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("joined"))
    with (
        pytest.raises(ConfigError, match=r"head\.example\.com:6379 is beyond this machine"),
        cluster.connected("auto", 1, False),
    ):
        pass


def test_a_local_ray_finds_a_token_that_others_cannot_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("as Ray makes it")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    seen: list[int] = []
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(token.stat().st_mode & 0o777))
    with cluster.connected(None, 1, False):
        assert seen == [0o600]


def test_what_hears_of_the_workers_is_on_the_drivers_node_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    place: dict[str, Any] = {}

    def options(**given: Any) -> Any:
        place.update(given)
        return SimpleNamespace(remote=int)

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "5a" * 28))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: SimpleNamespace(options=options))
    assert cluster.beside_driver(int, "7") == 7
    strategy = place["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == ("5a" * 28, False)
