"""Lanczos' method on several vectors at once, in float64, with full reorthogonalisation.

From a unit vector q_1 it builds orthonormal q_1 .. q_m with H Q = Q T + beta_m q_{m+1} e_m^T and a tridiagonal T. The
eigenvalues theta_j of T and the squared first entries w_j of its eigenvectors are Gauss quadrature:

    q_1^T f(H) q_1 = sum_j w_j f(theta_j)       exact for polynomials f of degree <= 2 m - 1

Without reorthogonalisation the q_j lose their orthogonality as soon as an eigenvalue converges, and it appears twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
# (nodes, weights) of m / 2 and of m steps -> how much the answer changed
Change = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], float]


class Runs:
    """g runs side by side, which `extend` takes further. Q needs g m d numbers."""

    def __init__(self, product: Product, start: Tensor, agree: Callable[[bool], bool]) -> None:
        """start (g, d): the vectors, any length but 0. product: (d, g) -> (d, g). agree: whether a flag is true on all
        ranks that take part in the products.
        """
        self._product = product
        self._agree = agree
        unit = start.double() / torch.linalg.vector_norm(start.double(), dim=1, keepdim=True)
        self._Q = unit[:, None]
        self._alpha = unit.new_zeros(len(unit), 0)
        self._beta = unit.new_zeros(len(unit), 0)
        self._scale = unit.new_zeros(len(unit))
        self.ended: list[int | None] = [None] * len(unit)  # steps after which the Krylov space held no new vector
        self.steps = 0

    def extend(self, steps: int) -> Iterator[int]:
        """Up to `steps` steps in all; yields the number done after each."""
        g, _, d = self._Q.shape
        Q = self._Q.new_zeros(g, min(steps, d) + 1, d)
        Q[:, : self._Q.shape[1]] = self._Q
        self._Q = Q
        alpha, beta = list(self._alpha.unbind(1)), list(self._beta.unbind(1))
        for j in range(self.steps, min(steps, d)):
            w = self._product(Q[:, j].T).T.double()
            alpha.append((Q[:, j] * w).sum(1))
            self._scale = torch.maximum(self._scale, torch.linalg.vector_norm(w, dim=1))
            for _ in range(2):  # twice is enough (Parlett; Giraud et al. 2005)
                w = w - (Q[:, : j + 1].transpose(1, 2) @ (Q[:, : j + 1] @ w[:, :, None]))[:, :, 0]
            norm = torch.linalg.vector_norm(w, dim=1)
            alive = norm > 1e-10 * self._scale  # else w is rounding
            self.ended = [
                end if end is not None else None if on and j + 1 < d else j + 1
                for end, on in zip(self.ended, alive.tolist(), strict=True)
            ]
            beta.append(torch.where(alive, norm, 0.0))
            Q[:, j + 1] = torch.where(alive[:, None], w / norm.clamp_min(torch.finfo(w.dtype).tiny)[:, None], 0.0)
            self.steps = j + 1
            yield self.steps
            if self._agree(all(end is not None for end in self.ended)):
                break
        self._alpha, self._beta = torch.stack(alpha, 1), torch.stack(beta, 1)

    def quadrature(self, run: int, steps: int) -> tuple[Tensor, Tensor]:
        """Nodes and weights of a run, from its first `steps` steps, or from those that there were."""
        end = self.ended[run]
        m = min(steps, self.steps if end is None else end)
        off = self._beta[run, : m - 1]
        T = torch.diag(self._alpha[run, :m]) + torch.diag(off, 1) + torch.diag(off, -1)
        nodes, vectors = torch.linalg.eigh(T)
        weights = vectors[0].square()
        return nodes, weights / weights.sum()
