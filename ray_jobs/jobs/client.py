"""A cluster's HTTP interface: Ray's Jobs API, its State API for what the Jobs API does not tell, and packages.

Ray's own JobSubmissionClient is not used: it lets RAY_ADDRESS override an address that was given, knows no State API,
and takes two seconds to import. The paths are those of Ray's published OpenAPI description.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import time
from collections.abc import Iterator
from typing import Any

import requests

from ray_jobs.errors import RunError
from ray_jobs.jobs.address import Head
from ray_jobs.jobs.token import token_path

SECONDS = 30.0  # that one answer may take
NO_AGENT = "No available agent"  # a head that has just been started says so, and has begun nothing
AGENT_SECONDS = 60.0
AWAY = (502, 503, 504)  # what a proxy says of a head that does not answer it
Json = dict[str, Any]


class _Bearer(requests.auth.AuthBase):
    """Beats what a .netrc has for the host."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class UnreachableError(RunError):
    """The head does not answer, or a proxy says so."""


class JobsClient:
    """Each method raises RunError if the cluster refuses what it is asked for; UnreachableError if it says nothing."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.now = time.time()  # by the head's clock, at its last answer
        self._session = requests.Session()
        self._session.auth = _Bearer(head.token)
        if head.loopback:
            self._session.trust_env = False  # no proxy gets to see the token

    def version(self) -> str:
        """Ray's."""
        found = self._json("GET", "/api/version", "tell its version")
        with self._as_ray():
            return str(found["ray_version"])

    def ready(self) -> bool:
        """Whether the head takes jobs: its own agent, which starts them, answers."""
        heads = [node["node_id"] for node in self.rows("nodes") if node["is_head_node"] and node["state"] == "ALIVE"]
        if not heads:
            return False
        self._ask("GET", "/api/v0/logs", "list its logs", params={"node_id": heads[0], "glob": "gcs*"})
        return True

    def upload(self, package: bytes) -> str:
        """Leaves a zip file with the cluster; the URI that a job names it by. The same content has the same one."""
        name = f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip"
        path = f"/api/packages/gcs/{name}"
        if self._ask("GET", path, "look for a package", allowed=(404,)).status_code == 404:
            self._ask("PUT", path, "take a package", data=package)
        return f"gcs://{name}"

    def submit(self, job_id: str, entrypoint: str, runtime_env: Json, metadata: dict[str, str]) -> None:
        """Starts a job."""
        asked = {"submission_id": job_id, "entrypoint": entrypoint, "runtime_env": runtime_env, "metadata": metadata}
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                self._ask("POST", "/api/jobs/", f"start job {job_id}", json=asked)
                return
            except RunError as error:
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def jobs(self) -> list[Json]:
        """All jobs that were submitted, by anyone."""
        found = self._json("GET", "/api/jobs/", "list its jobs")
        with self._as_ray():
            return [job for job in found if job["submission_id"]]

    def job(self, job_id: str) -> Json:
        """What the cluster knows of a job."""
        found: Json = self._json("GET", f"/api/jobs/{job_id}", f"tell of job {job_id}")
        return found

    def stop(self, job_id: str) -> None:
        """Asks for SIGTERM to a job's driver."""
        self._ask("POST", f"/api/jobs/{job_id}/stop", f"stop job {job_id}")

    def output(self, job: Json) -> bytes | None:
        """All that a job has printed; None: it has not begun to, or its node is gone or does not answer."""
        node = job["driver_node_id"]
        return self.node_file(node, _output(job)) if node else None

    def follow(self, job: Json) -> Iterator[bytes]:
        """All that a job has printed, and what it prints from now on. Ends when the stream breaks."""
        asked = {"node_id": job["driver_node_id"], "filename": _output(job), "lines": "-1", "interval": "0.5"}
        what = f"give the output of job {job['submission_id']}"
        options: Any = {"params": asked, "stream": True, "timeout": (SECONDS, None)}
        with self._ask("GET", "/api/v0/logs/stream", what, **options) as response:
            yield from response.iter_content(None)

    def node_file(self, node: str, name: str) -> bytes | None:
        """A file of Ray's log folder on a node; None: there is no such file, or the node is gone or does not answer."""
        asked = {"node_id": node, "filename": name, "lines": "-1"}
        response = self._ask("GET", "/api/v0/logs/file", f"give {name}", params=asked, allowed=(500,))
        return None if response.status_code == 500 else response.content

    def rows(self, kind: str) -> list[Json]:
        """The State API's rows of a kind: placement_groups, actors, nodes."""
        asked = {"detail": "True", "limit": "10000"}
        found = self._json("GET", f"/api/v0/{kind}", f"list its {kind}", params=asked)
        with self._as_ray():
            rows: list[Json] = found["data"]["result"]["result"]
            return rows

    def usage(self) -> dict[str, tuple[float, float]]:
        """Resource -> how much of it is taken, and how much there is. Empty: nobody has counted yet."""
        found = self._json("GET", "/api/cluster_status", "tell what it has")
        with self._as_ray():
            counted = found["data"].get("clusterStatus") or {}
            usage = (counted.get("loadMetricsReport") or {}).get("usage") or {}
            return {name: (float(taken), float(all_of)) for name, (taken, all_of) in usage.items()}

    def _json(self, method: str, path: str, what: str, **options: Any) -> Any:
        response = self._ask(method, path, what, **options)
        try:
            return response.json()
        except requests.JSONDecodeError:
            raise self._another() from None

    @contextlib.contextmanager
    def _as_ray(self) -> Iterator[None]:
        """An answer of another shape is another server's."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._another() from None

    def _another(self) -> RunError:
        return RunError(f"{self.head.url} does not answer as Ray's dashboard does: is it another server?")

    def _ask(
        self, method: str, path: str, what: str, allowed: tuple[int, ...] = (), **options: Any
    ) -> requests.Response:
        options = {"timeout": SECONDS, "allow_redirects": False, **options}
        try:
            response = self._session.request(method, self.head.url + path, **options)
        except requests.RequestException as error:
            raise UnreachableError(
                f"{self.head.url} does not answer ({_reason(error)}); it was asked to {what}. --address is that of "
                "Ray's dashboard, port 8265 if nothing else was said"
            ) from None
        if response.status_code in AWAY:
            raise UnreachableError(
                f"{self.head.url} was asked to {what}, but the head is away (HTTP {response.status_code})"
            )
        with contextlib.suppress(TypeError, ValueError):
            self.now = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()
        if response.status_code in (401, 403):
            raise RunError(self._refused(response.status_code))
        if not response.ok and response.status_code not in allowed:
            said = _last_line(response.text)
            raise RunError(f"{self.head.url} was asked to {what}, but: {said} (HTTP {response.status_code})")
        return response

    def _refused(self, code: int) -> str:
        if self.head.token is None:
            return f"{self.head.url} asks for a token: write it into {token_path()} and chmod 600 that file"
        return f"{self.head.url} does not take the token in {token_path()} (HTTP {code}): is it another cluster's?"


def _output(job: Json) -> str:
    """Where Ray puts what a job prints, in its log folder on the driver's node."""
    return f"job-driver-{job['submission_id']}.log"


def _reason(error: Exception) -> str:
    """requests wraps the cause in layers of its own and urllib3's."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not accepted"
    text = str(error)
    for known in ("Connection refused", "Name or service not known", "No route to host", "Connection reset"):
        if known in text:
            return known.lower()
    return type(error).__name__


def _last_line(text: str) -> str:
    """Ray answers with its traceback."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "nothing"
