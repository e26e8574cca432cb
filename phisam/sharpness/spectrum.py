"""The whole spectrum of H by stochastic Lanczos quadrature: its density, and sums of a function over the eigenvalues.

For v uniform on the unit sphere E v^T f(H) v = tr f(H) / d, and Lanczos' nodes theta_j and weights w_j from v give
v^T f(H) v = sum_j w_j f(theta_j) (`lanczos.py`). So the measure sum_j w_j delta(theta_j), averaged over some v, is the
density of eigenvalues. (Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019, with the reorthogonalisation.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phisam.noise import gaussian
from phisam.sharpness.curvature import Curvature, Progress
from phisam.sharpness.estimate import Estimate
from phisam.sharpness.lanczos import Change, Runs
from phisam.sharpness.probes import draw

_FIRST_STEPS = 16
_BASIS_BYTES = 1 << 30  # what the Lanczos vectors of the runs that go side by side may hold


@dataclass(frozen=True)
class Density:
    """Raw quadrature of every probe, float64, on the CPU.

    nodes, weights (probes, m): a row's weights sum to 1; a run that was stable after fewer than m steps is filled up
    with its last node at weight 0. steps (probes,). changes (probes,): how much the last doubling of the steps moved
    the probe's answer, in the units of the tolerance; stable: all are within it.
    """

    nodes: Tensor
    weights: Tensor
    steps: Tensor
    changes: Tensor
    d: int
    seed: int
    stable: bool

    def curve(self, points: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The density at points (p,), each node spread to a Gaussian of this width, and its standard error.

        It integrates to 1: times d it counts eigenvalues.
        """
        x = points.double().cpu()
        bumps = torch.exp(-(((x[:, None, None] - self.nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
        curves = (bumps * self.weights).sum(2)
        return curves.mean(1), curves.std(1) / len(self.nodes) ** 0.5

    def trace_of(self, f: Callable[[Tensor], Tensor], name: str) -> Estimate:
        """tr f(H) = sum_i f(lambda_i), f elementwise. The standard error is that over the probes."""
        sums = self.d * (f(self.nodes) * self.weights).sum(1)
        return Estimate(name, float(sums.mean()), float(sums.std() / len(sums) ** 0.5), len(sums))


def spectral_density(
    curvature: Curvature,
    probes: int = 10,
    seed: int = 0,
    *,
    steps: int | None = None,
    max_steps: int = 512,
    tolerance: float = 0.01,
    progress: Progress | None = None,
) -> Density:
    """The density of H's eigenvalues. Ranks share the batches unless share = "probes".

    Args:
        steps: of Lanczos; None: doubled, for each probe on its own, until the doubling moved its measure by no more
            than `tolerance` times its mean |node| (Wasserstein-1 distance), or max_steps.

    Raises:
        ValueError: probes < 2, or fewer than one step.
        Unmeasurable: an operation of the model has no second derivative.
    """
    return _quadrature(curvature, probes, seed, steps, max_steps, tolerance, _wasserstein, progress)


def log_determinant(
    curvature: Curvature,
    delta: Sequence[float] = (1e-6, 1e-4, 1e-2, 1.0),
    probes: int = 10,
    seed: int = 0,
    *,
    steps: int | None = None,
    max_steps: int = 512,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> tuple[Estimate, ...]:
    """sum_i log(1 + |lambda_i| / delta), one estimate for each delta of the ladder.

    log det H itself is undefined in training: a Hessian has negative eigenvalues, and many near 0. A delta says which
    eigenvalues count as 0; a hard cut instead would be wrong by hundreds of per cent without a sign of it.
    The standard error has two parts, added as squares: the spread over the probes, and what the last doubling of the
    Lanczos steps still changed. Steps as in `spectral_density`, the change relative to the sum, at every delta.

    Raises:
        ValueError: a delta is not positive, probes < 2, or fewer than one step.
        Unmeasurable: an operation of the model has no second derivative.
    """
    if not delta or not all(math.isfinite(one) and one > 0 for one in delta):
        raise ValueError(f"every delta must be a positive number, got {list(delta)!r}")
    functions = [_log_one_plus(one) for one in delta]

    def sums(quadrature: tuple[Tensor, Tensor]) -> Tensor:
        nodes, weights = quadrature
        return torch.stack([(f(nodes) * weights).sum() for f in functions])

    def change(half: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> float:
        return float(((sums(whole) - sums(half)).abs() / sums(whole).clamp_min(1e-300)).max())

    density = _quadrature(curvature, probes, seed, steps, max_steps, tolerance, change, progress)
    moved = float(density.changes.mean())
    estimates = []
    for one, f in zip(delta, functions, strict=True):
        raw = density.trace_of(f, f"log_determinant_{one:g}")
        error = math.hypot(raw.standard_error, moved * raw.value)
        estimates.append(Estimate(raw.name, raw.value, error, raw.probes))
    return tuple(estimates)


def _log_one_plus(delta: float) -> Callable[[Tensor], Tensor]:
    return lambda nodes: torch.log1p(nodes.abs() / delta)


def _quadrature(
    curvature: Curvature,
    probes: int,
    seed: int,
    steps: int | None,
    max_steps: int,
    tolerance: float,
    change: Change,
    progress: Progress | None,
) -> Density:
    if probes < 2:
        raise ValueError(f"probes = {probes}, but a standard error needs probes >= 2")
    last = min(curvature.d, max_steps if steps is None else steps)
    if last < 1:
        raise ValueError(f"Lanczos needs at least one step, got steps = {steps}, max_steps = {max_steps}")
    peers = curvature.peers
    by_probe = curvature.share == "probes"
    product = curvature.matvec if by_probe else curvature.shared_matvec

    def agree(flag: bool) -> bool:
        return flag if by_probe else peers.all(flag, curvature.device)

    own = range(peers.rank, probes, peers.size) if by_probe else range(probes)
    together = max(1, min(curvature.chunk, _BASIS_BYTES // (8 * curvature.d * last)))
    # Per probe: nodes, weights, number of steps, change.
    table = torch.zeros(probes, 2 * last + 2, dtype=torch.float64, device=curvature.device)
    for start in range(0, len(own), together):
        part = own[start : start + together]
        runs = Runs(product, draw(curvature, gaussian(), seed, part).T, agree)
        stable = _StableAt(runs, change, tolerance, fixed=steps is not None)
        to = last if steps is not None else min(_FIRST_STEPS, last)
        while True:
            for step in runs.extend(to):
                if progress is not None:
                    progress(probes * (start * last + step * len(part)) // (len(own) * last), probes)
            if agree(stable.look(to) or to == last):
                break
            to = min(2 * to, last)
        for probe, row in zip(part, stable.rows(last), strict=True):
            table[probe] = row
    if by_probe:
        peers.sum(table)
    if progress is not None:
        progress(probes, probes)
    table = table.cpu()
    nodes, weights, count, changes = table[:, :last], table[:, last:-2], table[:, -2].long(), table[:, -1]
    m = int(count.max())
    return Density(
        nodes[:, :m],
        weights[:, :m],
        count,
        changes,
        curvature.d,
        seed,
        bool((changes <= tolerance).all()),
    )


class _StableAt:
    """When each of the runs that go side by side was stable: as if it had gone alone."""

    def __init__(self, runs: Runs, change: Change, tolerance: float, fixed: bool) -> None:
        self._runs = runs
        self._change = change
        self._tolerance = tolerance
        self._fixed = fixed
        self._found: dict[int, tuple[int, float]] = {}  # run -> (steps, change)
        self._latest: dict[int, tuple[int, float]] = {}

    def look(self, steps: int) -> bool:
        """Compares m = steps with m / 2 in every run that is not stable yet; whether all are now."""
        for run, ended in enumerate(self._runs.ended):
            if run in self._found:
                continue
            if ended is not None and ended <= steps:
                self._found[run] = ended, 0.0  # the Krylov space is complete: the quadrature is exact
                continue
            half = self._runs.quadrature(run, max(1, steps // 2))
            moved = self._change(half, self._runs.quadrature(run, steps))
            self._latest[run] = steps, moved
            if moved <= self._tolerance and not self._fixed:
                self._found[run] = steps, moved
        return len(self._found) == len(self._runs.ended)

    def rows(self, width: int) -> list[Tensor]:
        """nodes (width,), weights (width,), steps, change of every run."""
        rows = []
        for run in range(len(self._runs.ended)):
            steps, moved = self._found.get(run) or self._latest[run]
            nodes, weights = self._runs.quadrature(run, steps)
            padding = width - len(nodes)
            nodes = torch.cat([nodes, nodes[-1:].expand(padding)])
            ends = nodes.new_tensor([steps, moved])
            rows.append(torch.cat([nodes, weights, weights.new_zeros(padding), ends]))
        return rows


def _wasserstein(half: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> float:
    """W1 distance of two discrete measures on the line, relative to the mean |node| of the second."""
    nodes = torch.cat([half[0], whole[0]])
    weights = torch.cat([half[1], -whole[1]])
    order = torch.argsort(nodes)
    gaps = nodes[order].diff()
    distance = (weights[order].cumsum(0)[:-1].abs() * gaps).sum()
    return float(distance / (whole[0].abs() * whole[1]).sum().clamp_min(1e-300))
