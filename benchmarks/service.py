"""What the service adds around the step: dealing out examples, telling MLflow of an epoch, starting a run.

    python benchmarks/service.py                 all three, about nine minutes
    python benchmarks/service.py --only start

Prints Markdown: medians, with quartiles in brackets. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from ray_jobs.bench import first_step
from ray_jobs.bench.timing import Spread, ratios
from ray_jobs.bench.workloads import Workload, loss_of
from ray_jobs.commands.arguments import set_environment
from ray_jobs.data import Batches, Dataset, Split

Timing = Callable[[], float]
BATCH, EXAMPLES = 128, 10_000
EPOCHS = 20  # of the run that MLflow is told of, one a second
VALUES = ["loss/train", *(f"metric/{i}" for i in range(13))]  # as many as a worker reports


class PerImage(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images one by one, from an array through PIL, as torchvision's CIFAR10 does it."""

    def __init__(self, split: Split) -> None:
        self._images, self._labels = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        crop, to_tensor = transforms.RandomCrop(32, padding=4), transforms.ToTensor()
        flip, normalize = transforms.RandomHorizontalFlip(), transforms.Normalize([0.5] * 3, [0.25] * 3)
        self._transform = transforms.Compose([crop, flip, to_tensor, normalize])

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def data(rounds: int = 7) -> None:
    """Examples a second of one epoch, and a batch beside an SGD step on it; CPU time of one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (EXAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(10, (EXAMPLES,), generator=generator))
    dataset = Dataset("random", split, split, split, 10, torch.full((3,), 127.5), torch.full((3,), 63.75), "")
    batches = Batches(split, BATCH, 0, dataset.normalizer(), "crop_flip")
    loader = DataLoader(PerImage(split), BATCH, shuffle=True, drop_last=True)
    ours = partial(cpu_seconds, lambda: [len(labels) for _, labels in batches.epoch(0)])
    theirs = partial(cpu_seconds, lambda: [len(labels) for _, labels in loader])
    (before, turns, after), dealt = beside(ours, theirs, rounds), batches.steps_per_epoch * BATCH
    print(f"**Data path**, {EXAMPLES:,} images of 3x32x32, crop and flip, batch {BATCH}, {rounds} rounds\n")
    print("| what | examples a second | times as fast |\n|:--|--:|--:|")
    print(f"| `Batches.epoch` | {dealt / median(before):,.0f} | {shown(ratios(before, turns, after), '.1f')} |")
    print(f"| torchvision, an image at a time | {dealt / median(turns):,.0f} | 1 |\n")

    print(f"| SGD step, batch {BATCH} | step, ms | batch, ms | batch / step |\n|:--|--:|--:|--:|")
    for name, n_rounds in (("mlp", 20), ("resnet18", 3)):
        before, turns, after = beside(sgd_step(name), ours, n_rounds)
        step, batch = 1000 * median(before), 1000 * median(turns) / batches.steps_per_epoch
        share = [ratio / batches.steps_per_epoch for ratio in ratios(before, turns, after)]
        print(f"| {name} | {step:.2f} | {batch:.2f} | {shown(share, '.2g')} |")


def beside(reference: Timing, measured: Timing, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """By turns: seconds of the reference just before each turn, of the turns, and of the reference just after."""
    reference(), measured()
    references, turns = [reference()], []
    for _ in range(rounds):
        turns.append(measured())
        references.append(reference())
    return references[:-1], turns, references[1:]


def sgd_step(name: str) -> Timing:
    """A function that takes SGD steps and gives the seconds of one."""
    work, cpu = Workload(name, (3, 32, 32), BATCH), torch.device("cpu")
    (images, labels), model = work.examples(cpu), work.make_model(cpu)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), 50 if name == "mlp" else 1

    def take() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(model, images, labels))
            optimizer.step()

    return lambda: cpu_seconds(take) / steps


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def mlflow_logging() -> None:
    """What a report costs a worker and Ray Train's controller, and the driver's writer; they and the store are real."""
    set_environment(None, False)  # Ray and MLflow read it when they are imported
    import ray
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer

    from ray_jobs import callback, cluster, config
    from ray_jobs.loopback import LoopbackTorchConfig
    from ray_jobs.progress import Board
    from ray_jobs.tracking import Tracker
    from ray_jobs.tracking.writer import Writer

    class Timed(callback.EpochCallback):
        """Keeps the seconds of each call in the file `calls`."""

        def after_report(self, *args: Any, **report: Any) -> None:
            started = time.perf_counter()
            super().after_report(*args, **report)
            with calls.open("a") as file:
                file.write(f"{time.perf_counter() - started}\n")

    def loop(path: Path) -> None:
        for epoch in range(1, EPOCHS + 1):
            time.sleep(1)
            metrics = {"epoch": epoch, **dict.fromkeys(VALUES, epoch / 7), "timestamp_ms": int(time.time() * 1000)}
            started = time.perf_counter()
            ray.train.report(metrics)
            with path.open("a") as file:
                file.write(f"{time.perf_counter() - started}\n")

    def seconds_of_reports(name: str, callbacks: list[Any]) -> list[float]:
        path, run = Path(home, name), RunConfig(storage_path=home, callbacks=callbacks)
        TorchTrainer(lambda: loop(path), torch_config=LoopbackTorchConfig(), run_config=run).fit()
        return [float(line) for line in path.read_text().split()]

    def write(cpu: list[float]) -> None:
        """As the driver of a run; CPU seconds of the writer's thread after each epoch, and at the end."""
        writer, seen, idle = Writer(uri, Path(home), print), 0, threading.Event()
        clock = time.pthread_getcpuclockid(writer._thread.ident or 0)
        while seen < EPOCHS:
            idle.wait(0.25)  # the driver's interval
            events = ray.get(board.read.remote(seen))[1]
            if events:
                cpu.append(time.clock_gettime(clock))
            seen += len(events)
            for event in events:
                writer.epoch(tracker.run_id, event)
        idle.wait(2)
        cpu.append(time.clock_gettime(clock))

    with tempfile.TemporaryDirectory() as home, cluster.connected(None, 2, False):
        calls, uri = Path(home, "calls"), f"sqlite:///{home}/mlflow.db"
        tracker = Tracker.start(uri, Path(home), config.load("digits-frob"), {})
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        cpu: list[float] = []
        reader = threading.Thread(target=write, args=(cpu,))
        reader.start()
        told = seconds_of_reports("told", [Timed(board)])
        reader.join()
        untold = seconds_of_reports("untold", [])
        in_calls = [float(line) for line in calls.read_text().split()]
        assert tracker.logged_epochs() == set(range(1, EPOCHS + 1))
    each = [later - sooner for sooner, later in pairwise(cpu)]
    print(f"**MLflow logging**, {EPOCHS} epochs, one a second, of {len(VALUES)} metrics; one worker, SQLite\n")
    print("| what | ms an epoch | per cent of a second |\n|:--|--:|--:|")
    rows = {"worker's `report`, no `EpochCallback`": untold, "worker's `report`, with it": told}
    rows |= {"controller's `after_report`": in_calls, "CPU of the driver's thread": each}
    for name, seconds in rows.items():
        print(f"| {name} | {shown([1000 * s for s in seconds], '.3g')} | {100 * median(seconds):.3g} |")


def start(repeats: int = 3) -> None:
    """Seconds from the command to the first epoch's line, beside bare Ray Train, by turns after one round untimed."""
    first_step.measure()
    measured = [first_step.measure() for _ in range(repeats)]
    print(f"**Command to first epoch**, {repeats} repeats by turns after one that is not counted\n")
    print("| what | seconds |\n|:--|--:|")
    train, bare = measured[0]  # their names
    rows = {name: [seconds[name] for seconds in measured] for name in (train, bare)}
    rows["beyond Ray's own start"] = [seconds[train] - seconds[bare] for seconds in measured]
    for name, seconds in rows.items():
        print(f"| {name} | {shown(seconds, '.2f')} |")


def shown(values: Sequence[float], form: str) -> str:
    spread = Spread.of(values)
    return f"{spread.median:{form}} ({spread.low:{form}} to {spread.high:{form}})"


PARTS = {"data": data, "logging": mlflow_logging, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    for name in parser.parse_args().only or PARTS:
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"\n_{name}: load average {load}, {os.cpu_count()} CPUs, torch {torch.__version__}_\n", flush=True)
        PARTS[name]()


if __name__ == "__main__":
    main()
