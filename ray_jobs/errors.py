"""Errors for the person at the command line: their text is all that is printed, never a traceback."""

from ray_jobs.redaction import redacted


class ConfigError(ValueError):
    """A mistake in a run description, a flag, or the data it names. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot start, go on, or be found. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, after what it asks for was done. Exit code 143."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line, without secrets: it may be stored."""
    return redacted(next(iter(str(error).strip().splitlines()), type(error).__name__))
