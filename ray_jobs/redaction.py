"""Secrets are shown and stored as ***: by the key that they stand under, by their form, or because they are known.

Known are the values of secret-looking environment variables, and the token of Ray's clusters. `redacted` is for texts,
`without_secrets` for settings; `redacted_output` puts all that a command prints through the first.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO, cast

MASK = "***"
SHORTEST = 6  # letters of a known secret; a shorter one would take words out of every text

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NOUNS = {"password", "passwords", "passwd", "passphrase", "passcode", "secret", "secrets", "credential", "credentials"}
_NOUNS |= {
    "jwt",
    "authorization",
    "apikey",
    "apitoken",
    "authtoken",
    "accesstoken",
    "accesskey",
    "secretkey",
    "privatekey",
}
_OF_KEYS = {"api", "access", "private", "secret", "auth", "account", "signing", "encryption", "master"}
_OF_KEYS |= {"ssh", "openai", "anthropic", "wandb", "github", "gitlab", "azure"}
_OF_PASSES = {"db", "pg", "mysql", "redis", "smtp", "mail", "ftp", "proxy", "user", "admin", "root"}  # not forward_pass
_OF_TOKENS = {"pad", "padding", "bos", "eos", "cls", "sep", "unk", "mask", "class", "special", "start", "end", "next"}
_OF_TOKENS |= {"per", "n", "num", "max", "min", "image"}  # of a language model, or their number

_KEY = (
    r"(?P<key>(?<![\w.-])[\w.-]{0,60}?(?:pass|pwd|secret|token|credential|authorization|key|jwt|pat)[\w.-]{0,40})"
    r"(?P<between>[\"']?"
)
_TYPED = r"\]?[ \t]*(?::[ \t]*[\w.\[\]| ]{1,40})?"  # environ["KEY"] = "...", KEY: str = "..."
_LINE = r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'"
_LONG = r"\"\"\"[\s\S]*?(?:\"\"\"|\Z)|'''[\s\S]*?(?:'''|\Z)"
_SEVERAL = r"[\[(][ \t]*[bBfFrRuU]{0,2}[\"'][^\n\])]*[\])]?"
_QUOTED = rf"[bBfFrRuU]{{0,2}}(?:{_LONG}|{_LINE})|{_SEVERAL}|(?:Bearer|Basic|Digest)[ \t]+[^\s,;'\"]+"
_BARE = r"[^\s,;&'\"()\[\]{}]"
_ASSIGNED = re.compile(
    rf"{_KEY}{_TYPED}[ \t]*=[ \t]*)(?P<value>{_QUOTED}|{_BARE}*[^\s,;&'\"()\[\]{{}}:])", re.IGNORECASE
)
# A word after a colon is a value where nothing follows it: "password: must be text" is a sentence, but in a diff.
_TOLD = re.compile(
    rf"{_KEY}[ \t]*:[ \t]*)(?P<value>{_QUOTED}|{_BARE}+(?=[ \t]*(?:$|[,;)\]}}#])))", re.IGNORECASE | re.MULTILINE
)
_IN_DIFF = re.compile(
    rf"^[+-][ \t]*(?:- )?{_KEY}[ \t]*:[ \t]+)(?P<value>[^\s\"'#\[({{*][^\n#]*)", re.IGNORECASE | re.MULTILINE
)
_FLAG = re.compile(rf"(?=--){_KEY}[ \t]+)(?P<value>{_LINE}|[^\s*-]\S*)", re.IGNORECASE)
_PLAIN = re.compile(r"null|true|false|none|[0-9]{1,3}|[0-9]*\.[0-9]*", re.IGNORECASE)  # "loss per token: 0.5"
_IN_URL = re.compile(r"://[^/\s'\"]+@")  # to the last @: a password may hold one
_PRIVATE_KEY = re.compile(r"(-----BEGIN ([A-Z ]*PRIVATE KEY)-----)[\s\S]*?(-----END \2-----|\Z)")
_BEARER = re.compile(r"\b(Bearer[ \t]+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)


@cache
def is_secret(key: str) -> bool:
    """Whether what stands under a key is a secret: api_key, dbPassword, AWS_SESSION_TOKEN; not n_tokens, pad_token."""
    words = [word.lower() for word in _WORD.findall(key.rpartition(".")[2])]
    if words[-3:] == ["access", "key", "id"]:
        return True
    *before, last = words or [""]
    qualifier = before[-1] if before else ""
    if last == "token":
        return qualifier not in _OF_TOKENS
    if last in ("pass", "pat"):
        return qualifier in _OF_PASSES | {"github", "gitlab"}
    if last.endswith(("password", "passwd", "passphrase", "secret")):  # PGPASSWORD, dbpassword
        return True
    if last in ("keys", "tokens"):
        return qualifier in _OF_KEYS
    return last in _NOUNS or (last == "key" and qualifier in _OF_KEYS) or (last == "pwd" and bool(qualifier))


def redacted(text: str) -> str:
    """A text with *** in place of secrets: values of secret-looking keys, passwords in URLs, and what is known."""
    for secret in known_secrets():
        text = text.replace(secret, MASK)
    text = _BEARER.sub(rf"\1{MASK}", _IN_URL.sub(f"://{MASK}@", text))
    text = _PRIVATE_KEY.sub(rf"\1{MASK}\3", text)
    for pattern in (_ASSIGNED, _TOLD, _IN_DIFF, _FLAG):
        text = pattern.sub(_masked, text)
    return text


def without_secrets(settings: Any, key: str = "") -> Any:
    """Settings, nested in mappings and sequences, with *** under secret-looking keys, and their texts redacted.

    Args:
        key: what they stand under.
    """
    if settings is None or isinstance(settings, bool) or settings == "":
        return settings
    if is_secret(key):
        return MASK
    if isinstance(settings, Mapping):
        return {name: without_secrets(value, str(name)) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return type(settings)(without_secrets(value, key) for value in settings)
    return redacted(settings) if isinstance(settings, str) else settings


def secret_options(options: Mapping[str, Any], path: str = "options") -> Iterator[str]:
    """Dotted keys of what looks like a secret, at any depth: by its key, or as the user of a URL."""
    for name, value in options.items():
        key = f"{path}.{name}"
        if is_secret(str(name)) or (isinstance(value, str) and _IN_URL.search(value)):
            yield key
        elif isinstance(value, Mapping):
            yield from secret_options(value, key)
        elif isinstance(value, list | tuple):
            yield from secret_options({str(index): item for index, item in enumerate(value)}, key)


def known_secrets() -> list[str]:
    """Values that are secrets wherever they stand; the longest first, since one may hold another."""
    found = {value for name, value in os.environ.items() if is_secret(name) and not os.path.exists(value)}
    with contextlib.suppress(OSError, ValueError):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        found.add(path.read_text(encoding="utf-8").strip())
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Whatever is printed inside, tracebacks and Ray's and MLflow's own words too, is printed without secrets."""
    stdout, stderr = _Redacted(sys.stdout), _Redacted(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(TextIO, stdout)),
        contextlib.redirect_stderr(cast(TextIO, stderr)),
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(stdout.flush)
        at_the_end.callback(stderr.flush)
        yield


class _Redacted:
    """A stream but for what is written to it, which is read by whole lines: a key and its value may come apart."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = ""  # of a line

    def write(self, text: str) -> int:
        lines, end, self._begun = (self._begun + text).rpartition("\n")
        if end:
            self._stream.write(redacted(lines + end))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        begun, self._begun = self._begun, ""
        self._stream.write(redacted(begun))
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _masked(found: re.Match[str]) -> str:
    value = found["value"]
    if not is_secret(found["key"]) or _PLAIN.fullmatch(value):
        return found[0]
    quote = value[0] if value[0] in "'\"" and value[:3] != 3 * value[0] else ""
    before = found[0][: found.start("key") - found.start()]
    return f"{before}{found['key']}{found['between']}{quote}{MASK}{quote}"
