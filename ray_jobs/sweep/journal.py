"""A sweep's memory: one JSON object a line, appended and on disk before anything that follows from it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ray_jobs.errors import RunError

DESCRIPTION, JOURNAL = "sweep.yaml", "journal.jsonl"
"""In a sweep's folder."""

Event = dict[str, Any]


class Journal:
    """Opened by the one driver that holds the sweep's lock. A last line that was cut off by a crash is taken away.

    Attributes:
        events: what was read, and has been appended since.

    Raises:
        RunError: a line that is not the last is damaged: the file was changed by something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.events, whole = _read(path)
        self._file = path.open("ab")
        self._file.truncate(whole)
        _sync_folder(path.parent)

    def append(self, event: Event) -> None:
        """Returns when the event is on disk."""
        self._file.write(json.dumps(event).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.events.append(event)

    def close(self) -> None:
        """No more events."""
        self._file.close()


def read_journal(path: Path) -> list[Event]:
    """The whole events of a journal that someone else may be writing."""
    return _read(path)[0]


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, and on disk when this returns."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A new file's name is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[list[Event], int]:
    """Events, and the length in bytes of the lines that are whole."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    events = []
    lines = content[:whole].splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise RunError(f"{path}:{number}: damaged, so the sweep cannot go on from it") from None
            whole -= len(line) + 1  # a file system may keep the end of a line and lose its middle
            break
        events.append(event)
    return events, whole
