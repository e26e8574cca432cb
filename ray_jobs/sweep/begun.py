"""Sweeps that were begun here, and the one among them that a person means. No other is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ray_jobs.errors import ConfigError, RunError
from ray_jobs.journal import read_journal
from ray_jobs.paths import runs_folder
from ray_jobs.sweep.config import SweepConfig, load_sweep
from ray_jobs.sweep.journal import DESCRIPTION, JOURNAL
from ray_jobs.yaml_source import name_in


@dataclass(frozen=True)
class Found:
    """A sweep that was begun: its description, and the folder that is named by its id."""

    sweep: SweepConfig
    folder: Path

    @property
    def over(self) -> bool:
        """Its winner is told."""
        return is_over(self.folder)


def find(name_or_id: str) -> Found:
    """The sweep that `--resume` names: by its id, eight letters of it, or its name if that is unique.

    Raises:
        ConfigError: this version of phisam does not take its description.
        RunError: there is none here, or several.
    """
    folders = [f for f in _folders() if f.name.startswith(name_or_id)] if len(name_or_id) >= 8 else []
    folders = folders or _called(name_or_id)
    if not folders:
        raise RunError(f"no sweep {name_or_id!r} in {runs_folder()}; a sweep prints its id when it starts")
    if len(folders) > 1:
        ids = ", ".join(folder.name for folder in folders)
        raise RunError(f"{len(folders)} sweeps are called {name_or_id!r}; say which by its id: {ids}")
    return _read(folders[0])


def begun_before(sweep: SweepConfig) -> Found | None:
    """The sweep of this name that was begun here, an unfinished one before one that is over; None if there is none.

    Raises:
        ConfigError: it has other settings.
    """
    folders = sorted(_called(sweep.name), key=is_over)
    if not folders:
        return None
    found = _read(folders[0])
    check_same(found, sweep)
    return found


def check_name(sweep: SweepConfig) -> None:
    """A new sweep must not be taken for another of its name.

    Raises:
        ConfigError: there is one of another space.
        RunError: there is the same one, unfinished.
    """
    for folder in _called(sweep.name):
        other = _read(folder)
        check_same(other, sweep)
        if not other.over:
            raise RunError(
                f"sweep {sweep.name} was begun: phisam sweep --resume {folder.name} goes on with it; "
                "for another one, set name="
            )


def check_same(found: Found, sweep: SweepConfig) -> None:
    """A sweep goes on as it began.

    Raises:
        ConfigError: the file asks for something else now.
    """
    if differences := found.sweep.differences(sweep):
        raise ConfigError(
            f"sweep {found.sweep.name} ({found.folder.name}) was begun with other settings: {'; '.join(differences)}. "
            "Start a new one under another name, with --set name=..."
        )


def is_over(folder: Path) -> bool:
    """Whether a sweep has told its winner, or that it has none.

    Raises:
        RunError: its journal is damaged.
    """
    return any(event["event"] == "end" for event in read_journal(folder / JOURNAL))


def _folders() -> list[Path]:
    """Of sweeps that had begun; what is in their files is not looked at."""
    described = sorted(path.parent for path in runs_folder().glob(f"*/{DESCRIPTION}"))
    return [folder for folder in described if _has_a_line(folder / JOURNAL)]


def _has_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")
    except OSError:
        return False


def _called(name: str) -> list[Path]:
    return [folder for folder in _folders() if name_in(folder / DESCRIPTION) == name]


def _read(folder: Path) -> Found:
    try:
        return Found(load_sweep(str(folder / DESCRIPTION)), folder)
    except ConfigError as error:
        raise ConfigError(
            f"sweep {folder.name} was begun with a description that this version of phisam does not take; to start "
            f"another one, give it another name, with --set name=...\n{error}"
        ) from None
