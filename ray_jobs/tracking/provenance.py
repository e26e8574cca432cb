"""What a run was made from and with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

import phisam


def provenance(fingerprint: str) -> dict[str, str]:
    """Tags that say what a run was made from and with."""
    packages = ("torch", "ray", "mlflow")
    versions = {f"version.{name}": importlib.metadata.version(name) for name in packages}
    return {
        "data.fingerprint": fingerprint,
        "version.python": platform.python_version(),
        "version.phisam": phisam.__version__,
        **versions,
        **_git(),
    }


def _git() -> dict[str, str]:
    """Commit of the current directory's repository and whether it has uncommitted changes; nothing outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
