"""Ray, started while something else is done."""

from __future__ import annotations

import threading

import pytest

from ray_jobs import cluster
from ray_jobs.errors import ConfigError


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
