"""MLflow's store of a home, made once and copied: its tables take seconds to make, and disks wait for each of them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from ray_jobs.tracking import open_store


def put_store(path: Path) -> None:
    """A store of no runs, unless there is one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_empty())


@functools.cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        open_store(f"sqlite:///{path}")
        return path.read_bytes()
