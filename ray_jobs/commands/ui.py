"""`phisam ui`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import Any

from ray_jobs.commands.arguments import command, port


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "ui",
        run,
        "open MLflow's pages over the runs of this folder",
        """\
Starts MLflow's server on 127.0.0.1 over $PHISAM_HOME, else ./runs, until Ctrl-C.""",
    )
    parser.add_argument("--port", type=port, default=5000)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.errors import RunError
    from ray_jobs.paths import runs_folder

    store = runs_folder() / "mlflow.db"
    if not store.exists():
        raise RunError(f"{store} does not exist: train a run first, from this folder, or set PHISAM_HOME")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", arguments.port))
        except OSError as error:
            raise RunError(
                f"port {arguments.port} is not free ({error.strerror}); choose another with --port"
            ) from None
    print(f"MLflow over {store.parent} at http://127.0.0.1:{arguments.port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(arguments.port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning", "--backend-store-uri", f"sqlite:///{store}"]
    command += ["--default-artifact-root", (store.parent / "artifacts").as_uri()]
    command += [
        "--allowed-hosts",
        f"127.0.0.1:{arguments.port},localhost:{arguments.port}",
    ]  # no other page
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    os.execve(sys.executable, command, environment)  # this process becomes the server: one signal ends it
