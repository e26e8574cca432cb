"""`phisam plan` against steps that were taken: seconds on 1 and 2 gloo processes, bytes sent on 2 to 4, memory on 1.

    python benchmarks/check_plan.py

It measures what the plan needs to know of this machine, in turns with the steps that it is to predict: an evaluation at
two batch sizes, gloo's alpha and beta, the memory's bandwidth, a random number; in one process, what phisam and DDP add
on a network of 15 weights. Then it prints prediction beside measurement, as Markdown. A time is a median over rounds,
one thread a process: CPU time of one process, wall time of two, of rank 0 after a barrier. More processes than cores
share them, which the plan knows nothing of: W = 3 and 4 are for bytes alone. Bytes are what the kernel counted on each
process's sockets (TCP_INFO, Linux), memory what torch's profiler saw allocated. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import socket
import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import phisam
from ray_jobs import config, worker
from ray_jobs.models import make_model
from ray_jobs.plan import Model, Option
from ray_jobs.plan_hardware import PROFILES, Hardware, Link
from ray_jobs.plan_workload import SHAPES, configured

BASE = "optimizer.base={name: sgd, lr: 0.01, momentum: 0.9}"
NETWORKS = {
    "mlp": ("mnist5k-frob", [BASE, "model.name=mlp", "training.batch_size=512"]),
    "resnet18": ("cifar10-frob", [BASE, "data.root=.", "training.batch_size=8", "training.channels_last=false"]),
}
CASES = {
    "SGD": ["optimizer.measure=sgd"],
    "trace, n = 1": ["optimizer.measure=trace", "optimizer.n_samples=1"],
    "frobenius, n = 3": ["optimizer.measure=frobenius", "optimizer.n_samples=3"],
    "SAM": ["optimizer.measure=sam"],
    "trace, n = 1, symmetric": [
        "optimizer.measure=trace",
        "optimizer.n_samples=1",
        "optimizer.noise={name: gaussian, symmetric: true}",
    ],
}
WARM_UP = 3
BYTES_STEPS = 3
TINY_SAMPLES, TINY_REPEATS = 4, 20
LARGE = 1 << 23  # numbers of the large message and vector


@dataclass(frozen=True)
class Measured:
    """Of one network on W processes: what the plan is told, and by (case, S) what it has to predict."""

    evaluation: tuple[float, float]
    link: Link
    memory_bandwidth: float
    seconds_per_random: float
    seconds_per_step: float
    seconds_per_point: float
    seconds: dict[tuple[str, int], float]
    sent: dict[tuple[str, int], float]
    memory: dict[tuple[str, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="of which the median counts")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    arguments = parser.parse_args()

    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores; load before the start {load:.1f}; torch {torch.__version__}\n")
    for network in arguments.networks:
        results = {W: processes(W, network, arguments.rounds if W <= 2 else 0) for W in (1, 2, 3, 4)}
        own = {"seconds_per_step": results[1].seconds_per_step, "seconds_per_point": results[1].seconds_per_point}
        results[2] = replace(results[2], **own)
        for W in (1, 2):
            print_times(network, W, results[W])
        print_table("bytes sent", network, {W: results[W].sent for W in (2, 3, 4)}, lambda option: option.sent)
        print_table("peak memory", network, {1: results[1].memory}, lambda option: option.memory)


def run_of(network: str, W: int, case: str) -> config.RunConfig:
    """A case's description."""
    recipe, overrides = NETWORKS[network]
    return config.load(recipe, [*overrides, *CASES[case], f"scaling.num_workers={W}"])


def print_times(network: str, W: int, measured: Measured) -> None:
    """Seconds of a step."""
    at_0, each = measured.evaluation
    link = measured.link
    told = (
        f"evaluation {at_0 * 1e3:.3g} ms + {each * 1e3:.3g} ms an example, memory {measured.memory_bandwidth / 1e9:.3g}"
    )
    told += f" GB/s, {measured.seconds_per_random * 1e9:.3g} ns a random number"
    told += f",\nphisam and DDP {measured.seconds_per_step * 1e3:.2g} ms a step"
    told += f" and {measured.seconds_per_point * 1e3:.2g} ms a point"
    if W > 1:
        told += f", alpha {link.alpha * 1e6:.3g} us (scalars {link.alpha_scalars * 1e6:.3g})"
        told += f", beta {link.bandwidth / 1e9:.3g} GB/s"
    print(f"**{network}, W = {W}, seconds.** Measured first:\n{told}.\n")
    print("| step | S | predicted | measured | error |\n|---|---|---|---|---|")
    for (case, S), seconds in measured.seconds.items():
        predicted = option_of(network, W, case, S, hardware_of(measured), measured.evaluation).seconds.total
        print(f"| {case} | {S} | {predicted * 1e3:.3g} ms | {seconds * 1e3:.3g} ms | {predicted / seconds - 1:+.0%} |")
    print()


