"""A sweep that nobody trained, as records: curves with the shape of real ones, costs that follow from n."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ray_jobs import config
from ray_jobs.results import Curve, RunRecord
from ray_jobs.tracking import parameters

LIFT = {"sgd": 0.0, "sam": 0.012, "trace": 0.015, "frobenius": 0.008, "determinant": -0.01}
STEPS = 28


def run(
    measure: str = "frobenius",
    rho: float = 0.03,
    lam: float = 1e-3,
    n: int = 2,
    seed: int = 0,
    epochs: int = 20,
    *,
    index: int | None = None,
    stopped: int | None = None,
    failed: str | None = None,
    data: str = "mnist5k",
    lift: float | None = None,
) -> RunRecord:
    """One run; `stopped` cuts it at an epoch, and it trained one more."""
    n = 0 if measure == "sgd" else 1 if measure == "sam" else n
    noise = random.Random(f"{measure} {rho} {lam} {n} {seed} {data}")
    strength = lam * rho**2 if n else 0.0
    gain = LIFT[measure] if lift is None else lift
    if n:
        gain -= 0.004 * math.log10(max(strength, 1e-12) / 1e-5) ** 2 - 0.002 * n
    common = random.Random(f"seed {seed} {data}").gauss(0, 0.006)  # what a seed does to every method
    top = 0.925 + gain + common + noise.gauss(0, 0.003)
    last = stopped if stopped is not None else epochs // 3 if failed else epochs
    steps = range(1, last + 1)
    validation = [top - 0.5 * math.exp(-e / 3) + noise.gauss(0, 0.002) for e in steps]
    train = [2.0 * math.exp(-e / 4) + 0.01 * (1 + 2 * n * strength**0.1) for e in steps]
    seconds = 0.9 + 0.4 * n + noise.random() * 0.1
    curves = {
        "accuracy/validation": validation,
        "accuracy/test": [value - 0.004 + noise.gauss(0, 0.002) for value in validation],
        "loss/train": train,
        "loss/validation": [0.3 - gain + 0.5 * math.exp(-e / 3) for e in steps],
        "loss/test": [0.32 - gain + 0.5 * math.exp(-e / 3) for e in steps],
        "sharpness": [100 * value * noise.uniform(0.5, 1.5) if n else 0.0 for value in train],
        "gradient_evaluations": [float(e * STEPS * (n + 1)) for e in steps],
        "seconds": [e * seconds for e in steps],
    }
    spent = {axis: curves[axis][-1] for axis in ("gradient_evaluations", "seconds")}
    tags = {"device": "cpu", "version.torch": "2.14.1", "version.phisam": "0.1", "git.commit": "c" * 40}
    tags["data.fingerprint"] = "f" * 64
    if index is not None:
        tags |= {"phisam.kind": "trial", "phisam.trial": str(index), "mlflow.parentRunId": "p" * 32}
    if stopped is not None:
        tags |= {"phisam.stopped": f"asha: rung {stopped}", "phisam.stopped_epoch": str(stopped)}
        spent = {axis: value * (stopped + 1) / stopped for axis, value in spent.items()}
    if failed is not None:
        tags["phisam.failure"] = failed
    params = _params() | {"measure": measure, "rho": str(rho), "lam": str(lam if n else 0.0), "n_samples": str(n)}
    params |= {"strength": str(strength), "training.seed": str(seed), "data.name": data, "training.epochs": str(epochs)}
    return RunRecord(
        run_id=f"{abs(hash((measure, rho, lam, n, seed, index, data))):032x}"[-32:],
        name=f"{data}-{measure}",
        status="KILLED" if stopped is not None else "FAILED" if failed is not None else "FINISHED",
        parent_id=None if index is None else "p" * 32,
        params=params,
        tags=tags,
        curves={name: Curve(tuple(steps), tuple(values)) for name, values in curves.items()},
        spent=spent,
        started_ms=1_700_000_000_000 + (index or 0),
    )


_PARAMS: dict[str, str] = {}


def _params() -> dict[str, str]:
    if not _PARAMS:
        _PARAMS.update({key: str(value) for key, value in parameters(config.load("mnist5k-frob")).items()})
    return dict(_PARAMS)


def parent(name: str = "mnist5k-search") -> RunRecord:
    """The sweep itself."""
    tags = {"phisam.kind": "sweep", "phisam.folder": "runs/sweep"}
    return RunRecord("p" * 32, name, "FINISHED", None, {}, tags, {}, {}, 1_700_000_000_000)


def grid(seeds: Sequence[int] = range(5), data: str = "mnist5k", **more: object) -> list[RunRecord]:
    """Five methods, each seed."""
    names = ["sgd", "sam", "trace", "frobenius", "determinant"]
    return [
        run(name, seed=seed, data=data, index=i * len(seeds) + j)
        for i, name in enumerate(names)
        for j, seed in enumerate(seeds)
    ]


def search(trials: int = 500) -> list[RunRecord]:
    """A search over measure, rho, lam and n that cut half of its trials; some failed."""
    draw = random.Random(7)
    rhos, lams = [0.01, 0.02, 0.05, 0.1, 0.2], [1e-4, 1e-3, 1e-2, 1e-1]
    cells = [(m, rho, lam, n) for m in ("frobenius", "trace") for n in (2, 4, 8) for rho in rhos for lam in lams]
    records: list[RunRecord] = []
    while len(records) < trials:
        i = len(records)
        seed = i // len(cells)
        measure, rho, lam, n = cells[i % len(cells)]
        if i % 10 == 9:
            measure, rho, lam, n = ("sgd", "sam")[i % 20 == 9], 0.05, 1.0, 1
            seed = i // 20
        fate = draw.random()
        stopped = draw.choice([3, 9]) if fate < 0.45 else None
        failed = "worker 1: CUDA out of memory" if fate > 0.98 else None
        records.append(run(measure, rho, lam, n, seed, index=i, stopped=stopped, failed=failed))
    return records
