"""What 100 Frobenius probes cost: against a double backward, on two workers, and in memory.

    python benchmarks/sharpness.py

measures sum_i lambda_i^2 = E ‖H z‖^2 of the paper's network (6 hidden ReLU layers of 128) on 1280 examples, in float64:

    phisam      sharpness.frobenius_squared, its construction included
    once        the gradient's graph built once, and a second backward through it for each probe
    again       the gradient's graph built anew for each probe

One thread a process, process CPU time, the variants in turns within every round, medians over rounds. Two workers are
two gloo processes that deal the probes; their time is that of the slower one. Memory is the peak of a fresh process
(VmHWM, Linux) beyond what it held before it measured. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from phisam import sharpness


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """The network, 1280 inputs of 784 numbers, and labels."""
    torch.manual_seed(0)
    widths = [784, *[128] * 6]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    generator = Generator().manual_seed(1)
    inputs = torch.rand(1280, 784, generator=generator)
    return nn.Sequential(*layers, nn.Linear(128, 10)), inputs, torch.randint(0, 10, (1280,), generator=generator)


def by_phisam(probes: int, chunk: int, group: dist.ProcessGroup | None = None) -> float:
    """The library."""
    model, inputs, targets = problem()
    hessian = sharpness.Hessian(model, nn.CrossEntropyLoss(), [(inputs, targets)], chunk=chunk, group=group)
    return sharpness.frobenius_squared(hessian, probes).value


def by_double_backward(probes: int, once: bool) -> float:
    """The plain way, with one graph or with one graph a probe."""
    model, inputs, targets = problem()
    model.double()
    parameters = list(model.parameters())
    generator = Generator().manual_seed(0)
    squares = []
    gradient: tuple[Tensor, ...] = ()
    for _ in range(probes):
        if not gradient or not once:
            loss = nn.functional.cross_entropy(model(inputs.double()), targets)
            gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        z = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        Hz = torch.autograd.grad(gradient, parameters, z, retain_graph=once)
        squares.append(sum(float(part.square().sum()) for part in Hz))
    return sum(squares) / probes


def worker(rank: int, size: int, store: str, probes: int, chunk: int, rounds: int, results: Any) -> None:
    """One of `size` gloo processes; puts its CPU seconds of every round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    by_phisam(2 * size, chunk, dist.group.WORLD)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        seconds.append(cpu_seconds(lambda: by_phisam(probes, chunk, dist.group.WORLD)))
    results.put((rank, seconds))
    dist.destroy_process_group()


def workers(size: int, probes: int, chunk: int, rounds: int) -> list[float]:
    """CPU seconds of the slowest of `size` workers, for each round."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, str(Path(folder) / "store"), probes, chunk, rounds, results)
        processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        by_rank = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
    return [max(seconds) for seconds in zip(*by_rank.values(), strict=True)]


def peak(probes: int, chunk: int, results: Any) -> None:
    """MiB that a measurement adds to a fresh process."""
    torch.set_num_threads(1)
    by_phisam(2, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    by_phisam(probes, chunk)
    results.put(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MiB of this process: now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(probes: int, chunk: int) -> float:
    """`peak` in a process of its own."""
    # glibc raises this threshold by itself, and then keeps freed tensors: their fragments would be measured.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=peak, args=(probes, chunk, results))
    process.start()
    grown: float = results.get()
    process.join()
    return grown


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="Cost of Frobenius probes.")
    parser.add_argument("--probes", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    variants: dict[str, Callable[[], float]] = {
        "phisam": lambda: by_phisam(options.probes, options.chunk),
        "once": lambda: by_double_backward(options.probes, once=True),
        "again": lambda: by_double_backward(options.probes, once=False),
    }
    by_phisam(2, options.chunk)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            seconds[name].append(cpu_seconds(run))
    medians = {name: median(times) for name, times in seconds.items()}
    print(f"{options.probes} probes, chunk {options.chunk}, CPU seconds, medians of {options.rounds} rounds")
    for name, time_taken in medians.items():
        print(f"  {name:8}{time_taken:8.2f}   {time_taken / medians['once']:.2f} of once")
    print(f"  again / phisam {medians['again'] / medians['phisam']:.2f}", flush=True)

    pairs = [(workers(size, options.probes, options.chunk, options.rounds)) for size in (1, 2)]
    one, two = (median(times) for times in pairs)
    print(f"workers: 1 takes {one:.2f} s, 2 take {two:.2f} s, {one / two:.2f} times as fast", flush=True)

    print("peak memory that the measurement adds, MiB")
    for chunk in (5, 25):
        grown = {probes: memory(probes, chunk) for probes in (chunk, 2 * chunk, 4 * chunk)}
        print(f"  chunk {chunk:3}: " + ", ".join(f"{probes} probes {mib:.0f}" for probes, mib in grown.items()))


if __name__ == "__main__":
    main()
