"""The end of a step: g is unscaled, clipped and checked, and the base optimizer takes it or the step is skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phisam.sharding import SampleMesh
from phisam.wrapping import Wrapping


class BaseStep:
    """Hands g, which lies in .grad, to the base optimizer.

    Args:
        grad_scaler: scales the losses of fp16 autocast; None for no scaling.
        max_grad_norm: g is clipped to this norm; None for no clipping.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        wrapping: Wrapping,
        grad_scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        self._base = base_optimizer
        self._wrapping = wrapping
        self._scaler = grad_scaler
        self._max_grad_norm = max_grad_norm

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """What every loss of the step is multiplied by before its backward."""
        return None if self._scaler is None else self._scaler.scale(torch.ones((), device=device))

    def finish_gradient(self, parameters: Sequence[nn.Parameter], losses: Tensor, mesh: SampleMesh) -> Tensor:
        """g, unscaled and clipped. Returns whether all of it and all losses are finite: a flag, the same on all ranks.

        losses: every rank's, float64, of any shape.
        """
        gradients = [g for g in self._wrapping.held_gradients(parameters) if g is not None]
        if not gradients:
            raise ValueError("the loss depends on no parameter of the base optimizer")
        if self._scaler is not None:
            self._scaler.unscale_(self._base)
        # One fused pass; a square that overflows counts as inf, as it would in Adam's second moment.
        norms = torch.stack(torch._foreach_norm(gradients))
        finite = torch.linalg.vector_norm(torch.cat([norms, losses.flatten()]), math.inf) < math.inf  # NaN is not
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        return self._wrapping.everywhere(finite, mesh)

    def take(self, taken: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """The base optimizer's step, unless `taken` says that it is skipped; then the scaler learns of it."""
        try:
            self._take(taken, parameters)
        finally:  # else the scaler would refuse the next step
            if self._scaler is not None:
                self._scaler.update()

    def _take(self, taken: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        base = self._base
        # torch's fused optimizers skip on the device; but their first step must not be skipped there, since fused SGD
        # makes its momentum in that step and would keep it uninitialised.
        has_momentum = any(group.get("momentum") for group in base.param_groups)
        started = not has_momentum or all(p in base.state for p in parameters if p.grad is not None)
        fused = getattr(base, "_step_supports_amp_scaling", False) and not self._wrapping.reduces_every_backward
        if started and fused:
            base.found_inf = (~taken).float()  # type: ignore[attr-defined]
            base.grad_scale = None  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.found_inf, base.grad_scale  # type: ignore[attr-defined]
        elif taken:
            base.step()
