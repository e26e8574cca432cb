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

from phisam.closures import Part, checked_loss, first, single, whole
from phisam.gradient import Perturbation, add_scaled_, flatten
from phisam.guards import Buffers
from phisam.measures import Measure
from phisam.noise import Draw
from phisam.wrapping import OptionalTensors, Wrapping


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: the point e on a part of the batch."""

    point: int
    part: Part = whole
    draw: Draw | None = None  # None: x itself
    keeps_buffers: bool = False  # the one evaluation that BatchNorm and other buffers remember


def plan(measure: Measure, n_samples: int, fraction: float, sample_size: int) -> tuple[list[Evaluation], int, int]:
    """The evaluations of a step, and which of them is x as the measure sees it, and x on the whole batch.

    They are the points 0..n. With perturb_fraction < 1 the points are on a part of the batch, and x on all of it is one
    evaluation more: sample rank 0's, so that buffers move where they do in every other step, and where `sync_buffers`
    takes them.
    """
    draws = [measure.draw_of(point) for point in range(1, measure.n_points(n_samples) + 1)]
    split = bool(draws) and fraction < 1
    part = first(fraction if split else 1.0)
    perturbed = [Evaluation(point, part, draw) for point, draw in enumerate(draws, 1)]
    on_whole = Evaluation(0, keeps_buffers=True)
    if not split:
        return [on_whole, *perturbed], 0, 0
    if sample_size > 1 and not measure.needs_gradient:  # round 0 brings the losses of both
        return [on_whole, Evaluation(0, part), *perturbed], 1, 0
    return [Evaluation(0, part), on_whole, *perturbed], 0, 1


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

    def evaluate(
        self, evaluation: Evaluation, rho: float, rho_scales: Sequence[float], last: bool, loss_alone: bool = False
    ) -> Evaluated:
        """L_e with the graph of its last pass. `evaluation.draw`, if any, was drawn into the perturbation.

        last: the backward of the graph will be the last of the step on this rank, the one that reduces.
        loss_alone: nobody will ask for grad L_e, so that no pass has a backward.
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
            if not final and not loss_alone:
                partial = self._added(partial, graph)
        if evaluation.keeps_buffers:
            self._buffers.keep()
        return Evaluated(losses[0] if len(losses) == 1 else torch.stack(losses).mean(), graph, partial)

    def gradient(self, evaluated: Evaluated) -> OptionalTensors:
        """grad L_e, of what this rank holds; frees the graph."""
        if evaluated.partial is None:
            return self._wrapping.gradient(evaluated.graph, self._parameters)
        return self._added(evaluated.partial, evaluated.graph)

    def squared_gradients(self, examples: Sequence[int]) -> Tensor:
        """sum_k (s grad L_k)^2, flat, over single examples, s the loss scale; the network in evaluation mode.

        Example k is example k // M of micro-batch k mod M, as strided micro-batches have it. One whose gradient is not
        finite has no part in the sum.
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
                    scaled = loss if self._loss_scale is None else loss * self._loss_scale
                gradient = flatten(self._wrapping.gradient(scaled, self._parameters), self._parameters)
                gradient = torch.where(torch.isfinite(gradient).all(), gradient, 0.0)
                total.addcmul_(gradient, gradient)
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
