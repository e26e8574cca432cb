"""What the containers start, started here without them: Postgres, an S3-compatible store, MLflow behind a password.

Postgres is Debian's, as a user of its own; the store is moto's server, which speaks S3 and knows no passwords.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
PASSWORD, ADMIN = "a:very\\odd password", "correct-horse-battery"

pytestmark = pytest.mark.skipif(
    not POSTGRES or os.geteuid() != 0 or "postgres" not in {user.pw_name for user in pwd.getpwall()},
    reason="needs Debian's postgresql and the right to run it as its user",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_postgres(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["runuser", "-u", "postgres", "--", *command], check=True, capture_output=True, text=True, timeout=120, cwd="/"
    )


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[int]:
    """A server on 127.0.0.1 with the user and the database that the deployment has, and its port."""
    folder.mkdir(mode=0o755)
    shutil.chown(folder, "postgres")
    port, data, secret = free_port(), folder / "data", folder / "password"
    secret.write_text(PASSWORD)
    shutil.chown(secret, "postgres")
    ask = ["--auth-host=scram-sha-256", "--auth-local=scram-sha-256", "--data-checksums"]
    as_postgres(str(POSTGRES[-1] / "initdb"), "-D", str(data), "-U", "mlflow", f"--pwfile={secret}", *ask)
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    control = [str(POSTGRES[-1] / "pg_ctl"), "-D", str(data), "-w"]
    as_postgres(*control, "-l", str(folder / "log"), "-o", settings, "start")
    try:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        create = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", "postgres", "-c"]
        subprocess.run([*create, "CREATE DATABASE mlflow"], env=environment, check=True, capture_output=True)
        yield port
    finally:
        as_postgres(*control, "-m", "immediate", "stop")


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        started = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, 15)
            started.wait(timeout=60)


@dataclass(frozen=True)
class Service:
    """MLflow as serve.sh starts it."""

    url: str
    postgres_port: int
    password_file: Path
    environment: dict[str, str]
    log: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that Postgres' user reaches; pytest's own are closed to others."""
    folder = Path("/tmp") / f"phisam-deploy-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    with postgres(folder / "postgres") as database_port:
        store_port, port = free_port(), free_port()
        private = folder / "private"
        private.mkdir(mode=0o700)
        secrets = {
            "POSTGRES_PASSWORD_FILE": PASSWORD,
            "MLFLOW_ADMIN_PASSWORD_FILE": ADMIN,
            "MLFLOW_SECRET_KEY_FILE": "k" * 64,
            "S3_CREDENTIALS_FILE": "[default]\naws_access_key_id = key\naws_secret_access_key = secret\n",
        }
        for name, content in secrets.items():
            (private / name).write_text(content)
        own = Path(sys.executable).parent
        environment = {
            "PATH": f"{own}:{ROOT / 'docker' / 'mlflow'}:{os.environ['PATH']}",
            "HOME": str(private),
            **{name: str(private / name) for name in secrets},
            "POSTGRES_HOST": "127.0.0.1",
            "POSTGRES_PORT": str(database_port),
            "POSTGRES_USER": "mlflow",
            "POSTGRES_DB": "mlflow",
            "MLFLOW_ADMIN_USERNAME": "phisam",
            "MLFLOW_ARTIFACTS": "s3://phisam/artifacts",
            "MLFLOW_ALLOWED_HOSTS": f"localhost:{port},127.0.0.1:{port}",
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{store_port}",
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(port),
            "MLFLOW_WORKERS": "1",
        }
        store = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store_port)]
        with process(store, dict(os.environ), folder / "s3.log") as moto:
            wait_for(f"http://127.0.0.1:{store_port}/moto-api/", folder / "s3.log", moto)
            log = folder / "mlflow.log"
            with process([str(ROOT / "docker/mlflow/serve.sh")], environment, log) as server:
                url = f"http://127.0.0.1:{port}"
                wait_for(f"{url}/health", log, server)
                yield Service(url, database_port, private / "POSTGRES_PASSWORD_FILE", environment, log)


def wait_for(url: str, log: Path, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.3)
    pytest.fail(f"{url} did not answer:\n{log.read_text()[-3000:]}")


def ask(service: Service, user: str | None, host: str | None = None) -> int:
    """The status of a list of experiments, as a user, under a name for the server."""
    request = urllib.request.Request(f"{service.url}/api/2.0/mlflow/experiments/search?max_results=1")
    if user is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def log_run(service: Service, name: str) -> str:
    """A run with a metric and an artifact, through the server's proxy, by a client of its own; the run's id."""
    script = f"""
import mlflow
mlflow.set_experiment("deploy")
with mlflow.start_run(run_name={name!r}) as run:
    mlflow.log_metric("accuracy", 0.5)
    mlflow.log_text("kept", "note.txt")
print("RUN", run.info.run_id)
"""
    done = client(service, script)
    return done.split("RUN ")[1].strip()


