"""The local mathematics of a step, on plain tensors. Nothing here communicates.

    Perturbation    x + rho v_e, and exactly x again
    Rows            g_row_l = sum over this rank's points of slope_{e,l} grad L_e, for l = 1..m, beside grad L_0

Memory beyond the model: one copy of the parameters, one v, and m + 1 rows at most, whatever n is. A rank whose
only point is the last one has no row at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from phisam.noise import Noise

Gradients = Sequence[Tensor | None]


class Perturbation:
    """Moves parameters to x + rho v and puts them back bit for bit: copied, never added and subtracted.

    Args:
        parameters: the tensors that together are x, in the model's order; v is laid out in the same order.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        first = parameters[0]
        self._generator = Generator(first.device)
        self._v = torch.empty(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        sizes = [p.numel() for p in parameters]
        self._v_parts = [part.view_as(p) for part, p in zip(torch.split(self._v, sizes), parameters, strict=True)]
        self._saved = [torch.empty_like(p) for p in parameters]
        self._holds_copy = False

    @torch.no_grad()
    def apply(self, noise: Noise, rho: float, rho_scales: Sequence[float], seed: int, step: int, point: int) -> None:
        """x <- x + rho * rho_scale * v with v the draw of (seed, step, point)."""
        noise.draw_(self._v, self._generator, seed, step, point)
        if not self._holds_copy:
            torch._foreach_copy_(self._saved, self._parameters)
            self._holds_copy = True
        for p, x, v, scale in zip(self._parameters, self._saved, self._v_parts, rho_scales, strict=True):
            torch.add(x, v, alpha=rho * scale, out=p)

    @torch.no_grad()
    def undo(self) -> None:
        """x again, bit for bit."""
        if self._holds_copy:
            torch._foreach_copy_(self._parameters, self._saved)

    def release(self) -> None:
        """x again, and the copy is void: the base optimizer may move x now."""
        self.undo()
        self._holds_copy = False


class Rows:
    """Running sums of gradients: row 0 is grad L_0, row l the sum of slope_{e,l} grad L_e over points e >= 1.

    Slopes of measures with psi = exp(sigma t) come with a log_scale; the rows then hold their sums divided by
    exp(log_scale), the largest one so far, as a running softmax does, and can neither overflow nor vanish.
    """

    def __init__(self, n_parameters: int) -> None:
        self._point_0: list[Tensor | None] = [None] * n_parameters
        self._rows: list[list[Tensor | None]] = []
        self.log_scale: Tensor | None = None

    @property
    def empty(self) -> bool:
        """No perturbed point was added."""
        return not self._rows

    def add_unperturbed(self, gradients: Gradients) -> None:
        """grad L_0. A copy: autograd may give two parameters one tensor, or an expanded one."""
        self._point_0 = [None if g is None else g.clone() for g in gradients]

    def add(self, gradients: Gradients, slopes: Tensor, log_scale: Tensor | None) -> None:
        """slope_l * gradient to each row l; slopes (m,), log_scale a scalar or None for 0."""
        if log_scale is not None:
            previous = log_scale if self.log_scale is None else self.log_scale
            self.log_scale = torch.maximum(previous, log_scale)
            for row in self._rows:
                _scale_(row, torch.exp(previous - self.log_scale))
            slopes = slopes * torch.exp(log_scale - self.log_scale)
        if not self._rows:
            self._rows = [[None] * len(gradients) for _ in slopes]
        for row, slope in zip(self._rows, slopes, strict=True):
            _add_scaled_(row, gradients, slope)

    def combine(self, weight_0: Tensor, factors: Tensor | None, scale: float) -> list[Tensor | None]:
        """scale * (weight_0 grad L_0 + sum_l factor_l row_l), one entry per parameter; None: no point had one.

        The rows are used up. Without a perturbed point factors is None.
        """
        total = self._point_0
        _scale_(total, weight_0 * scale)
        if factors is not None:
            for row, factor in zip(self._rows, factors, strict=True):
                _add_scaled_(total, row, factor * scale)
        return total


def _scale_(tensors: Gradients, factor: Tensor) -> None:
    present = [t for t in tensors if t is not None]
    if present:
        torch._foreach_mul_(present, factor.to(present[0].dtype))


def _add_scaled_(sums: list[Tensor | None], terms: Gradients, factor: Tensor) -> None:
    """sums += factor * terms, entry by entry; a sum starts with its first term."""
    old, new = [], []
    for i, term in enumerate(terms):
        if term is None:
            continue
        total = sums[i]
        if total is None:
            sums[i] = term * factor.to(term.dtype)
        else:
            old.append(total)
            new.append(term)
    if old:
        torch._foreach_addcmul_(old, new, [factor.to(old[0].dtype)] * len(old))
