"""What a person sees of a sweep: one live table of its trials in a terminal, a plain line for each turn elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_jobs.formatting import brief, short_names, shown
from ray_jobs.progress import duration
from ray_jobs.sweep.ledger import Trial

Place = dict[str, Any]
FIRST = ("optimizer.rho", "optimizer.lam", "optimizer.n_samples", "training.seed")


class SweepBoard:
    """Where the workers of all trials leave word. Wrapped in one Ray actor by the driver."""

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}
        self._lines: list[str] = []

    def tell(self, trial: int, **place: Any) -> None:
        """The place inside an epoch: epoch, step, steps, loss, rate."""
        self._places[trial] = place

    def tell_event(self, trial: int, event: Any) -> None:
        """A line that a person must see."""
        if isinstance(event, str):
            self._lines.append(f"trial {trial}: {event}")

    def read(self, lines_seen: int) -> tuple[dict[int, Place], list[str]]:
        """The newest places, and the lines that the reader has not seen."""
        return self._places, self._lines[lines_seen:]


class SweepView:
    """Draws from a thread while Tune runs.

    Args:
        epochs: trial -> how many it has.
        trials: gives a snapshot of the trials that have started.
        read: asks the board.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        metric: str,
        n_trials: int,
        epochs: Mapping[int, int],
        trials: Callable[[], list[Trial]],
        read: Callable[[int], tuple[dict[int, Place], list[str]]],
    ) -> None:
        self._console, self._name, self._metric = console, name, metric
        self._n_trials, self._epochs, self._trials, self._read = n_trials, epochs, trials, read
        self._places: dict[int, Place] = {}
        self._lines_seen = 0
        self._since: tuple[float, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepView:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(Text(f"{self._name}: {line}"), soft_wrap=True)  # Text: what stands in brackets is no markup

    def turn(self, trial: Trial) -> None:
        """A trial began or ended; a terminal's table shows it anyway."""
        if not self._live:
            self.say(turn_line(trial, self._metric))

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            with contextlib.suppress(Exception):  # a board that does not answer yet, or no more
                self._places, lines = self._read(self._lines_seen)
                self._lines_seen += len(lines)
                for line in lines:
                    self.say(line)
            if self._live:
                self._live.update(self.render())

    def render(self) -> Group:
        """The table: trials that run, then the newest of the others, as many as the terminal is high."""
        trials = self._trials()
        keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
        first = [key for key in FIRST if key in keys]
        keys = [*first, *(key for key in keys if key not in FIRST)]
        table = Table(box=None, pad_edge=False)
        for head in ("trial", "state", "epoch", self._metric):
            table.add_column(head, no_wrap=True)
        for name in short_names(keys):
            table.add_column(name, no_wrap=True)
        rows = sorted(trials, key=lambda trial: (trial.over, -trial.index))[: max(5, self._console.height - 4)]
        for trial in sorted(rows, key=lambda trial: trial.index):
            values = [brief(trial.values.get(key, "")) for key in keys]
            style = "dim" if trial.over else None
            table.add_row(*self._cells(trial), *values, style=style)
        return Group(Text(f"{self._name}  {self._overall(trials)}"), table)

    def _cells(self, trial: Trial) -> list[str]:
        epochs = self._epochs.get(trial.index, 0)
        place = self._places.get(trial.index) if trial.status == "running" else None
        done = trial.points[-1].epoch if trial.points else 0
        within = f" +{place['step'] / place['steps']:.0%}" if place and place["epoch"] >= done else ""
        value = "" if trial.value is None else shown(self._metric, trial.value)
        return [str(trial.index), trial.status, f"{done}/{epochs}{within}", value]

    def _overall(self, trials: list[Trial]) -> str:
        over = sum(trial.over for trial in trials)
        done = over + sum(
            trial.points[-1].epoch / max(1, self._epochs.get(trial.index, 1))
            for trial in trials
            if not trial.over and trial.points
        )
        return f"{over}/{self._n_trials} trials over  {self._eta(done)}"

    def _eta(self, done: float) -> str:
        """From the pace since this driver began, each trial one part whatever it costs."""
        now = time.monotonic()
        if self._since is None:
            self._since = (now, done)
        since, first = self._since
        if done <= first:
            return ""
        return f"ETA {duration((now - since) / (done - first) * (self._n_trials - done))}"


def turn_line(trial: Trial, metric: str) -> str:
    """A trial's turn in one plain line."""
    names = short_names(list(trial.values))
    values = "  ".join(f"{name} {brief(value)}" for name, value in zip(names, trial.values.values(), strict=True))
    if not trial.points and not trial.over:
        return f"trial {trial.index} starts  {values}"
    last = trial.stopped or (trial.points[-1].epoch if trial.points else 0)
    value = "" if trial.value is None else f"  {metric} {shown(metric, trial.value)}"
    reason = f"  ({trial.reason})" if trial.reason else ""
    return f"trial {trial.index} {trial.status} at epoch {last}{value}  {values}{reason}"
