"""The exact spectrum of the GGN where N examples times C outputs are few, through the Gram matrix.

    G = sum_n J_n^T A_n J_n,   A_n = d^2 L / d outputs_n^2 (C, C), semidefinite where L is convex in the outputs
    A_n = R_n R_n^T,           M = stack of R_n^T J_n (N C, d),    G = M^T M,    K = M M^T (N C, N C)

G and K have the same eigenvalues other than 0. K is built in blocks of columns, each by one product with J^T on the
block's examples and one with J on all: M is never held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phisam.sharpness.curvature import GGN, Batch, Progress, n_examples, sliced
from phisam.sharpness.estimate import Estimate
from phisam.sharpness.refusals import Unmeasurable, explained


@dataclass(frozen=True)
class GGNSpectrum:
    """eigenvalues (min(N C, d),), descending: all of G's that can differ from 0. float64, exact up to rounding.

    cut: eigenvalues up to this are rounding (machine epsilon times N C times the largest); rank: how many are above.
    """

    eigenvalues: Tensor
    cut: float
    rank: int

    def log_pseudo_determinant(self) -> Estimate:
        """sum of log lambda_i over the eigenvalues above the cut. Near zero loss the cut decides it."""
        value = float(self.eigenvalues[: self.rank].log().sum())
        return Estimate("ggn_log_pseudo_determinant", value, 0.0, 0)

    def log_determinant(self, delta: float) -> Estimate:
        """sum_i log(1 + lambda_i / delta), exact.

        Raises:
            ValueError: delta is not positive.
        """
        if not delta > 0:
            raise ValueError(f"delta must be a positive number, got {delta!r}")
        value = float(torch.log1p(self.eigenvalues / delta).sum())
        return Estimate(f"ggn_log_determinant_{delta:g}", value, 0.0, 0)


def ggn_log_determinant(ggn: GGN, *, limit: int = 4096, progress: Progress | None = None) -> Estimate:
    """The exact log-pseudo-determinant of the GGN: `ggn_spectrum(...).log_pseudo_determinant()`, raising as it does."""
    return ggn_spectrum(ggn, limit=limit, progress=progress).log_pseudo_determinant()


def ggn_spectrum(ggn: GGN, *, limit: int = 4096, progress: Progress | None = None) -> GGNSpectrum:
    """All eigenvalues of the GGN other than 0. Ranks build blocks of K; one all-reduce of (N C)^2 numbers.

    Raises:
        TypeError: a Hessian was given.
        ValueError: N C is beyond `limit`.
        Unmeasurable: the criterion is not convex in the outputs at this x, or the outputs are no tensor (N, ...).
    """
    if not isinstance(ggn, GGN):
        raise TypeError(f"expected a sharpness.GGN, got a {type(ggn).__name__}: the Gram matrix is the GGN's alone")
    first = ggn.outputs(ggn.batches[0][0])
    if not isinstance(first, Tensor) or first.ndim < 1 or len(first) != n_examples(ggn.batches[0][0]):
        raise Unmeasurable("the Gram matrix needs outputs that are one tensor with a row for each example")
    size = ggn.n_examples * (first.numel() // len(first))
    if size > limit:
        raise ValueError(
            f"N C = {ggn.n_examples} examples x {size // ggn.n_examples} outputs = {size} is beyond the limit of "
            f"{limit}: measure on fewer examples, raise `limit` (time grows with its square), or take log_determinant"
        )
    roots = [_roots(ggn, batch) for batch in ggn.batches]
    K = ggn.peers.sum(_gram(ggn, roots, size, progress))
    eigenvalues = torch.linalg.eigvalsh((K + K.T) / 2).flip(0)[: ggn.d].clamp_min(0).cpu()
    cut = float(torch.finfo(ggn.dtype).eps * size * eigenvalues[0])
    return GGNSpectrum(eigenvalues, cut, int((eigenvalues > cut).sum()))


def _gram(ggn: GGN, roots: list[Tensor], size: int, progress: Progress | None) -> Tensor:
    """This rank's columns of K; the others are 0."""
    K = torch.zeros(size, size, dtype=torch.float64, device=ggn.device)
    J = ggn.jacobian(ggn.batches)
    blocks = _blocks(ggn, roots)
    own = blocks[ggn.rank :: ggn.ranks]
    for done, (column, batch, R) in enumerate(own, 1):
        n, C, _ = R.shape
        # Column (example i, root r) of the block: R_i e_r at the outputs of example i.
        E = torch.zeros(n, C, n, C, dtype=R.dtype, device=R.device)
        E[torch.arange(n), :, torch.arange(n), :] = R
        try:
            JM = J @ (ggn.jacobian([batch]).adjoint() @ E.reshape(n * C, n * C))
        except (RuntimeError, NotImplementedError) as error:
            raise explained(error) from error
        rows = torch.cat(
            [
                (R_b.transpose(1, 2) @ part.reshape(*R_b.shape[:2], n * C)).reshape(-1, n * C)
                for R_b, part in zip(roots, JM.split([R_b.shape[0] * C for R_b in roots]), strict=True)
            ]
        )
        K[:, column : column + n * C] = rows.double()
        if progress is not None:
            progress(len(blocks) * done // len(own), len(blocks))
    return K


def _blocks(ggn: GGN, roots: list[Tensor]) -> list[tuple[int, Batch, Tensor]]:
    """(first column, examples, their R): at most `chunk` columns, one example at least."""
    blocks = []
    column = 0
    for (inputs, targets), R in zip(ggn.batches, roots, strict=True):
        step = max(1, ggn.chunk // R.shape[1])
        for start in range(0, len(R), step):
            part = slice(start, start + step)
            blocks.append((column, (sliced(inputs, part), targets[part]), R[part]))
            column += R[part].shape[0] * R.shape[1]
    return blocks


def _roots(ggn: GGN, batch: Batch) -> Tensor:
    """R_n of a batch's examples, (n, C, C), with the batch's weight n_b / N in it."""
    inputs, targets = batch
    outputs = ggn.outputs(inputs)
    n, C = len(outputs), outputs[0].numel()
    z = outputs.requires_grad_()
    (slope,) = torch.autograd.grad(ggn.criterion(z, targets), z, create_graph=True)
    A = torch.zeros(n, C, C, dtype=outputs.dtype, device=outputs.device)
    for c in range(C):  # the criterion adds up over the examples: one product gives column c of all A_n
        e = torch.zeros(n, C, dtype=outputs.dtype, device=outputs.device)
        e[:, c] = 1
        if slope.requires_grad:  # else the criterion is linear, and A = 0
            (column,) = torch.autograd.grad(slope, z, e.view_as(z), retain_graph=True, materialize_grads=True)
            A[:, :, c] = column.reshape(n, C)
    a, U = torch.linalg.eigh(A * (n / ggn.n_examples))
    if float(a.min()) < -1e3 * torch.finfo(A.dtype).eps * float(a.abs().max()):
        raise Unmeasurable(
            "the criterion is not convex in the model's outputs here, so the GGN has negative eigenvalues and no Gram "
            "matrix: take log_determinant, which needs none"
        )
    R: Tensor = U * a.clamp_min(0).sqrt()[:, None, :]
    return R