def print_table(
    what: str, network: str, by_W: dict[int, dict[tuple[str, int], float]], of: Callable[[Option], float]
) -> None:
    """Megabytes of something, on all W."""
    print(f"**{network}, {what}.**\n")
    print("| step | W | S | predicted | measured | error |\n|---|---|---|---|---|---|")
    for W, measured in by_W.items():
        for (case, S), size in measured.items():
            predicted = of(option_of(network, W, case, S, PROFILES["gloo"]))
            error = f"{predicted / size - 1:+.1%}" if size else "-"
            print(f"| {case} | {W} | {S} | {predicted / 1e6:.4g} MB | {size / 1e6:.4g} MB | {error} |")
    print()


def hardware_of(measured: Measured) -> Hardware:
    """This machine, for the plan."""
    return replace(
        PROFILES["gloo"],
        inside=measured.link,
        memory_bandwidth=measured.memory_bandwidth,
        seconds_per_random=measured.seconds_per_random,
        seconds_per_step=measured.seconds_per_step,
        seconds_per_point=measured.seconds_per_point,
        start=0.0,
    )


def option_of(
    network: str, W: int, case: str, S: int, hardware: Hardware, evaluation: tuple[float, float] | None = None
) -> Option:
    """What the plan says."""
    described = run_of(network, W, case)
    workload, _ = configured(described.model, described.data)
    if evaluation is not None:
        at_0, each = evaluation
        workload = workload.timed(each, at_0)
    return Model(described, workload, hardware).option(S)


