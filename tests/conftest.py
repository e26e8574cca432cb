"""What holds for all tests: the order of the files, and that nothing is taken from the machine or left in its home."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator

import pytest

# With a Ray, a database or examples to start these take minutes. pytest-xdist hands a file to the process that is free:
# one of these that began last would leave the other process nothing to do.
LONGEST = (
    "test_sweep_survival.py",
    "test_train.py",
    "test_survival.py",
    "test_faults.py",
    "test_examples.py",
    "test_nodes.py",
    "test_services.py",
    "test_fsdp.py",
    "test_ddp.py",
    "test_sharding.py",
    "test_user_code.py",
    "test_sharpness_command.py",
)

os.environ |= {  # MLflow and Ray read them when they are imported
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: beside the other process of the tests its workers would stand still
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # 60 by default: a machine that is busy with the other process needs more
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 by default, at each report
}
for name in ("MLFLOW_TRACKING_URI", "PHISAM_HOME", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A command called here sets variables for its Ray and puts its folder on the path: not for later tests."""
    before, path = dict(os.environ), list(sys.path)
    yield
    sys.path[:] = path
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray's token for the clusters of this process: none is made in the home, where another might find half of it."""
    path = tmp_path_factory.mktemp("token") / "auth_token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        yield
