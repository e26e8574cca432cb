"""Rounds of a disturbed run beside one undisturbed, until all faults are spent; the table of what came out."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ray_jobs.errors import RunError
from ray_jobs.faults.injectors import INJECTORS
from ray_jobs.faults.schedule import Fault, drawn
from ray_jobs.faults.subject import OUTPUT, Subject, left, wait_for
from ray_jobs.faults.verdict import Left, Verdict, verdict

RUN_SECONDS = 1800.0
WHOLE = "whole"  # a file beside an undisturbed run that came to its end
CHANCE_SECONDS = 60.0  # for a fault to find something to be done to

Say = Callable[[str], None]


@dataclass
class Outcome:
    """Of a training or a sweep. seconds: until it went on, of each fault that it got over, by kind."""

    kind: str
    injected: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    steps: int = 0
    wasted_steps: int = 0
    resumes: int = 0

    @property
    def recoveries(self) -> int:
        """Faults after which it went on."""
        return sum(map(len, self.seconds.values()))

    @property
    def good(self) -> bool:
        """All faults were got over, and nothing was lost."""
        return self.recoveries == len(self.injected) and all(each.good for each in self.verdicts)


def summed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One of each kind, of several calls."""
    sums: dict[str, Outcome] = {}
    for each in outcomes:
        total = sums.setdefault(each.kind, Outcome(each.kind))
        total.injected += each.injected
        total.verdicts += each.verdicts
        for fault, seconds in each.seconds.items():
            total.seconds[fault] = [*total.seconds.get(fault, []), *seconds]
        total.steps += each.steps
        total.wasted_steps += each.wasted_steps
        total.resumes += each.resumes
    return list(sums.values())


