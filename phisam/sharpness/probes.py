"""Random vectors, each a function of (seed, probe) alone, and who multiplies H onto which.

Any chunk, any number of ranks, and any sharding therefore give the same numbers up to the order of additions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from phisam.noise import Noise, gaussian
from phisam.sharpness.curvature import Curvature, Progress

# In place of a training step: probes share no draw with a run of the same seed.
_MEASURING = -1


def draw(curvature: Curvature, noise: Noise, seed: int, probes: range) -> Tensor:
    """The probes of these numbers, (d, k), in the curvature's dtype."""
    rows = torch.empty(len(probes), curvature.d, dtype=curvature.dtype, device=curvature.device)
    generator = Generator(curvature.device)
    for row, probe in zip(rows, probes, strict=True):
        noise.draw_(row, generator, seed, _MEASURING, probe)
    return rows.T


def per_probe(
    curvature: Curvature,
    probes: int,
    make: Callable[[range], Tensor],
    reduce: Callable[[Tensor, Tensor], Tensor],
    progress: Progress | None,
) -> Tensor:
    """reduce(V, H V) of every probe, (probes, m) float64, on every rank.

    One chunk of vectors is alive at a time. Unless the data are shared, rank r has the probes r, r + W, ...

    Args:
        make: the vectors (d, k) of a range of probes.
        reduce: (V, H V) -> (k, m): what is kept of each probe.
    """
    peers = curvature.peers
    by_data = curvature.share == "data"
    own = range(probes) if by_data else range(peers.rank, probes, peers.size)
    values: Tensor | None = None
    for part, done in _chunks(own, curvature.chunk):
        V = make(part)
        HV = curvature.shared_matvec(V) if by_data else curvature.matvec(V)
        kept = reduce(V, HV)
        if values is None:
            values = torch.zeros(probes, kept.shape[1], dtype=torch.float64, device=curvature.device)
        values[part.start : part.stop : part.step] = kept.double()
        del V, HV  # before the next ones are made
        if progress is not None:
            progress(probes * done // len(own), probes)
    if values is None:  # more ranks than probes
        values = torch.zeros(
            probes, reduce(*2 * (make(range(0)),)).shape[1], dtype=torch.float64, device=curvature.device
        )
        if progress is not None:
            progress(probes, probes)
    return values if by_data else peers.sum(values)


def probes_within(curvature: Curvature, seconds: float, *, least: int = 2, most: int = 10_000) -> int:
    """How many probes of `trace`, `frobenius_squared` or `measure` take about this many seconds on all ranks together.

    Times one product of `chunk` columns, after one that warms up; both count. Collective, the same answer on all ranks.

    Raises:
        ValueError: seconds is not a positive number, or 2 <= least <= most does not hold.
    """
    if not seconds > 0 or not 2 <= least <= most:
        raise ValueError(f"expected seconds > 0 and 2 <= least <= most, got {seconds!r}, {least!r}, {most!r}")
    begun = time.perf_counter()
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        V = draw(curvature, gaussian(), 0, range(curvature.chunk))
        float(curvature.matvec(V).sum())  # waits for the device
        took = time.perf_counter() - start
    left = max(0.0, seconds - (time.perf_counter() - begun))
    own = curvature.peers.least(left / took * curvature.chunk, curvature.device)
    return max(least, min(most, int(own) * curvature.ranks))


def _chunks(own: range, chunk: int) -> Iterator[tuple[range, int]]:
    for start in range(0, len(own), chunk):
        part = own[start : start + chunk]
        yield part, start + len(part)
