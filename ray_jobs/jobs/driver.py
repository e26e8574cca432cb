"""A job on the cluster: the command that was submitted, with a heartbeat. Started by Ray in the unpacked package."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import phisam
from ray_jobs import cli, source
from ray_jobs.jobs import heartbeat
from ray_jobs.jobs.submit import JOB


def main() -> int:
    """Exit code of the command."""
    folder = Path.cwd()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    if job["version"] != phisam.__version__:
        print(
            f"phisam: submitted by phisam {job['version']}, but the cluster has {phisam.__version__}, which may take a "
            "description otherwise: install the same on both",
            file=sys.stderr,
        )
        return 2
    if not os.environ.get("PHISAM_HOME") and job["kind"] != "doctor":  # that one tells it in a line
        print(
            "phisam: PHISAM_HOME is not set on the cluster, so that runs would be lost with this job's folder: set it "
            "where Ray is started, to a folder that all nodes share, or give phisam submit --home FOLDER",
            file=sys.stderr,
        )
        return 2
    os.environ[source.CARRIED] = str(folder)
    signal.signal(signal.SIGTERM, _interrupt)  # `phisam stop`, also before a run has its own say in it
    with heartbeat.kept(job["id"], job["kind"]):
        return cli.main([job["kind"], *job["arguments"], "--address", "auto"])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
