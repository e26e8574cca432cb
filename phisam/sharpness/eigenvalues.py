"""The extreme eigenvalues of H and their eigenvectors, by Lanczos with thick restarts (Wu, Simon 2000).

The basis Q holds at most 2 k + 20 vectors. When it is full, H is known on it as T = Q^T H Q; the Ritz vectors Q s of
the wanted end of T's spectrum, and the next Lanczos vector, are all that the next round starts from. Every new vector
is orthogonalised against the whole basis, twice, so no eigenvalue comes back as a ghost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from phisam.noise import gaussian
from phisam.sharpness.curvature import Curvature, Progress
from phisam.sharpness.estimate import Estimate
from phisam.sharpness.probes import draw

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True)
class Eigenvalues:
    """values (k,), in the order that was asked for; vectors (d, k), unit and orthogonal, float64.

    residuals (k,): ‖H u - lambda u‖, computed from the vectors that are returned. Some eigenvalue of H lies within it
    of lambda, whatever rounding did: it is a bound, not a statistical error.
    products: vectors that H was multiplied onto. converged: every residual met the tolerance.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor
    products: int
    converged: bool

    def estimates(self) -> tuple[Estimate, ...]:
        """As numbers to log: `top_eigenvalue`, `top_eigenvalue_2`, ..., with the residual as the standard error."""
        names = ["top_eigenvalue", *(f"top_eigenvalue_{i}" for i in range(2, len(self.values) + 1))]
        return tuple(
            Estimate(name, value, residual, self.products)
            for name, value, residual in zip(names, self.values.tolist(), self.residuals.tolist(), strict=True)
        )


def top_eigenvalues(
    curvature: Curvature,
    k: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = 1e-6,
    max_products: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenvalues:
    """The k largest, smallest, or largest by magnitude, eigenvalues of H.

    Memory: 2 k + 21 vectors of d float64 numbers. Ranks share the batches unless share = "probes".

    Args:
        tolerance: residuals asked for, relative to the largest |eigenvalue| seen; in float32 1e-3 is what there is.
        max_products: where to give up; what was reached is returned, with its residuals.

    Raises:
        ValueError: k is not in 1..d, or `which` is unknown.
        Unmeasurable: an operation of the model has no second derivative.
    """
    if not 1 <= k <= curvature.d:
        raise ValueError(f"k = {k} eigenvalues were asked for, but the matrix has {curvature.d}")
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(f'which must be "largest", "smallest" or "magnitude", got {which!r}')
    start = draw(curvature, gaussian(), seed, range(1))[:, 0].double()
    basis = _Basis(curvature, start, min(curvature.d, 2 * k + 20), seed)
    while True:
        while basis.filled < basis.size and basis.products < max_products:
            basis.grow()
            if progress is not None:
                progress(basis.products, max_products + k)
        theta, S = torch.linalg.eigh(basis.T[: basis.filled, : basis.filled])
        wanted = _order(theta, which)
        bounds = basis.beta * S[-1, wanted[:k]].abs()
        done = bool((bounds <= tolerance / 2 * theta.abs().max()).all()) or basis.products >= max_products
        if curvature.peers.all(done, curvature.device):
            break
        keep = wanted[: min(k + 8, basis.filled - 1)]
        basis.restart(theta[keep], S[:, keep])
    vectors = basis.Q[:, : basis.filled] @ S[:, wanted[:k]]
    values = theta[wanted[:k]]
    residuals = torch.linalg.vector_norm(basis.product(vectors) - vectors * values, dim=0)
    if progress is not None:
        progress(max_products + k, max_products + k)
    converged = len(values) == k and bool((residuals <= tolerance * theta.abs().max()).all())
    return Eigenvalues(values, residuals, vectors, basis.products, converged)


class _Basis:
    """Orthonormal Q (d, size + 1), its first `filled` columns multiplied by H, and T = Q^T H Q of those."""

    def __init__(self, curvature: Curvature, start: Tensor, size: int, seed: int) -> None:
        self._curvature = curvature
        self._seed = seed
        self._redrawn = 0
        self.size = size
        self.filled = 0
        self.products = 0
        self.Q = start.new_zeros(curvature.d, size + 1)
        self.Q[:, 0] = start / torch.linalg.vector_norm(start)
        self.T = start.new_zeros(size, size)
        self.beta = 0.0  # how far H leads out of the basis
        self._scale = 0.0

    def product(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        own = self._curvature.share == "probes"
        return self._curvature.matvec(V) if own else self._curvature.shared_matvec(V)

    def grow(self) -> None:
        """Multiplies H onto the last column, and appends what is new in the result."""
        j = self.filled
        w = self.product(self.Q[:, j : j + 1])[:, 0]
        self._scale = max(self._scale, float(torch.linalg.vector_norm(w)))
        w, h = self._orthogonal(w, j + 1)
        self.T[: j + 1, j] = h
        self.T[j, : j + 1] = h
        self.filled = j + 1
        self.beta = float(torch.linalg.vector_norm(w))
        if self.filled == self._curvature.d:
            self.beta = 0.0
        elif self.beta > 1e-12 * self._scale:
            self.Q[:, j + 1] = w / self.beta
        else:  # the basis is invariant: eigenvectors outside it, of a multiple eigenvalue say, need a new start
            self.beta = 0.0
            self._redrawn += 1
            fresh = draw(self._curvature, gaussian(), self._seed, range(self._redrawn, self._redrawn + 1))[
                :, 0
            ].double()
            fresh, _ = self._orthogonal(fresh, j + 1)
            self.Q[:, j + 1] = fresh / torch.linalg.vector_norm(fresh)

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Keeps the Ritz pairs (theta, Q S) and the last column."""
        kept = len(theta)
        last = self.Q[:, self.filled].clone()
        self.Q[:, :kept] = self.Q[:, : self.filled] @ S
        self.Q[:, kept] = last
        self.T.zero_()
        self.T[:kept, :kept] = torch.diag(theta)
        self.filled = kept

    def _orthogonal(self, w: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """w without its part in the first columns of Q, and the coefficients of that part."""
        Q = self.Q[:, :columns]
        first = Q.T @ w
        w = w - Q @ first
        second = Q.T @ w
        return w - Q @ second, first + second


def _order(theta: Tensor, which: Which) -> Tensor:
    key = {"largest": theta, "smallest": -theta, "magnitude": theta.abs()}[which]
    return torch.argsort(key, descending=True)
