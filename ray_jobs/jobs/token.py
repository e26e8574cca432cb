"""Ray's token: one secret in one file, which nobody else may read.

Whoever has it may run code on the cluster. It is read from the file alone, so that it stands in no command line, and in
no environment, which tasks inherit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import stat
import tempfile
from pathlib import Path

from ray_jobs.errors import ConfigError

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def token_path() -> Path:
    """$RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token: where Ray looks too."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def read_token() -> str | None:
    """The token; None: there is no file.

    Raises:
        ConfigError: others may read the file, it is empty, or it cannot be read.
    """
    path = token_path()
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the token {path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}"
        ) from None
    if mode & OTHERS:
        raise ConfigError(
            f"the token {path} has mode {stat.S_IMODE(mode):o}, so that others can read it and run code on the "
            f"cluster: chmod 600 {shlex.quote(str(path))}"
        )
    if not token:
        raise ConfigError(f"the token {path} is empty: write the cluster's token into it")
    return token


def require_token(where: str) -> str:
    """The token for a cluster beyond this machine.

    Raises:
        ConfigError: there is none, or it is not kept as a secret should be.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        raise ConfigError(
            f"RAY_AUTH_TOKEN is set: every process inherits it from the environment. Unset it, and keep the token in "
            f"{token_path()}, mode 600"
        )
    token = read_token()
    if token is None:
        raise ConfigError(
            f"{where} is beyond this machine, and a token is needed there, but {token_path()} does not exist: copy the "
            "cluster's token to it and chmod 600 it, or name another file with RAY_AUTH_TOKEN_PATH"
        )
    return token


def ensure_token() -> Path:
    """The file of a token for clusters of this machine, made if there is none, and from now on readable by us alone.

    Ray would make it too, but readable by everybody.

    Raises:
        ConfigError: it cannot be made.
    """
    path = token_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            handle, made = tempfile.mkstemp(dir=path.parent)  # mode 600
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # whoever else makes it at this moment: one of them counts
                os.link(made, path)
            os.unlink(made)
        if path.stat().st_mode & OTHERS:
            path.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"the token {path} cannot be made, mode 600: {error.strerror}") from None
    return path