def read_outcomes(path: Path) -> list[Outcome]:
    """Of earlier calls, from the file that `add_outcomes` writes; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [Outcome(**{**record, "verdicts": [_verdict(each) for each in record["verdicts"]]}) for record in records]


def add_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A line each."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(asdict(outcome))}\n" for outcome in outcomes)


def _verdict(told: dict[str, Any]) -> Verdict:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    return Verdict(**values)


def campaign(kind: str, count: int, seed: int, folder: Path, epochs: int, say: Say) -> Outcome:
    """So many faults over trainings, or over sweeps.

    Raises:
        RunError: the undisturbed run failed, or a disturbed one did not go on.
    """
    weights = {name: getattr(injector, kind) for name, injector in INJECTORS.items()}
    faults = list(drawn({name: weight for name, weight in weights.items() if weight}, count, seed))
    outcome = Outcome(kind)
    if not faults:
        return outcome
    undisturbed = _undisturbed(kind, folder, epochs, say)
    for number in itertools.count(1):
        if not faults:
            break
        place = folder / f"{kind}-{number}"
        if place.exists():  # of an earlier call
            continue
        subject = Subject(kind, place, epochs, with_server=True)
        try:
            _disturbed(subject, faults, outcome, say)
            _to_the_end(subject)
            outcome.verdicts.append(verdict(undisturbed, left(subject.runs)))
            say(f"{kind}: round {number}: {outcome.verdicts[-1]}")
        finally:
            outcome.steps += subject.steps() - subject.wasted_steps()
            outcome.wasted_steps += subject.wasted_steps()
            outcome.resumes += subject.resumes
            subject.close()
    return outcome


def _undisturbed(kind: str, folder: Path, epochs: int, say: Say) -> Mapping[str, Left]:
    """What an undisturbed one leaves; one that an earlier call left in the folder serves too."""
    place = folder / f"{kind}-undisturbed-{epochs}"
    if not (place / WHOLE).exists():
        shutil.rmtree(place, ignore_errors=True)
        say(f"{kind}: undisturbed")
        reference = Subject(kind, place, epochs, with_server=False)
        try:
            wait_for(lambda: reference.process.poll() is not None, "the undisturbed run", RUN_SECONDS)
        finally:
            reference.close()
        if reference.process.returncode:
            raise RunError(f"chaos: the undisturbed run failed: see {place / OUTPUT}")
        (place / WHOLE).touch()
    return left(place / "runs")


def _disturbed(subject: Subject, faults: list[Fault], outcome: Outcome, say: Say) -> None:
    """Faults one after the other, while the run is under way."""
    mark = 0
    while faults:
        fault = faults[0]
        wait_for(partial(_past, subject, mark + fault.after_steps), f"step {mark + fault.after_steps}")
        if subject.over or not _injected(subject, fault):
            return
        faults.pop(0)
        outcome.injected.append(fault.kind)
        before, started = subject.steps(), time.monotonic()
        wait_for(partial(_past, subject, before + 2), f"life after {fault.kind}")
        outcome.seconds.setdefault(fault.kind, []).append(time.monotonic() - started)
        say(f"{subject.kind}: {len(outcome.injected)}: {fault.kind}: went on after {time.monotonic() - started:.1f} s")
        mark = subject.steps()


def _injected(subject: Subject, fault: Fault) -> bool:
    """Tries until the fault finds something; whether it did before the run was over."""
    chance = random.Random(fault.draw)
    done = False

    def tried() -> bool:
        nonlocal done
        _see_on(subject)
        done = done or (not subject.over and INJECTORS[fault.kind].inject(subject, chance))
        return done or subject.over

    wait_for(tried, f"something to do to it: {fault.kind}", CHANCE_SECONDS)
    return done


def _past(subject: Subject, steps: int) -> bool:
    _see_on(subject)
    return subject.over or subject.steps() >= steps


def _see_on(subject: Subject) -> None:
    """A driver that has given up, after more failures than it starts workers again for, is resumed."""
    if subject.process.poll() is not None and not subject.over:
        subject.resume()


def _to_the_end(subject: Subject) -> None:
    def ended() -> bool:
        _see_on(subject)
        return subject.over

    wait_for(ended, "the end of the run", RUN_SECONDS)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    lines = [
        "| fault | " + " | ".join(f"{each.kind}: injected, got over" for each in outcomes) + " | seconds, median |"
    ]
    lines.append("|---|" + "---|" * (len(outcomes) + 1))
    for kind in INJECTORS:
        counts = [f"{each.injected.count(kind)}, {len(each.seconds.get(kind, ()))}" for each in outcomes]
        seconds = [value for each in outcomes for value in each.seconds.get(kind, ())]
        if any(each.injected.count(kind) for each in outcomes):
            lines.append(f"| {kind} | {' | '.join(counts)} | {median(seconds) if seconds else 0:.1f} |")
    lines += ["", "| | " + " | ".join(each.kind for each in outcomes) + " |", "|---|" + "---|" * len(outcomes)]
    rows: dict[str, Callable[[Outcome], object]] = {
        "faults injected": lambda each: len(each.injected),
        "recoveries": lambda each: each.recoveries,
        "runs to the end": lambda each: len(each.verdicts),
        "times that the driver was resumed": lambda each: each.resumes,
        "steps": lambda each: each.steps,
        "steps wasted": lambda each: each.wasted_steps,
        "metrics lost": lambda each: sum(verdict.lost for verdict in each.verdicts),
        "metrics twice": lambda each: sum(verdict.twice for verdict in each.verdicts),
        "metrics with another value": lambda each: sum(verdict.different for verdict in each.verdicts),
        "statuses true": lambda each: _yes(not any(verdict.unfinished for verdict in each.verdicts)),
        "weights equal": lambda each: _yes(not any(verdict.unequal for verdict in each.verdicts)),
    }
    lines += [f"| {name} | " + " | ".join(str(value(each)) for each in outcomes) + " |" for name, value in rows.items()]
    return "\n".join(lines)


def _yes(true: bool) -> str:
    return "yes" if true else "NO"
