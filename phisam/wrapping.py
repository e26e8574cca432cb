"""What a model's wrapper does by itself in forward and backward, so that a step can be written once.

    Plain    the module alone: gradients stay on the rank, `mesh.reduce_gradients` adds them up
    DDP      the last backward all-reduces, overlapped; every other forward passes DDP by
    FSDP2    each rank holds a piece of every parameter; every forward gathers, every backward reduces and scatters

A step works on what the rank holds: for FSDP2 the local pieces, else the parameters themselves. torch.compile may stand
anywhere but around DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from phisam.sharding import SampleMesh, Scope

OptionalTensors = list[Tensor | None]


class Wrapping:
    """A plain model."""

    reduces_in_backward = False
    """The backward of `reducing_forward` leaves .grad reduced over all ranks."""

    reduces_every_backward = False
    """No gradient of this rank alone ever exists."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def check(self, parameters: Sequence[nn.Parameter], mesh: SampleMesh, scope: Scope) -> None:
        """Raises ValueError where the wrapper and the mesh do not belong together."""
        for name, p in self.model.named_parameters():
            if isinstance(p, DTensor):
                raise ValueError(
                    f"parameter {name!r} is a DTensor placed as {p.placements}, but the model is not sharded by "
                    "fully_shard: tensor parallelism is not known to the step"
                )

    def held(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What this rank has of each parameter, sharing memory with it."""
        return list(parameters)

    def spans(self, parameters: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
        """Where `held` lies in the flat vector of all parameters: (start, length), in order, adjacent ones joined."""
        return [(0, sum(p.numel() for p in parameters))]

    def gradient(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> OptionalTensors:
        """The gradient of a local forward's loss, as this rank holds it. .grad is left as it was: None."""
        gradients: OptionalTensors = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        if any(g is not None and g.is_sparse for g in gradients):
            raise ValueError(
                "a gradient is sparse, and cannot be combined with others: use embedding(..., sparse=False)"
            )
        return gradients

    def start_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """.grad <- gradients, which the last backward adds to."""
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient

    def held_gradients(self, parameters: Sequence[nn.Parameter]) -> OptionalTensors:
        """.grad, as this rank holds it."""
        return [p.grad for p in parameters]

    def norm(self, v: Tensor, mesh: SampleMesh) -> Tensor:
        """‖v‖ of the whole vector that ranks hold together."""
        norm: Tensor = torch.linalg.vector_norm(v)
        return norm

    def everywhere(self, flag: Tensor, mesh: SampleMesh) -> Tensor:
        """Whether a flag of the held gradients is true on every rank that holds other pieces."""
        return flag

    def moved(self) -> None:
        """Call after `held` was written to: whatever was computed from the old values is void."""

    def local_forward(self) -> AbstractContextManager[None]:
        """Forwards whose gradient is taken by `gradient`."""
        return nullcontext()

    def reducing_forward(self) -> AbstractContextManager[None]:
        """The forward whose backward is the last of a step."""
        return nullcontext()


class Replicated(Wrapping):
    """DDP."""

    model: DistributedDataParallel

    @property
    def reduces_in_backward(self) -> bool:  # type: ignore[override]
        """Not with find_unused_parameters: DDP would leave a parameter out that only earlier points of a step used."""
        return not self.model.find_unused_parameters

    @contextmanager
    def local_forward(self) -> Iterator[None]:
        """Forwards pass DDP by: a point whose gradient goes to a row must not touch the reducer.

        `no_sync` would not do: a forward inside it may still rebuild buckets, a collective that ranks with another
        number of points would not join.
        """
        own = self.model.__dict__.get("forward")  # a user's patch of this instance
        self.model.forward = self.model.module.__call__  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.model.forward  # the class's own method is seen again
            if own is not None:
                self.model.forward = own  # type: ignore[method-assign]

    @contextmanager
    def reducing_forward(self) -> Iterator[None]:
        """The forward goes through DDP and arms its all-reduce; its broadcast of buffers, a collective, is left out.

        Raises:
            ValueError: DDP's forward was not called.
        """
        if not self.reduces_in_backward:
            with self.local_forward():
                yield
            return
        called: list[bool] = []
        hook = self.model.register_forward_pre_hook(lambda *_: called.append(True))
        broadcast_buffers, self.model.broadcast_buffers = self.model.broadcast_buffers, False
        try:
            yield
        finally:
            hook.remove()
            self.model.broadcast_buffers = broadcast_buffers
        if not called:
            raise ValueError(
                "PhiSAM got the DDP-wrapped model, but the closure calls the module inside it, so that gradients would "
                "not be reduced and the replicas would diverge: call the wrapper in the closure"
            )


class Sharded(Wrapping):
    """FSDP2: `torch.distributed.fsdp.fully_shard`. A gradient is the mean over the ranks as soon as it exists."""

    reduces_in_backward = True
    reduces_every_backward = True

    def check(self, parameters: Sequence[nn.Parameter], mesh: SampleMesh, scope: Scope) -> None:
        """Raises ValueError unless all ranks evaluate the same points on pieces of dimension 0 of all parameters."""
        if mesh.sample_size > 1:
            raise ValueError(
                "fully_shard spreads every parameter over the ranks, so that all of them must evaluate the same point, "
                f"but the mesh has sample = {mesh.sample_size}: use phisam.sample_mesh(n_samples, sample_parallel=1)"
            )
        if scope != "global":
            raise ValueError(
                f"fully_shard reduces every gradient over the ranks, so a rank cannot weigh its own: scope={scope!r} "
                'needs DDP; use scope="global"'
            )
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            if not isinstance(p, DTensor):
                raise ValueError(
                    f"parameter {name!r} is not sharded: call fully_shard on the whole model, ignoring none"
                )
            if tuple(p.placements) != (Shard(0),) or p.device_mesh.size() != mesh.world_size:
                raise ValueError(
                    f"parameter {name!r} is placed as {p.placements} over {p.device_mesh.size()} ranks, but the step "
                    f"knows pieces of dimension 0 over all {mesh.world_size} ranks of its mesh: use a device mesh of "
                    "one dimension, fully_shard's own placement, and mesh=phisam.sample_mesh(n, sample_parallel=1)"
                )
        for name, module in self.model.named_modules():
            if isinstance(module, FSDPModule):
                _check_policies(name, module)

    def held(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [_piece(p) for p in parameters]

    def spans(self, parameters: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
        spans, start = [], 0
        for p in parameters:
            assert isinstance(p, DTensor)
            rows = -(-p.shape[0] // p.device_mesh.size()) if p.dim() else 1
            row_length = p.numel() // max(1, p.shape[0]) if p.dim() else 1
            offset = min(rows * p.device_mesh.get_local_rank(), p.shape[0] if p.dim() else 1) * row_length
            spans.append((start + offset, _piece(p).numel()))
            start += p.numel()
        return spans

    def gradient(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> OptionalTensors:
        with torch.enable_grad():
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = self.held_gradients(parameters)
        for p in parameters:
            p.grad = None
        return gradients

    def start_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            assert isinstance(p, DTensor)
            p.grad = (
                None
                if gradient is None
                else DTensor.from_local(gradient, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            )

    def held_gradients(self, parameters: Sequence[nn.Parameter]) -> OptionalTensors:
        return [None if p.grad is None else _piece(p.grad) for p in parameters]

    def norm(self, v: Tensor, mesh: SampleMesh) -> Tensor:
        return mesh.sum(torch.linalg.vector_norm(v).square()).sqrt()

    def everywhere(self, flag: Tensor, mesh: SampleMesh) -> Tensor:
        return mesh.sum((~flag).float()) == 0

    def moved(self) -> None:
        """The root stays gathered between its forward and its backward: what it gathered must not outlive a move."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def wrapping_of(model: nn.Module) -> Wrapping:
    """How to evaluate a model.

    Raises:
        ValueError: something stands around DDP, or it is a wrapper that the step does not know.
    """
    if isinstance(model, DistributedDataParallel):
        return Replicated(model)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"the model is a {type(model).__name__} around DistributedDataParallel, so DDP's reduction cannot be "
            "steered by the step: put it inside, as in DistributedDataParallel(torch.compile(model)), and pass that"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel keeps parameters in flat buffers that the step cannot move: use its successor, "
            "torch.distributed.fsdp.fully_shard(model)"
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return Sharded(model)
    return Wrapping(model)


def _piece(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    piece: Tensor = DTensor.to_local(tensor.detach())  # type: ignore[arg-type]
    return piece


def _check_policies(name: str, module: FSDPModule) -> None:
    state = module._get_fsdp_state()
    where = f"fully_shard of {name!r}" if name else "fully_shard of the model"
    dtype = state._mp_policy.param_dtype
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"{where}: MixedPrecisionPolicy(param_dtype={dtype}) rounds the parameters before each forward, "
            "and with them the perturbation: leave param_dtype out and use torch.autocast in the closure"
        )
