"""What a person sees: one live line in a terminal, a plain line an epoch elsewhere, one table at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

Metrics = dict[str, Any]


class Board:
    """Where rank 0 leaves word and the driver reads it. Wrapped in a Ray actor by the driver."""

    def __init__(self) -> None:
        self._place: Metrics = {}
        self._events: list[Metrics | str] = []
        self._stop = False

    def tell(self, **place: Any) -> bool:
        """The place inside an epoch: epoch, step, steps, loss, rate (examples/s). Is the run to save and end?"""
        self._place = place
        return self._stop

    def stop(self) -> None:
        """From now on `tell` answers so."""
        self._stop = True

    def tell_event(self, event: Metrics | str) -> None:
        """The metrics of a whole epoch, or a line that a person must see."""
        self._events.append(event)

    def read(self, events_seen: int) -> tuple[Metrics, list[Metrics | str]]:
        """The newest place, and the events that the reader has not seen."""
        return self._place, self._events[events_seen:]


class ProgressView:
    """Draws a run's progress from a thread while the driver waits for `fit`."""

    def __init__(
        self,
        console: Console,
        name: str,
        epochs: int,
        read: Callable[[int], tuple[Metrics, list[Metrics | str]]],
        interval: float = 0.25,
    ) -> None:
        self._console, self._name, self._epochs = console, name, epochs
        self._read, self._interval = read, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._newest: Metrics = {}  # of the epochs that were told
        self._events_seen = 0
        self._started: tuple[float, float] | None = None  # time and place of the first word: the ETA starts there
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
            self._live.update(Text(f"{self._name}  starting workers"))
        else:
            self._say("starting workers")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._draw()
        if self._live:
            self._live.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._draw()

    def _draw(self) -> None:
        try:
            place, events = self._read(self._events_seen)
        except Exception:  # a board that does not answer yet, or no more: the driver will say why
            return
        self._events_seen += len(events)
        for event in events:
            if isinstance(event, str):
                self._say(event)
                continue
            self._newest = event
            if not self._live:
                self._say(epoch_line(event, self._epochs))
        if self._live and (place or self._newest):
            self._live.update(Text(f"{self._name}  {self._live_line(place)}"))

    def _say(self, line: str) -> None:
        # As Text: an error's own words, such as "[/usr/lib/...]", are no markup.
        self._console.print(Text(f"{self._name}: {line}"), soft_wrap=True)

    def _live_line(self, place: Metrics) -> str:
        newest = self._newest
        done = float(newest.get("epoch", 0))
        parts = []
        if place and place["epoch"] >= done:
            done = place["epoch"] + place["step"] / place["steps"]
            parts = [f"epoch {place['epoch'] + 1}/{self._epochs}", f"step {place['step']}/{place['steps']}"]
            parts += [f"loss {place['loss']:.4f}", f"{place['rate']:,.0f} examples/s"]
        else:
            parts = [f"epoch {int(done)}/{self._epochs}", f"loss {newest['loss/train']:.4f}"]
            parts += [f"{newest['examples_per_second']:,.0f} examples/s"]
        if newest:
            parts.insert(-1, f"val acc {newest['accuracy/validation']:.2%}")
        return "  ".join([*parts, self._eta(done)])

    def _eta(self, done: float) -> str:
        now = time.monotonic()
        if self._started is None or done <= self._started[1]:
            self._started = self._started or (now, done)
            return ""
        since, first = self._started
        return f"ETA {duration((now - since) / (done - first) * (self._epochs - done))}"


def epoch_line(metrics: Metrics, epochs: int) -> str:
    """One epoch in one plain line."""
    return (
        f"epoch {metrics['epoch']}/{epochs}  loss {metrics['loss/train']:.4f}  "
        f"val acc {metrics['accuracy/validation']:.2%}  {metrics['examples_per_second']:,.0f} examples/s"
    )


def duration(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass(frozen=True)
class Summary:
    """What the table at the end says of a run."""

    name: str
    run_id: str
    measure: str
    n_samples: int
    history: Sequence[Metrics]
    seconds: float


def summary_table(summaries: Sequence[Summary]) -> Table:
    """A column for each run: its settings, the last epoch's numbers, and the epoch that validation would choose."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    for _ in summaries:
        table.add_column(justify="right", overflow="fold")
    for label, *cells in zip(_LABELS, *map(_cells, summaries), strict=True):
        table.add_row(label, *cells)
    return table


_LABELS = (
    "run",
    "measure",
    "rho",
    "lam",
    "strength s = lam rho^2",
    "n_samples",
    "epochs",
    "gradient evaluations",
    "skipped steps",
    "restarts",
    "waited for checkpoints",
    "train loss",
    "R_rho",
    "validation accuracy",
    "test accuracy",
    "  at the best validation",
    "time",
    "run id",
)


def _cells(summary: Summary) -> list[str]:
    last = summary.history[-1]
    best = max(summary.history, key=lambda m: (m["accuracy/validation"], -m["loss/validation"]))
    perturbed = summary.n_samples > 0
    return [
        summary.name,
        summary.measure,
        f"{last['rho']:g}" if perturbed else "-",
        f"{last['lam']:g}" if perturbed else "-",
        f"{last['strength']:.3g}" if perturbed else "-",
        str(summary.n_samples),
        str(last["epoch"]),
        f"{last['gradient_evaluations']:,.0f}",
        str(last["skipped_steps"]),
        f"{last['restarts']} ({last['wasted_steps']} steps taken again)" if last["restarts"] else "0",
        f"{last['checkpoint_seconds']:.2f} s",
        f"{last['loss/train']:.4f}",
        f"{last['sharpness']:.3g}" if perturbed else "-",
        f"{last['accuracy/validation']:.2%}",
        f"{last['accuracy/test']:.2%}",
        f"{best['accuracy/test']:.2%} (epoch {best['epoch']})",
        duration(summary.seconds),
        summary.run_id[:8],
    ]
