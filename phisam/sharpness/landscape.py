"""Slices of the loss around a model: L(x + a u), and L(x + a u + b w), on a grid of a and b.

    u, w = random_directions(model, 2, seed=0)
    axis = grid(radius=1.0, points=41)
    L = slice_losses(model, criterion, batches, [u, w], plane(axis, axis))      # (1681,)

Directions are flat vectors in the order of `model.parameters()`, those with requires_grad, as everywhere in
`phisam.sharpness`: its eigenvectors are directions too. The model is evaluated in eval mode, so BatchNorm uses its
running statistics at every point: those that belong to x, not to x + a u. Perturbed parameters are lent to a functional
call and never written into the model: its weights, buffers, modes and gradients are those of before, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.func import functional_call

from phisam.noise import key

if TYPE_CHECKING:
    from collections.abc import Iterator

Criterion = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor | MutableMapping[str, Tensor], Tensor]]
Point = tuple[float, ...]


def random_directions(model: nn.Module, count: int, seed: int = 0) -> list[Tensor]:
    """Gaussian directions with the norms of the model's own filters: (d,) float64 each, on the CPU.

    A filter is what makes one output: row i of a weight matrix, or output channel i of a convolution. Each filter of a
    direction is scaled to the norm of the same filter in the model, so that a step of 1 means the same in every layer
    and the slice of a ReLU network does not change when one layer is scaled up and the next one down (Li et al.,
    Visualizing the Loss Landscape of Neural Nets, 2018). Parameters of one axis or none, biases and BatchNorm's, stay
    where they are. Direction i depends on (seed, i) and the model alone.
    """
    directions = []
    for index in range(count):
        generator = Generator().manual_seed(key(seed, index, 0))
        parts = [_filters(parameter, generator) for parameter in parameters(model).values()]
        directions.append(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64))
    return directions


def _filters(parameter: Tensor, generator: Generator) -> Tensor:
    if parameter.ndim < 2:
        return torch.zeros(parameter.numel(), dtype=torch.float64)
    own = parameter.detach().to("cpu", torch.float64).flatten(1)
    drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    scaled: Tensor = drawn * (own.norm(dim=1) / drawn.norm(dim=1)).unsqueeze(1)
    return scaled.flatten()


def grid(radius: float, points: int) -> Tensor:
    """points numbers from -radius to radius, (points,) float64; with an odd count the middle one is exactly 0.

    Raises:
        ValueError: the radius is not a number above 0, or there are fewer than two points.
    """
    if not 0 < radius < float("inf") or points < 2:
        raise ValueError(f"a slice needs a radius above 0 and 2 points or more, not {radius} and {points}")
    steps = torch.arange(points, dtype=torch.float64) * 2 - (points - 1)
    return steps * (radius / (points - 1))


def plane(a: Tensor, b: Tensor) -> list[Point]:
    """Every (a_i, b_j), b fastest: losses of it are `.view(len(a), len(b))`."""
    return [(float(first), float(second)) for first in a for second in b]


def line(a: Tensor) -> list[Point]:
    """Every (a_i,)."""
    return [(float(first),) for first in a]


def slice_losses(
    model: nn.Module,
    criterion: Criterion,
    batches: Batches,
    directions: Sequence[Tensor],
    points: Sequence[Point],
    *,
    known: Mapping[int, float] | None = None,
    group: dist.ProcessGroup | None = None,
    on_point: Callable[[int, float], None] | None = None,
) -> Tensor:
    """L(x + sum_k p_k u_k) for every point p: (len(points),) float64, the same on every rank.

    Args:
        model: plain, or wrapped by DDP or torch.compile. Evaluated in eval mode, left as it was.
        criterion: (outputs, targets) -> mean loss of a batch; L weighs batches by their sizes.
        batches: (inputs, targets), the same on every rank.
        directions: u_k, (d,) each.
        points: coordinates, one for each direction.
        known: losses of points that need no evaluation, by index, the same on every rank: those of a slice that was
            cut short.
        group: points that are not known are dealt to its ranks by turns. None: this process evaluates all of them.
        on_point: called with (index, loss) after each evaluation, on the rank that did it.

    Raises:
        ValueError: directions or points do not fit the model or each other, or there are no examples.
    """
    model = unwrapped(model)
    x = parameters(model)
    directions = _checked(x, directions, points)
    batches = list(batches)
    if sum(len(targets) for _, targets in batches) == 0:
        raise ValueError("a slice needs at least one example in its batches")
    known = {} if known is None else known
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    todo = [index for index in range(len(points)) if index not in known]
    device = next(iter(x.values())).device
    losses = torch.zeros(len(points), dtype=torch.float64, device=device)
    with evaluating(model), torch.no_grad():
        for index in todo[rank::ranks]:
            moved = _moved(x, directions, points[index])
            losses[index] = _loss(model, criterion, batches, moved)
            if on_point is not None:
                on_point(index, float(losses[index]))
    if group is not None:
        dist.all_reduce(losses, group=group)
    for index, loss in known.items():
        losses[index] = loss
    return losses.cpu()


def _moved(x: Mapping[str, Tensor], directions: Sequence[Tensor], point: Point) -> dict[str, Tensor]:
    """x + sum_k p_k u_k by name; the sum is formed in float64 and rounded once."""
    step = torch.zeros_like(directions[0])
    for coordinate, direction in zip(point, directions, strict=True):
        step += coordinate * direction
    parts = torch.split(step, [parameter.numel() for parameter in x.values()])
    return {
        name: (parameter.detach().double() + part.view_as(parameter)).to(parameter.dtype)
        for (name, parameter), part in zip(x.items(), parts, strict=True)
    }


def _loss(model: nn.Module, criterion: Criterion, batches: Batches, x: Mapping[str, Tensor]) -> Tensor:
    """sum_b n_b criterion(batch b) / sum_b n_b, with buffers that a forward may change but not keep."""
    total, examples = torch.zeros((), dtype=torch.float64), 0
    for inputs, targets in batches:
        lent = {**x, **{name: buffer.clone() for name, buffer in model.named_buffers()}}
        loss = criterion(functional_call(model, lent, (inputs,)), targets)
        total = total.to(loss.device) + len(targets) * loss.double()
        examples += len(targets)
    return total / examples


def _checked(x: Mapping[str, Tensor], directions: Sequence[Tensor], points: Sequence[Point]) -> list[Tensor]:
    """The directions in float64 on the model's device."""
    if not x:
        raise ValueError("the model has no parameter with requires_grad: there is nothing to move")
    d = sum(parameter.numel() for parameter in x.values())
    for number, direction in enumerate(directions):
        if direction.shape != (d,):
            raise ValueError(f"direction {number} has shape {tuple(direction.shape)}; the model needs ({d},)")
    for point in points:
        if len(point) != len(directions) or not directions:
            raise ValueError(
                f"a point has {len(point)} coordinates for {len(directions)} directions: one each is needed"
            )
    device = next(iter(x.values())).device
    return [direction.to(device, torch.float64) for direction in directions]


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are moved, by name: those with requires_grad, shared ones once."""
    return {name: parameter for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