def processes(W: int, network: str, rounds: int) -> Measured:
    """Rank 0's measurements, of W processes."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(W, get_context("spawn")) as pool:
        first, *_ = pool.map(partial(on_rank, W=W, network=network, rounds=rounds, folder=folder), range(W))
    return first


def on_rank(rank: int, W: int, network: str, rounds: int, folder: str) -> Measured:
    """Everything, in one process of W."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W)
    layouts = [(case, S) for case in CASES for S in (1, 2, 3, 4) if W % S == 0 and can_share(network, W, S)]
    memory = {layout: peak_memory(network, W, *layout) for layout in layouts} if W == 1 else {}
    steps = {layout: make_step(network, W, *layout) for layout in layouts}
    for step in steps.values():
        for _ in range(WARM_UP):  # DDP arranges its buckets, memory is touched
            step()
    sent = {}
    for layout, step in steps.items():
        dist.barrier()
        before = sent_bytes()
        for _ in range(BYTES_STEPS):
            step()
        sent[layout] = (sent_bytes() - before) / BYTES_STEPS
    batch = run_of(network, W, "SGD").training.batch_size
    few, many = batch // 2, batch  # with two processes, a share and the whole
    calibrations: dict[str, Callable[[], Any]] = {
        **(tiny() if W == 1 else {}),
        "few": partial(make_evaluation(network, W), few),
        "gather": partial(phisam.sample_mesh(0).gather, torch.zeros(1, dtype=torch.float64)),
        "small": partial(dist.all_reduce, torch.zeros(256)),
        "large": partial(dist.all_reduce, torch.zeros(LARGE)),
        "add": partial(torch.add, torch.zeros(LARGE), torch.zeros(LARGE), out=torch.zeros(LARGE)),
        "noise": partial(phisam.gaussian().draw_, torch.zeros(LARGE), Generator(), 0, 0, 1),
        "many": partial(make_evaluation(network, W), many),
    }
    in_turns = dict(each for pair in zip_longest(calibrations.items(), steps.items()) for each in pair if each)
    clock = time.process_time if W == 1 else time.perf_counter
    times: dict[Any, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, timed in in_turns.items():
            dist.barrier()
            started = clock()
            timed()
            times[name].append(clock() - started)
    dist.destroy_process_group()
    if not rounds:
        return Measured((0.0, 0.0), Link(1, 0, 0), 1, 0, 0, 0, {}, sent, memory)
    seconds = {name: median(of_name) for name, of_name in times.items()}
    each = (seconds["many"] - seconds["few"]) / (many - few)
    evaluation, sgd, trace = (
        seconds.get(f"tiny {name}", 0.0) / TINY_REPEATS for name in ("evaluation", "sgd", "trace")
    )
    per_point = (trace - sgd) / TINY_SAMPLES - evaluation
    link = Link(
        2 * (W - 1) / W * 4 * LARGE / max(1e-9, seconds["large"] - seconds["small"]),
        seconds["gather"] / max(1, W - 1),
        seconds["small"] / max(1, 2 * (W - 1)),
    )
    return Measured(
        (max(0.0, seconds["many"] - many * each), each),
        link,
        3 * 4 * LARGE / seconds["add"],
        seconds["noise"] / LARGE,
        sgd - evaluation - per_point,
        per_point,
        {layout: seconds[layout] for layout in steps},
        sent,
        memory,
    )


def tiny() -> dict[str, Callable[[], Any]]:
    """Steps whose network costs next to nothing."""
    network = DistributedDataParallel(nn.Linear(4, 3), gradient_as_bucket_view=True)
    mesh = phisam.sample_mesh(TINY_SAMPLES, 1)
    inputs, targets = torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)

    def loss() -> Tensor:
        return cross_entropy(network(inputs), targets)

    def local_loss() -> Tensor:
        return cross_entropy(network.module(inputs), targets)

    def optimizer(measure: phisam.Measure) -> phisam.PhiSAM:
        base = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
        return phisam.PhiSAM(network, base, measure, n_samples=TINY_SAMPLES, mesh=mesh)

    def repeated(function: Callable[[], Any]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(TINY_REPEATS):
                function()

        return repeat

    return {
        "tiny evaluation": repeated(lambda: torch.autograd.grad(local_loss(), list(network.parameters()))),
        "tiny sgd": repeated(partial(optimizer(phisam.sgd()).step, loss)),
        "tiny trace": repeated(partial(optimizer(phisam.trace()).step, loss)),
    }


def can_share(network: str, W: int, S: int) -> bool:
    """Whether W / S data ranks can share the batch."""
    return run_of(network, W, "SGD").training.batch_size % (W // S) == 0


def data_of(network: str, W: int, data_rank: int, D: int) -> tuple[Tensor, Tensor]:
    """A data rank's share of a made-up batch."""
    described = run_of(network, W, "SGD")
    shape, classes = SHAPES[described.data.name]
    examples, generator = described.training.batch_size, Generator().manual_seed(0)
    images = torch.randn(examples, *shape, generator=generator)
    labels = torch.randint(0, classes, (examples,), generator=generator)
    return images[data_rank::D], labels[data_rank::D]


def make_step(network: str, W: int, case: str, S: int) -> Callable[[], Tensor]:
    """A step as `phisam train` takes it."""
    described = run_of(network, W, case)
    described = described.model_copy(
        update={"optimizer": described.optimizer.model_copy(update={"sample_parallel": S})}
    )
    network_ = make_model(described.model, *SHAPES[described.data.name], seed=0)
    model = DistributedDataParallel(network_, gradient_as_bucket_view=True)
    optimizer = worker.make_optimizer(described, model, steps_per_epoch=1)
    images, labels = data_of(network, W, optimizer.mesh.data_rank, optimizer.mesh.data_size)
    return lambda: optimizer.step(lambda: cross_entropy(model(images), labels))


def make_evaluation(network: str, W: int) -> Callable[[int], None]:
    """A forward and a backward of some examples, without phisam."""
    described = run_of(network, W, "SGD")
    model = make_model(described.model, *SHAPES[described.data.name], seed=0)
    images, labels = data_of(network, W, 0, 1)
    parameters = list(model.parameters())

    def evaluate(examples: int) -> None:
        torch.autograd.grad(cross_entropy(model(images[:examples]), labels[:examples]), parameters)

    return evaluate


def peak_memory(network: str, W: int, case: str, S: int) -> float:
    """Most bytes allocated at one time, from the making of the model to the third step."""
    gc.collect()  # what is freed of an earlier step would count as negative here
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        step = make_step(network, W, case, S)
        for _ in range(3):
            step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return float(peak)


def sent_bytes() -> int:
    """By this process over all its TCP sockets."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 200)[0]  # tcpi_bytes_sent
    return total


if __name__ == "__main__":
    main()
