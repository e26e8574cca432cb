"""What must be right before a step: settings, and that model, base optimizer and mesh belong together. In words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from phisam.measures import Measure
from phisam.sharding import SampleMesh

T = TypeVar("T")


def check_rho(rho: float) -> None:
    """Raises ValueError unless rho is a perturbation radius."""
    if not (_is_number(rho) and math.isfinite(rho) and rho > 0 and 0 < rho * rho < math.inf):
        raise ValueError(
            f"rho must be a positive finite number, got {rho!r}; for no perturbation use measure=phisam.sgd()"
        )


def check_lam(lam: float) -> None:
    """Raises ValueError unless lam is a finite number."""
    if not (_is_number(lam) and math.isfinite(lam)):
        raise ValueError(f"lam must be a finite number, got {lam!r}; lam = 0 is the base optimizer")


def check_rho_scale(rho_scale: float) -> None:
    """Raises ValueError unless a group's share of v can be multiplied by it."""
    if not (_is_number(rho_scale) and math.isfinite(rho_scale)):
        raise ValueError(f"rho_scale of a parameter group must be a finite number, got {rho_scale!r}; 0 leaves it at x")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Checked(Generic[T]):
    """An attribute that is checked whenever it is assigned.

    Args:
        check: raises ValueError for a value that is not allowed.
    """

    def __init__(self, check: Callable[[T], None]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, owner: Any, kind: type) -> T:
        value: T = owner.__dict__[self._name]
        return value

    def __set__(self, owner: Any, value: T) -> None:
        self._check(value)
        owner.__dict__[self._name] = value


def check_measure(measure: Measure, n_samples: int, rho: float) -> None:
    """Raises ValueError unless it is a measure, and whatever its phi or psi raises if they do not work.

    That is said here, not in a step where other ranks would wait for ever.
    """
    if not isinstance(measure, Measure):
        raise ValueError(f"measure must be a phisam.Measure, such as phisam.frobenius(), got {measure!r}")
    measure.weights(torch.zeros(measure.n_points(n_samples) + 1), rho, 1.0)


def check_n_samples(n_samples: int) -> None:
    """Raises ValueError unless it is a number of draws; whether the measure can do with so few is its own matter."""
    if not _is_count(n_samples):
        raise ValueError(f"n_samples must be an integer, got {n_samples!r}")


def check_scope(scope: str) -> None:
    """Raises ValueError unless it is a scope."""
    if scope not in ("global", "shard"):
        raise ValueError(f'scope must be "global" or "shard", got {scope!r}')


def check_every(every: int) -> None:
    """Raises ValueError unless every k-th step can have the sharpness term."""
    if not _is_count(every) or every < 1:
        raise ValueError(f"every must be an integer >= 1, got {every!r}; 1 has the sharpness term in every step")


def check_perturb_fraction(perturb_fraction: float) -> None:
    """Raises ValueError unless it is a part of the batch."""
    if not (_is_number(perturb_fraction) and 0 < perturb_fraction <= 1):
        raise ValueError(
            f"perturb_fraction must be in (0, 1], got {perturb_fraction!r}: it is the part of the batch that the "
            "measure sees; 1 is all of it"
        )


def check_base(base_optimizer: Optimizer, max_grad_norm: float | None) -> None:
    """Raises ValueError unless the base optimizer takes a gradient, which may be clipped to max_grad_norm."""
    if isinstance(base_optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss by itself and cannot be a base optimizer")
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be a positive number or None, got {max_grad_norm!r}")


def trained_parameters(of_model: Sequence[nn.Parameter], base_optimizer: Optimizer) -> list[nn.Parameter]:
    """x: the parameters of the base optimizer that require a gradient, in the model's order."""
    optimized = {p for group in base_optimizer.param_groups for p in group["params"]}
    foreign = len(optimized - set(of_model))
    if foreign:
        raise ValueError(
            f"{foreign} of the base optimizer's {len(optimized)} parameter tensors are not the model's; build it from "
            "the model that PhiSAM gets, after the model was moved or replaced: SGD(model.parameters(), ...)"
        )
    trained = [p for p in of_model if p in optimized and p.requires_grad]
    if not trained:
        raise ValueError("the base optimizer has no parameter that requires a gradient: nothing can be trained")
    return trained


def check_tensors(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raises ValueError unless a small perturbation of the parameters can be represented and made in one fill."""
    names = {p: name for name, p in model.named_parameters()}
    first = parameters[0]
    for p in parameters:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {names[p]!r} is {p.dtype}, which cannot hold a small perturbation: keep the parameters in "
                "float32 (model.float()) and use torch.autocast in the closure for speed"
            )
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"parameter {names[p]!r} is {p.dtype} on {p.device}, but {names[first]!r} is {first.dtype} on "
                f"{first.device}: all trained parameters must share one dtype and one device"
            )
    trained = set(parameters)
    sparse = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight in trained
    ]
    if sparse:
        raise ValueError(f"module {sparse[0]!r} makes sparse gradients, which cannot be combined; use sparse=False")


def check_mesh(model: nn.Module, mesh: SampleMesh) -> None:
    """Raises ValueError unless the mesh covers the process group."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    wrapped = model.process_group.size() if isinstance(model, DistributedDataParallel) else mesh.world_size
    if mesh.world_size == 1 < wrapped:
        raise ValueError(
            f"the model is DDP-wrapped over {wrapped} processes but mesh is None, so each would weigh its own losses "
            "and the replicas would diverge: pass mesh=phisam.sample_mesh(n_samples)"
        )
    if wrapped != mesh.world_size:
        raise ValueError(
            f"the model is DDP-wrapped over {wrapped} processes, but the mesh has {mesh.world_size}: wrap it over the "
            "default process group"
        )
    if mesh.sample_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "SyncBatchNorm averages over ranks that evaluate different points: use BatchNorm, or sample_parallel=1"
        )
    if mesh.world_size not in (1, processes):
        raise ValueError(
            f"mesh: data x sample = {mesh.data_size} x {mesh.sample_size} = {mesh.world_size}, but the process group "
            f"has {processes} processes: build the mesh with phisam.sample_mesh(n_samples) after init_process_group"
        )
