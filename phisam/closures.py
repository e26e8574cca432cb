"""The user's side of a step: closures that run the forward pass, and the part of the batch that they run it on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Part = Callable[[Tensor], Tensor]
"""Picks examples from a tensor, along its first dimension; apply it to inputs and targets alike."""

Closure = Callable[[], Tensor] | Callable[[Part], Tensor]


def whole(x: Tensor) -> Tensor:
    """Every example."""
    return x


def first(fraction: float) -> Part:
    """The first ceil(fraction B) examples."""
    return whole if fraction == 1 else partial(_first, fraction=fraction)


def single(index: int) -> Part:
    """One example, counted round and round, as a batch of one."""
    return partial(_single, index=index)


def _required(closure: Closure) -> list[inspect.Parameter]:
    """Parameters without a default."""
    code = getattr(closure, "__code__", None)
    if code is not None and code.co_argcount == code.co_kwonlyargcount == 0:  # as most are; a signature takes 30 us
        return []
    try:
        parameters = inspect.signature(closure).parameters.values()
    except ValueError:  # of compiled code, which says nothing of its arguments
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in parameters if each.default is each.empty and each.kind not in variadic]


def _by_name(closure: Callable[..., Tensor], name: str, part: Part) -> Tensor:
    return closure(**{name: part})


def _first(x: Tensor, fraction: float) -> Tensor:
    _check_tensor(x)
    return x[: math.ceil(fraction * len(x) - 1e-9)]


def _single(x: Tensor, index: int) -> Tensor:
    _check_tensor(x)
    at = index % len(x)
    return x[at : at + 1]


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise ValueError(
            f"part picks examples from a tensor along its first dimension, got {x!r}; apply it to each tensor"
        )


def taking_parts(closure: Closure | Sequence[Closure] | None, why: str | None) -> list[Callable[[Part], Tensor]]:
    """One closure or several micro-batches, each as a function of `part`.

    Args:
        why: what needs parts of the batch; None if nothing does, and closures without an argument will do.

    Raises:
        ValueError: it is no closure, or one that cannot take a part where that is needed.
    """
    closures = list(closure) if isinstance(closure, Sequence) else [closure]
    if not closures or not all(callable(each) for each in closures):
        raise ValueError(
            "step needs a closure, since it evaluates the loss at n + 1 points: "
            "opt.step(lambda: criterion(model(inputs), targets)), or a list of closures, one for each micro-batch; "
            f"got {closure!r}. A GradScaler is given to PhiSAM as grad_scaler; scaler.step has no part in it"
        )
    return [_taking_part(each, why) for each in closures if each is not None]


def _taking_part(closure: Closure, why: str | None) -> Callable[[Part], Tensor]:
    required = _required(closure)
    if len(required) == 1 and required[0].kind == required[0].KEYWORD_ONLY:  # partial(f, x, y=y) of f(x, y, part)
        return partial(_by_name, closure, required[0].name)
    if len(required) == 1:
        return closure  # type: ignore[return-value]
    if required:
        raise ValueError(f"the closure takes {len(required)} arguments; it gets none, or one: part")
    if why is not None:
        raise ValueError(
            f"{why} evaluates the loss on parts of the batch, so the closure must take one argument that picks them: "
            "opt.step(lambda part: criterion(model(part(inputs)), part(targets)))"
        )
    return lambda _: closure()  # type: ignore[call-arg]


def checked_loss(loss: object, parameters: Sequence[Tensor]) -> Tensor:
    """The closure's result as a scalar tensor.

    Raises:
        ValueError: it is no scalar, is in half precision, does not depend on the parameters, or the closure called
            backward itself.
    """
    if any(p.grad is not None for p in parameters):
        raise ValueError(
            "the closure called backward: it must only run the forward pass and return the loss, "
            "as in opt.step(lambda: criterion(model(inputs), targets)); PhiSAM calls backward itself"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the closure must return the loss as a scalar tensor, got {got}; average it over the batch")
    if loss.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the loss is {loss.dtype}, but delta = (L_i - L_0) / rho^2 needs float32 or better: "
            "compute the loss outside autocast, as in criterion(model(inputs).float(), targets)"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no gradient: the closure ran under torch.no_grad(), detached its result, "
            "or the loss does not depend on the model's parameters"
        )
    return loss.reshape(())
