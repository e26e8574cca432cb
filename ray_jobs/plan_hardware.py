"""What `phisam plan` knows of machines: a table of profiles, and alpha-beta costs of the collectives.

    T = alpha * hops + bytes / beta

for a ring (2 (W - 1) hops, each rank sends 2 (W - 1) / W of the bytes) or a tree (2 log2(nodes) hops between them),
whichever is faster. Values are rounded to the slow side of what the sources say, and can be overridden. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ray_jobs.errors import ConfigError

GB = 1e9
US = 1e-6


@dataclass(frozen=True)
class Link:
    """One hop. bandwidth: bytes/s one way, of payload. alpha: seconds of a hop, for scalars and for large messages."""

    bandwidth: float
    alpha_scalars: float
    alpha: float


@dataclass(frozen=True)
class Hardware:
    """A profile. A "GPU" is what one rank runs on.

    inside, between: a GPU's link to the others of its node, and a node's to other nodes, all its adapters together;
        None if there is one node only.
    flops: peak FLOP/s by precision; utilisation: the part that convolutions and matrix products reach.
    memory_bandwidth: bytes/s that kernels reach. memory: bytes.
    seconds_per_operation: the host's, of one eager torch operation; seconds_per_step, seconds_per_point: of what phisam
        does itself, whatever the network is. asynchronous: the host runs ahead of the device.
    seconds_per_random: the device's, of one number of a v. seconds_per_block: the host's, of `phisam.noise.BLOCK`.
    start: of a collective, before its first hop. tree: all-reduces may run over one.
    overlap: the part of a backward behind which an all-reduce can hide.
    """

    name: str
    about: str
    gpus_per_node: int
    inside: Link
    between: Link | None
    flops: dict[str, float]
    utilisation: float
    memory_bandwidth: float
    memory: float
    seconds_per_operation: float
    seconds_per_step: float
    seconds_per_point: float
    asynchronous: bool
    seconds_per_random: float
    seconds_per_block: float
    start: float
    tree: bool
    overlap: float

    def nodes(self, world_size: int) -> int:
        """Nodes that W ranks fill."""
        return -(-world_size // self.gpus_per_node)

    def check(self, world_size: int) -> None:
        """ConfigError where W ranks do not fit."""
        if self.between is None and world_size > self.gpus_per_node:
            raise ConfigError(
                f"--link {self.name} is one machine of {self.gpus_per_node} processes, not {world_size}: use another "
                "--link, or --gpus-per-node"
            )
        if world_size > self.gpus_per_node and world_size % self.gpus_per_node:
            raise ConfigError(
                f"--gpus {world_size} does not fill nodes of {self.gpus_per_node}: use a multiple, or --gpus-per-node"
            )

    def all_reduce(self, size: float, world_size: int) -> float:
        """Seconds; size: bytes of the vector that every rank holds."""
        W, N = world_size, self.nodes(world_size)
        if W == 1 or size == 0:
            return 0.0
        bandwidth = self._slowest(N).bandwidth
        ring = self._hops(2 * (W - 1), 2 * (N - 1), "alpha") + 2 * (W - 1) / W * size / bandwidth
        if not self.tree:
            return self.start + ring
        # A chain in each node, a double binary tree over the nodes; 0.92 is NCCL's own factor on its bandwidth.
        between = 2 * math.ceil(math.log2(N))
        hops = 2 * (min(W, self.gpus_per_node) - 1) + between
        tree = self._hops(hops, between, "alpha") + 2 * size / (0.92 * bandwidth)
        return self.start + min(ring, tree)

    def all_gather(self, size: float, world_size: int) -> float:
        """Seconds; size: bytes that each rank brings, some scalars."""
        W, N = world_size, self.nodes(world_size)
        if W == 1:
            return 0.0
        return self.start + self._hops(W - 1, N - 1, "alpha_scalars") + (W - 1) * size / self._slowest(N).bandwidth

    def _slowest(self, nodes: int) -> Link:
        links = [self.inside] + ([self.between] if nodes > 1 and self.between else [])
        return min(links, key=lambda link: link.bandwidth)

    def _hops(self, all_hops: int, between: int, alpha: str) -> float:
        seconds: float = (all_hops - between) * getattr(self.inside, alpha)
        return seconds + (between * getattr(self.between, alpha) if between else 0.0)


# NVIDIA H100 SXM: dense peaks (the datasheet's tensor-core numbers are with sparsity, twice these), 80 GB, 3.35 TB/s,
# NVLink 450 GB/s one way. float32 is without TF32, as phisam trains. Of NVLink NCCL gets 370 GB/s (NVIDIA in
# github.com/NVIDIA/nccl-tests/issues/212, rings; NVLink SHARP is left out). alpha and start: hwLat and baseLat in
# NCCL's src/graph/tuning.cc (LL for scalars, Simple for large messages), start with the host's call added.
# utilisation: Llama-1B runs on 8 H100 are logged at 190 to 300 TFLOP/s (huggingface.co/nanotron/old_bench), 0.2 to 0.3.
# 70 % of the memory's peak and the costs of an operation, a random number and a block are estimates; those of a step
# and of a point are twice what benchmarks/check_plan.py measures on a CPU.
_H100 = Hardware(
    name="nvlink",
    about="H100 SXM, 8 a node on NVLink; nodes joined by one 400 Gb/s InfiniBand adapter a GPU, as in DGX H100",
    gpus_per_node=8,
    inside=Link(360 * GB, 1.1 * US, 3.4 * US),
    between=Link(320 * GB, 2.7 * US, 14 * US),  # 8 x 50 GB/s, 80 % of it
    flops={"bf16": 989e12, "fp16": 989e12, "float32": 67e12, "float64": 34e12},
    utilisation=0.3,
    memory_bandwidth=0.7 * 3350 * GB,
    memory=72 * GB,  # 80, less what the context, workspaces and fragmentation take
    seconds_per_operation=15 * US,
    seconds_per_step=1200 * US,
    seconds_per_point=500 * US,
    asynchronous=True,
    seconds_per_random=4e-12,
    seconds_per_block=15 * US,
    start=20 * US,
    tree=True,
    overlap=0.9,
)

PROFILES: dict[str, Hardware] = {
    "nvlink": _H100,
    # One adapter a node is the slow but common case; hops go through the kernel's TCP.
    "ethernet": replace(
        _H100,
        name="ethernet",
        about="H100 SXM, 8 a node on NVLink; nodes joined by one 100 Gb/s Ethernet adapter a node, over TCP",
        between=Link(10 * GB, 30 * US, 30 * US),  # 12.5 GB/s, 80 % of it
    ),
    # What benchmarks/check_plan.py measured on two virtual cores of an EPYC with AVX-512, whose float32 peak is about
    # 200 GFLOP/s a core.
    "gloo": Hardware(
        name="gloo",
        about="CPU processes of one core each on one machine, gloo over loopback",
        gpus_per_node=64,
        inside=Link(1 * GB, 200 * US, 100 * US),
        between=None,
        flops={"float32": 200e9, "bf16": 200e9, "fp16": 200e9, "float64": 100e9},
        utilisation=0.5,
        memory_bandwidth=35 * GB,
        memory=4 * GB,
        seconds_per_operation=8 * US,
        seconds_per_step=600 * US,
        seconds_per_point=250 * US,
        asynchronous=False,
        seconds_per_random=1.3e-9,
        seconds_per_block=11 * US,
        start=0.0,
        tree=False,
        overlap=0.0,  # gloo's threads take the cores that compute
    ),
}


def profile(
    link: str,
    tflops: float | None = None,
    utilisation: float | None = None,
    gbps: float | None = None,
    gpus_per_node: int | None = None,
    memory_gb: float | None = None,
) -> Hardware:
    """A profile of the table, with what is known better of the machine at hand.

    Args:
        tflops: peak of the precision that the run computes in.
        gbps: gigabits a second between nodes, of all adapters of a node together (of loopback, for gloo).

    Raises:
        ConfigError: an unknown name, or a utilisation above 1.
    """
    if link not in PROFILES:
        told = "; ".join(f"{name} ({hardware.about})" for name, hardware in PROFILES.items())
        raise ConfigError(f"--link {link!r} is not known. Use one of: {told}")
    hardware = PROFILES[link]
    if utilisation is not None and utilisation > 1:
        raise ConfigError(f"--utilisation {utilisation:g}: it is the part of the peak that is reached, at most 1")
    if tflops is not None:
        hardware = replace(hardware, flops=dict.fromkeys(hardware.flops, tflops * 1e12))
    if utilisation is not None:
        hardware = replace(hardware, utilisation=utilisation)
    if gbps is not None and hardware.between is not None:
        hardware = replace(hardware, between=replace(hardware.between, bandwidth=gbps * GB / 8))
    elif gbps is not None:
        hardware = replace(hardware, inside=replace(hardware.inside, bandwidth=gbps * GB / 8))
    if gpus_per_node is not None:
        hardware = replace(hardware, gpus_per_node=gpus_per_node)
    return hardware if memory_gb is None else replace(hardware, memory=memory_gb * GB)
