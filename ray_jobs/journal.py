"""What must not be forgotten: a JSON object a line, appended, and on disk before anything that follows from it is done.

Each line carries its number as `seq`: a line that is lost in the middle, or there twice, is noticed.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from ray_jobs.disk import sync_folder
from ray_jobs.errors import RunError

Event = dict[str, Any]
TORN = ".torn"
"""What the file's name ends with that keeps the bytes of a last line that was not whole."""


class Journal:
    """Opened by the one process that holds its run's or sweep's lock; any of its threads may append.

    A last line that was cut off by a crash is put aside.

    Attributes:
        events: what was read, and has been appended since.

    Raises:
        RunError: a line that is not the last is damaged: the file was changed by something else; or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        content = _content(path)
        self.events, self._whole = _parsed(content, path)
        try:
            if torn := content[self._whole :]:
                with path.with_name(f"{path.name}{TORN}").open("ab") as aside:
                    aside.write(torn + b"\n")
            with path.open("ab") as file:
                file.truncate(self._whole)
            sync_folder(path.parent)
        except OSError as error:
            raise self._unwritable(error) from None

    def append(self, event: Event) -> None:
        """Returns when the event is on disk.

        Raises:
            RunError: it cannot be written; nothing of it is left in the file.
        """
        with self._lock:
            line = json.dumps({"seq": len(self.events), **event}).encode() + b"\n"
            try:
                with self._path.open("r+b") as file:
                    file.seek(self._whole)
                    file.truncate()  # what a write that failed, on a full disk, left of its line
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._unwritable(error) from None
            self._whole += len(line)
            self.events.append(event)

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{self._path} cannot be written ({error.strerror})")


def read_journal(path: Path) -> list[Event]:
    """The whole events of a journal that someone else may be writing; none where there is no file.

    Raises:
        RunError: it is damaged, or cannot be read.
    """
    return _parsed(_content(path), path)[0]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from None


def _parsed(content: bytes, path: Path) -> tuple[list[Event], int]:
    """Events, and the length in bytes of the lines that are whole."""
    whole = content.rfind(b"\n") + 1
    events: list[Event] = []
    lines = content[:whole].split(b"\n")[:-1]  # not splitlines, which knows more ends of lines than JSON
    for number, line in enumerate(lines):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError("no event")
            if event.pop("seq", number) != number:
                raise ValueError("not the next")
        except (ValueError, RecursionError):
            if number < len(lines) - 1:
                raise RunError(
                    f"{path}:{number + 1}: damaged, so nothing can go on from it: put a whole copy in its place"
                ) from None
            whole -= len(line) + 1  # a file system may keep the end of a line and lose its middle
            break
        events.append(event)
    return events, whole