def client(service: Service, script: str) -> str:
    told = {
        "MLFLOW_TRACKING_URI": service.url,
        "MLFLOW_TRACKING_USERNAME": "phisam",
        "MLFLOW_TRACKING_PASSWORD": ADMIN,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **told}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_run_with_an_artifact_goes_through_the_proxy(service: Service) -> None:
    run_id = log_run(service, "first")
    script = f'import mlflow; print(mlflow.artifacts.load_text("runs:/{run_id}/note.txt"))'
    assert client(service, script).strip() == "kept"


def test_who_has_no_password_or_a_wrong_one_is_refused(service: Service) -> None:
    assert ask(service, f"phisam:{ADMIN}") == 200
    assert ask(service, None) == 401
    assert ask(service, "phisam:wrong") == 401
    assert ask(service, "admin:password1234") == 401  # what MLflow's servers had by default once


def test_a_foreign_host_header_is_refused(service: Service) -> None:
    assert ask(service, f"phisam:{ADMIN}", host="rebound.example.com") == 403


def test_no_secret_stands_in_a_command_line_or_in_the_log(service: Service) -> None:
    ask(service, f"phisam:{ADMIN}")
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    shown = [*lines, service.log.read_bytes()]
    assert any(b"basic-auth" in line for line in lines), "the server's own command line is among them"
    for secret in (PASSWORD, ADMIN, "k" * 64):
        assert not any(secret.encode() in text for text in shown)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"MLFLOW_ADMIN_PASSWORD_FILE": "/nowhere"}, "the secret /nowhere is missing or empty"),
        ({"MLFLOW_ALLOWED_HOSTS": ""}, "the names that clients call this server by"),
        ({"MLFLOW_ARTIFACTS": "file:///tmp"}, "must be s3://BUCKET/PATH"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be used"),
    ],
)
def test_the_server_does_not_start_without_what_it_needs(service: Service, change: dict[str, str], told: str) -> None:
    environment = {**service.environment, **change, "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run(
        [str(ROOT / "docker/mlflow/serve.sh")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert told in done.stderr


def test_a_backup_brings_back_what_was_deleted(service: Service, folder: Path) -> None:
    run_id = log_run(service, "precious")
    backups = folder / "backups"
    backups.mkdir()
    environment = {
        **os.environ,
        "PGHOST": "127.0.0.1",
        "PGPORT": str(service.postgres_port),
        "PGUSER": "mlflow",
        "PGDATABASE": "mlflow",
        "POSTGRES_PASSWORD_FILE": str(service.password_file),
        "KEEP": "2",
    }
    for stamp in ("20200101T000000Z", "20200102T000000Z"):
        (backups / f"mlflow-{stamp}.dump").write_bytes(b"old")
    script = ROOT / "deploy/base/backup.sh"
    subprocess.run(["bash", str(script), str(backups)], env=environment, check=True, timeout=120)
    kept = sorted(path.name for path in backups.iterdir())
    assert len(kept) == 2, "the oldest is gone, and nothing half written is left"
    assert kept[0] == "mlflow-20200102T000000Z.dump"

    delete = f"import mlflow; mlflow.MlflowClient().delete_run({run_id!r})"
    client(service, delete)
    restore = ROOT / "deploy/base/restore.sh"
    subprocess.run(["bash", str(restore), str(backups / kept[1])], env=environment, check=True, timeout=120)
    script_ = f"""
import json, mlflow
run = mlflow.get_run({run_id!r})
print(json.dumps([run.info.lifecycle_stage, run.data.metrics, mlflow.artifacts.load_text("runs:/{run_id}/note.txt")]))
"""
    assert json.loads(client(service, script_)) == ["active", {"accuracy": 0.5}, "kept"]


def test_a_backup_that_fails_leaves_the_older_ones(service: Service, folder: Path) -> None:
    backups = folder / "spared"
    backups.mkdir()
    (backups / "mlflow-20200101T000000Z.dump").write_bytes(b"old")
    environment = {
        **os.environ,
        "PGHOST": "127.0.0.1",
        "PGPORT": "9",
        "PGUSER": "mlflow",
        "PGDATABASE": "mlflow",
        "POSTGRES_PASSWORD_FILE": str(service.password_file),
        "KEEP": "1",
    }
    script = ROOT / "deploy/base/backup.sh"
    done = subprocess.run(["bash", str(script), str(backups)], env=environment, capture_output=True, timeout=60)
    assert done.returncode != 0
    assert [path.name for path in backups.iterdir()] == ["mlflow-20200101T000000Z.dump"]
