"""One evaluation of a step: forward passes at one point, their mean loss, and its gradient.

A point is usually one forward and one backward pass. With micro-batches it is one of each for every micro-batch, and
with a symmetric noise all of that at x + rho v and again at x - rho v: L_e is the mean over all of them, and one graph
is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phisam.closures import Part, checked_loss, single, whole
from phisam.gradient import Perturbation, add_scaled_, flatten
from phisam.guards import Buffers
from phisam.noise import Draw
from phisam.wrapping import OptionalTensors, Wrapping


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: the point e on a part of the batch."""

    point: int
    part: Part = whole
    draw: Draw | None = None  # None: x itself
    keeps_buffers: bool = False  # the one evaluation that BatchNorm and other buffers remember


@dataclass(frozen=True)
class Evaluated:
    """loss: L_e, detached, float64. graph: the last pass's share of it, whose backward is due. partial: the gradient of
    the other passes' shares, None if there were none.
    """

    loss: Tensor
    graph: Tensor
    partial: OptionalTensors | None


class Evaluator:
    """Evaluates points of one step, each from the same buffers and with the same dropout masks.

    Args:
        parameters: x.
        closures: the micro-batches.
        restart: puts torch's generators to the state that every point of this step starts from.
        loss_scale: what losses are multiplied by before a backward, for fp16; None for 1.
    """

    def __init__(
        self,
        wrapping: Wrapping,
        parameters: Sequence[nn.Parameter],
        perturbation: Perturbation,
        closures: Sequence[Callable[[Part], Tensor]],
        buffers: Buffers,
        restart: Callable[[], None],
        loss_scale: Tensor | None,
    ) -> None:
        self._wrapping = wrapping
        self._parameters = parameters
        self._perturbation = perturbation
        self._closures = closures
        self._buffers = buffers
        self._restart = restart
        self._loss_scale = loss_scale

    def evaluate(self, evaluation: Evaluation, rho: float, rho_scales: Sequence[float], last: bool) -> Evaluated:
        """L_e with the graph of its last pass. `evaluation.draw`, if any, was drawn into the perturbation.

        last: the backward of the graph will be the last of the step on this rank, the one that reduces.
        """
        signs = evaluation.draw.noise.signs if evaluation.draw else (0,)
        passes = [(sign, closure) for sign in signs for closure in self._closures]
        losses = []
        partial: OptionalTensors | None = None
        for i, (sign, closure) in enumerate(passes):
            if i % len(self._closures) == 0:
                self._go_to(sign * rho, rho_scales)
            final = i == len(passes) - 1
            reducing = last and final
            with self._wrapping.reducing_forward() if reducing else self._wrapping.local_forward(), torch.enable_grad():
                loss = checked_loss(closure(evaluation.part), self._parameters)
                losses.append(loss.detach().double())
                graph = loss if len(passes) == 1 else loss / len(passes)
                graph = graph if self._loss_scale is None else graph * self._loss_scale
            if not final:
                partial = self._added(partial, graph)
        if evaluation.keeps_buffers:
            self._buffers.keep()
        return Evaluated(torch.stack(losses).mean(), graph, partial)

    def gradient(self, evaluated: Evaluated) -> OptionalTensors:
        """grad L_e, of what this rank holds; frees the graph."""
        if evaluated.partial is None:
            return self._wrapping.gradient(evaluated.graph, self._parameters)
        return self._added(evaluated.partial, evaluated.graph)

    def squared_gradients(self, examples: Sequence[int]) -> Tensor:
        """sum_k (grad L_k)^2, flat, over single examples; the network in evaluation mode.

        Example k is example k // M of micro-batch k mod M, as strided micro-batches have it.
        """
        M = len(self._closures)
        total = torch.zeros_like(flatten(self._parameters, self._parameters))
        modes = [(module, module.training) for module in self._wrapping.model.modules()]
        self._wrapping.model.eval()
        try:
            for example in examples:
                self._go_to(0.0, ())
                with self._wrapping.local_forward(), torch.enable_grad():
                    loss = checked_loss(self._closures[example % M](single(example // M)), self._parameters)
                total.addcmul_(*[flatten(self._wrapping.gradient(loss, self._parameters), self._parameters)] * 2)
        finally:
            for module, mode in modes:
                module.training = mode
        return total

    def _go_to(self, rho: float, rho_scales: Sequence[float]) -> None:
        if rho == 0:
            self._perturbation.undo()
        else:
            self._perturbation.move(rho, rho_scales)
        self._buffers.rewind()
        self._restart()

    def _added(self, sums: OptionalTensors | None, graph: Tensor) -> OptionalTensors:
        sums = [None] * len(self._parameters) if sums is None else sums
        add_scaled_(sums, self._wrapping.gradient(graph, self._parameters), torch.ones_like(graph.detach()))
        return sums
