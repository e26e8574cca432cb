"""Faults: name -> what is done to a subject. Each returns whether there was something to do it to."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_jobs import checkpoint, checkpoints
from ray_jobs.faults.subject import Subject, wait_for

TERM_SECONDS = 90.0


@dataclass(frozen=True)
class Injector:
    """inject(subject, chance): the fault. train, sweep: how often it comes in one, beside the others."""

    inject: Callable[[Subject, random.Random], bool]
    train: int
    sweep: int


def end(name: str, number: signal.Signals) -> Callable[[Subject, random.Random], bool]:
    """A signal to one of Ray's processes that are called so, which ends by it."""

    def inject(subject: Subject, chance: random.Random) -> bool:
        found = subject.processes(name)
        if not found:
            return False
        _ended(chance.choice(found), number)
        return True

    return inject


def end_driver(number: signal.Signals) -> Callable[[Subject, random.Random], bool]:
    """A signal to the driver, then --resume."""

    def inject(subject: Subject, _: random.Random) -> bool:
        subject.process.send_signal(number)
        wait_for(lambda: subject.process.poll() is not None, f"the driver's end by {number.name}", TERM_SECONDS)
        subject.resume()
        return True

    return inject


def damage(how: Callable[[Path, random.Random], None]) -> Callable[[Subject, random.Random], bool]:
    """A worker is killed, and before it starts again its run's newest checkpoint is damaged."""

    def inject(subject: Subject, chance: random.Random) -> bool:
        workers, folders = subject.processes("RayTrainWorker"), subject.run_folders()
        newest = checkpoints.newest(folders[-1]) if folders else None
        if not workers or newest is None:
            return False
        for worker in workers:
            _ended(worker, signal.SIGKILL)
        newest = checkpoints.newest(folders[-1])
        assert newest is not None
        how(newest / checkpoint.STATE, chance)
        return True

    return inject


def truncate(path: Path, chance: random.Random) -> None:
    """To a part of its length."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip(path: Path, chance: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def restart_mlflow(subject: Subject, chance: random.Random) -> bool:
    """SIGKILL of MLflow's server, which is away for up to three seconds and the time that it takes to start."""
    assert subject.server is not None
    subject.server.kill()
    time.sleep(chance.uniform(0, 3))
    subject.server.start()
    return True


def _ended(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    gone = f"the end of process {pid} by {number.name}"
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), gone, TERM_SECONDS)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


INJECTORS: Mapping[str, Injector] = {
    "worker SIGKILL": Injector(end("RayTrainWorker", signal.SIGKILL), train=4, sweep=3),
    "worker SIGTERM": Injector(end("RayTrainWorker", signal.SIGTERM), train=1, sweep=1),
    "controller SIGKILL": Injector(end("TrainController", signal.SIGKILL), train=1, sweep=0),
    "trial's process SIGKILL": Injector(end("ResourceTrainable", signal.SIGKILL), train=0, sweep=1),
    "driver SIGKILL, resumed": Injector(end_driver(signal.SIGKILL), train=1, sweep=1),
    "driver SIGTERM, resumed": Injector(end_driver(signal.SIGTERM), train=1, sweep=1),
    "newest checkpoint truncated": Injector(damage(truncate), train=1, sweep=1),
    "newest checkpoint, a bit flipped": Injector(damage(flip), train=1, sweep=1),
    "MLflow SIGKILL, started again": Injector(restart_mlflow, train=3, sweep=2),
}
