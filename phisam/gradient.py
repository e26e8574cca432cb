"""The local mathematics of a step, on plain tensors. Nothing here communicates.

    Perturbation    x + rho v_e, and exactly x again
    Rows            g_row_l = sum over this rank's points of slope_{e,l} grad L_e, for l = 1..m, beside grad L_0

Memory beyond the model: one copy of the parameters, one v, and m + 1 rows at most, whatever n is. A rank whose
only point is the last one has no row at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from phisam.noise import Draw, Preconditioning, Scaling, normalize_
from phisam.preconditioning import SecondMoments, diagonal

Gradients = Sequence[Tensor | None]


class Perturbation:
    """Moves parameters to x + rho v and puts them back bit for bit: copied, never added and subtracted.

    Args:
        held: the tensors that together are x, or this rank's pieces of them, in the model's order; v is laid out alike.
        names: of the parameters, for noises that scale some of them only.
        spans: where `held` lies in the flat vector of d numbers: (start, length).
        d: numbers of all parameters together.
        norm: ‖v‖ over all parameters, of the v that this rank holds.
        moved: called after each move.
    """

    def __init__(
        self,
        held: Sequence[Tensor],
        names: Sequence[str],
        spans: Sequence[tuple[int, int]],
        d: int,
        norm: Callable[[Tensor], Tensor],
        moved: Callable[[], None],
    ) -> None:
        self._held, self._names, self._spans, self._d = list(held), list(names), list(spans), d
        self._norm, self._moved = norm, moved
        first = held[0]
        sizes = [p.numel() for p in held]
        self._generator = Generator(first.device)
        self._v = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._v_parts = [part.view(p.shape) for part, p in zip(torch.split(self._v, sizes), held, strict=True)]
        self._saved = [torch.empty_like(p) for p in held]
        self._holds_copy = False
        self._diagonals: dict[Preconditioning, Tensor | None] = {}  # of this step

    @torch.no_grad()
    def draw(
        self,
        draw: Draw,
        seed: int,
        step: int,
        gradient: Gradients | None,
        mask: Tensor | None,
        second_moments: SecondMoments,
    ) -> None:
        """v <- sign mask T u: u the draw of (seed, step, point), or grad L, T grad L with `adaptive`, over its norm.

        Args:
            gradient: grad L, for a noise that is made of it.
            mask: flat and of what this rank holds, or None.
            second_moments: the base optimizer's, of what this rank holds; D of `preconditioned` takes the place of T.
        """
        self._save()
        noise = draw.noise
        scaled = [] if noise.scaling is None else [i for i, n in enumerate(self._names) if noise.scaling.acts_on(n)]
        if noise.of_gradient:
            assert gradient is not None
            parts = zip(self._v_parts, gradient, strict=True)
            torch._foreach_copy_(self._v_parts, [torch.zeros_like(v) if g is None else g for v, g in parts])
            self._scale(scaled, noise.scaling)
        else:
            noise.start_(self._v, self._spans, self._d, self._generator, seed, step, draw.point)
        if noise.unit:
            normalize_(self._v, self._norm(self._v))
        self._scale(scaled, noise.scaling)
        if noise.preconditioning is not None:
            self._precondition(noise.preconditioning, second_moments)
        if mask is not None:
            self._v.mul_(mask)
        if draw.sign < 0:
            self._v.neg_()

    @torch.no_grad()
    def move(self, rho: float, rho_scales: Sequence[float]) -> None:
        """x <- x + rho * rho_scale * v with the v of the last `draw`; a negative rho goes to the other side."""
        for p, x, v, scale in zip(self._held, self._saved, self._v_parts, rho_scales, strict=True):
            torch.add(x, v, alpha=rho * scale, out=p)
        self._forget_old_values()

    @torch.no_grad()
    def undo(self) -> None:
        """x again, bit for bit."""
        if self._holds_copy:
            torch._foreach_copy_(self._held, self._saved)
            self._forget_old_values()

    def release(self) -> None:
        """x again, and the copy is void: the base optimizer may move x now."""
        self.undo()
        self._holds_copy = False
        self._diagonals.clear()
        torch.clear_autocast_cache()

    def _forget_old_values(self) -> None:
        """An autocast that stands around the step keeps half-precision copies of x: every point would see those."""
        torch.clear_autocast_cache()
        self._moved()

    def _save(self) -> None:
        if not self._holds_copy:
            torch._foreach_copy_(self._saved, self._held)
            self._holds_copy = True

    def _scale(self, scaled: Sequence[int], scaling: Scaling | None) -> None:
        """v <- T v."""
        if scaled and scaling is not None:
            T = torch._foreach_abs([self._saved[i] for i in scaled])
            torch._foreach_add_(T, scaling.eta)
            torch._foreach_mul_([self._v_parts[i] for i in scaled], T)

    def _precondition(self, preconditioning: Preconditioning, second_moments: SecondMoments) -> None:
        """v <- D v, with one D for all points of a step."""
        if preconditioning not in self._diagonals:
            self._diagonals[preconditioning] = diagonal(
                second_moments(), self._held, preconditioning, self._norm, self._d
            )
        D = self._diagonals[preconditioning]
        if D is not None:
            self._v.mul_(D)


class Rows:
    """Running sums of gradients: those at x itself, and row l the sum of slope_{e,l} grad L_e over points e >= 1.

    Slopes of measures with psi = exp(sigma t) come with a log_scale; the rows then hold their sums divided by
    exp(log_scale), the largest one so far, as a running softmax does, and can neither overflow nor vanish.
    """

    def __init__(self, n_parameters: int) -> None:
        self._n_parameters = n_parameters
        self._at_x: list[tuple[int, list[Tensor | None]]] = []
        self._rows: list[list[Tensor | None]] = []
        self.log_scale: Tensor | None = None

    @property
    def empty(self) -> bool:
        """No perturbed point was added."""
        return not self._rows

    def add_unperturbed(self, evaluation: int, gradients: Gradients) -> None:
        """A gradient at x. A copy: autograd may give two parameters one tensor, or an expanded one."""
        self._at_x.append((evaluation, [None if g is None else g.clone() for g in gradients]))

    def add(self, gradients: Gradients, slopes: Tensor, log_scale: Tensor | None) -> None:
        """slope_l * gradient to each row l; slopes (m,), log_scale a scalar or None for 0."""
        if log_scale is not None:
            previous = log_scale if self.log_scale is None else self.log_scale
            self.log_scale = torch.maximum(previous, log_scale)
            for row in self._rows:
                scale_(row, torch.exp(previous - self.log_scale))
            slopes = slopes * torch.exp(log_scale - self.log_scale)
        if not self._rows:
            self._rows = [[None] * len(gradients) for _ in slopes]
        for row, slope in zip(self._rows, slopes, strict=True):
            add_scaled_(row, gradients, slope)

    def combine(self, weights: Tensor, factors: Tensor | None, scale: float) -> list[Tensor | None]:
        """scale * (the gradients at x by the weights of their evaluations + sum_l factor_l row_l).

        One entry per parameter; None: no evaluation had one. The rows are used up. Without a perturbed point factors
        is None.
        """
        total: list[Tensor | None] = [None] * self._n_parameters
        for i, (evaluation, gradients) in enumerate(self._at_x):
            if i == 0:
                scale_(gradients, weights[evaluation] * scale)
                total = gradients
            else:
                add_scaled_(total, gradients, weights[evaluation] * scale)
        if factors is not None:
            for row, factor in zip(self._rows, factors, strict=True):
                add_scaled_(total, row, factor * scale)
        return total


def flatten(gradients: Gradients, like: Sequence[Tensor]) -> Tensor:
    """One vector, with zeros where there is no gradient."""
    return torch.cat(
        [x.new_zeros(x.numel()) if g is None else g.reshape(-1) for g, x in zip(gradients, like, strict=True)]
    )


def scale_(tensors: Gradients, factor: Tensor) -> None:
    """tensors *= factor."""
    present = [t for t in tensors if t is not None]
    if present:
        torch._foreach_mul_(present, factor.to(present[0].dtype))


def add_scaled_(sums: list[Tensor | None], terms: Gradients, factor: Tensor) -> None:
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
