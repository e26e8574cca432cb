"""What a run was made from and with."""

from __future__ import annotations

import importlib.metadata
import platform

import phisam
from ray_jobs import source


def provenance(fingerprint: str) -> dict[str, str]:
    """Tags that say what a run was made from and with."""
    packages = ("torch", "ray", "mlflow")
    versions = {f"version.{name}": importlib.metadata.version(name) for name in packages}
    return {
        "data.fingerprint": fingerprint,
        "version.python": platform.python_version(),
        "version.phisam": phisam.__version__,
        **versions,
        **source.carried()[0],
    }
