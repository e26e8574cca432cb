"""A dashboard of Ray's, as far as `phisam status`, `logs`, `stop` and `submit` speak to it, without Ray."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "5ec4e7" * 8
OUTPUT = "job-driver-run-0.log"


def job(job_id: str = "run-0", **known: Any) -> dict[str, Any]:
    """What Ray tells of a job."""
    return {
        "submission_id": job_id,
        "job_id": "01000000",
        "status": "RUNNING",
        "message": None,
        "metadata": {"phisam": "train", "name": "run"},
        "start_time": 1000,
        "end_time": None,
        "driver_node_id": "node",
        "driver_exit_code": None,
        **known,
    }


@dataclass
class FakeHead:
    """breaks: after how many bytes each stream of output breaks off, one after the other; then streams stay whole.

    errors: the end of a path -> HTTP codes that its next answers are, one after the other.
    """

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: bytes = b""
    breaks: list[int] = field(default_factory=list)
    errors: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    usage: dict[str, tuple[float, float]] = field(default_factory=dict)
    ahead: float = 0.0  # seconds, of its clock
    streams: int = 0
    on_stream: Any = None  # called when a stream has given all there is
    on_submit: Any = None  # called with a job that was taken
    asked: list[tuple[str, str]] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def fake_head(head: FakeHead) -> Iterator[FakeHead]:
    """Serves it on 127.0.0.1; only whoever has TOKEN gets answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string((timestamp or time.time()) + head.ahead)

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PUT(self) -> None:
            self._answer("PUT")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            path, query = parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}
            head.asked.append((method, path))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, b"Unauthorized")
            words = path.strip("/").split("/")
            if head.errors.get(words[-1]):
                return self._send(head.errors[words[-1]].pop(0), b"<html>")
            if path == "/api/jobs/" and method == "GET":
                return self._json(list(head.jobs.values()))
            if path == "/api/jobs/":
                asked = json.loads(body)
                head.submitted.append(asked)
                head.jobs[asked["submission_id"]] = job(asked["submission_id"], metadata=asked["metadata"])
                if head.on_submit is not None:
                    head.on_submit(head.jobs[asked["submission_id"]])
                return self._json({"submission_id": asked["submission_id"]})
            if words[:2] == ["api", "jobs"] and words[-1] == "stop":
                head.jobs[words[2]]["status"] = "STOPPED"
                return self._json({"stopped": True})
            if words[:2] == ["api", "jobs"]:
                return self._json(head.jobs[words[2]])
            if words[:2] == ["api", "packages"]:
                if method == "PUT":
                    head.packages[words[-1]] = body
                return self._send(200 if words[-1] in head.packages else 404, b"")
            if path == "/api/v0/logs/file":
                files = {**head.files, OUTPUT: head.output}
                content = files.get(query["filename"]) if query.get("node_id") == "node" else None
                return self._send(500, b"no such file") if content is None else self._send(200, content)
            if path == "/api/v0/logs/stream" and query.get("node_id") == "node" and query["filename"] == OUTPUT:
                return self._stream()
            if path == "/api/cluster_status":
                return self._json({"data": {"clusterStatus": {"loadMetricsReport": {"usage": head.usage}}}})
            if path == "/api/version":
                return self._json({"ray_version": importlib.metadata.version("ray")})
            return self._json({"data": {"result": {"result": head.rows.get(words[-1], [])}}})

        def _stream(self) -> None:
            limit = head.breaks[head.streams] if head.streams < len(head.breaks) else None
            head.streams += 1
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            output = head.output[:limit]
            for start in range(0, len(output), 7):  # not where lines end
                chunk = output[start : start + 7]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            if limit is None and head.on_stream is not None:
                head.on_stream()
            self.close_connection = True  # without the last chunk of length 0: it broke

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode())

        def _send(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    head.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield head
    finally:
        server.shutdown()
        server.server_close()
