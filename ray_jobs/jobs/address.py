"""Which cluster a command is for: the address of its dashboard, and the token that it asks for."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ray_jobs.errors import ConfigError
from ray_jobs.jobs import local
from ray_jobs.jobs.token import read_token, require_token


@dataclass(frozen=True)
class Head:
    """A cluster's head, as it is reached from here. url: of its dashboard, without a slash at its end."""

    url: str
    token: str | None = field(repr=False)

    @property
    def loopback(self) -> bool:
        return is_loopback(urlsplit(self.url).hostname or "")


def find_head(address: str | None) -> Head:
    """The cluster that is named, else RAY_API_SERVER_ADDRESS, else the one that `phisam cluster start` began.

    Raises:
        ConfigError: there is none, the address cannot be one, or its token is missing or open to others.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        running = local.running()
        if running is None:
            raise ConfigError("no cluster: phisam cluster start begins one here, --address URL names another")
        address = running.url
    url = dashboard_url(address)
    loopback = is_loopback(urlsplit(url).hostname or "")
    return Head(url, read_token() if loopback else require_token(url))


def dashboard_url(address: str) -> str:
    """http://host:port of a dashboard. The port is 8265 where none is given.

    Raises:
        ConfigError: it is no such address.
    """
    text = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(
            f"--address {address!r} is no address of a dashboard, such as http://127.0.0.1:8265 or https://ray.example.com"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = 443 if parts.scheme == "https" else 8265
    return f"{parts.scheme}://{host}:{port or default}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its own name for itself. A name that must be looked up is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
