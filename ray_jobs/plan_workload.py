"""What one evaluation, a forward and a backward pass, costs: in operations, seconds and saved activations.

    traced(model, ...)       every operation of both passes, as the network does them on torch's meta device: no weight
                             and no image is made
    described(d, flops)      a network that is only known by its numbers
    .timed(...)              the same with measured seconds

A traced operation takes the longer of its arithmetic, FLOPs / (peak x utilisation), and its traffic, bytes read and
written / memory bandwidth: convolutions are bound by the one, BatchNorm by the other. The host launches each of them,
which is what a small batch is bound by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ray_jobs import own_data
from ray_jobs.config import DataConfig, ModelConfig
from ray_jobs.models import make_model
from ray_jobs.plan_hardware import Hardware
from ray_jobs.section import is_own

ITEM_BYTES = {"float32": 4, "float64": 8, "bf16": 2, "fp16": 2}
"""Of a number as the evaluation computes with it."""

SHAPES = {
    "digits": ((1, 8, 8), 10),
    "mnist5k": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}
IMAGEFOLDER_CLASSES = 1000  # where the folder is not at hand: ImageNet's

DESCRIBED_TENSORS = 300  # a transformer of 24 layers has about as many
_TRACED = (2, 4)  # examples: everything that a network does is linear in them


@dataclass(frozen=True)
class Operation:
    """FLOPs, and numbers read and written, of one operation on B examples: at_0 + B * each."""

    flops_at_0: float
    flops_each: float
    numbers_at_0: float
    numbers_each: float


@dataclass(frozen=True)
class Workload:
    """A network and its loss.

    parameters: d. tensors: of parameters. saved: numbers that the forward keeps for the backward, (at_0, each) in
    examples; None if not known. seconds_each: measured, of an evaluation of one example, with seconds_at_0 beside.
    """

    parameters: int
    tensors: int
    operations: tuple[Operation, ...]
    saved: tuple[float, float] | None
    seconds_each: float | None = None
    seconds_at_0: float = 0.0

    @property
    def flops_each(self) -> float:
        """FLOPs of an evaluation of one example more."""
        return sum(operation.flops_each for operation in self.operations)

    def timed(self, seconds_each: float, seconds_at_0: float = 0.0) -> Workload:
        """The same, with the time of an evaluation of B examples measured: seconds_at_0 + B seconds_each."""
        return replace(self, seconds_each=seconds_each, seconds_at_0=seconds_at_0)

    def device_seconds(self, examples: float, hardware: Hardware, precision: str) -> float:
        """Of a forward and a backward pass; as measured, if it was."""
        if self.seconds_each is not None:
            return self.seconds_at_0 + examples * self.seconds_each
        peak = hardware.flops[precision] * hardware.utilisation
        bandwidth = hardware.memory_bandwidth / ITEM_BYTES[precision]
        return sum(
            max(
                (each.flops_at_0 + examples * each.flops_each) / peak,
                (each.numbers_at_0 + examples * each.numbers_each) / bandwidth,
            )
            for each in self.operations
        )

    def host_seconds(self, hardware: Hardware) -> float:
        """Of launching a forward and a backward pass; part of the measured ones."""
        return 0.0 if self.seconds_each is not None else len(self.operations) * hardware.seconds_per_operation

    def saved_bytes(self, examples: float, precision: str) -> float | None:
        """Activations; None if not known."""
        if self.saved is None:
            return None
        return (self.saved[0] + examples * self.saved[1]) * ITEM_BYTES[precision]


def described(parameters: int, flops_each: float, saved_each: float | None = None) -> Workload:
    """flops_each: of a forward and a backward pass of one example, for a transformer 6 d times the tokens. saved_each:
    numbers that the backward needs of an example.
    """
    saved = None if saved_each is None else (0.0, saved_each)
    return Workload(parameters, DESCRIBED_TENSORS, (Operation(0, flops_each, 0, 0),), saved)


def configured(model: ModelConfig, data: DataConfig, seed: int = 0) -> tuple[Workload, str]:
    """The network of a run description on images of its data set's shape, and what had to be assumed, "" if nothing.

    No data is read, but the class folders of an imagefolder are counted, and a user's own function is called.
    """
    assumed = ""
    if data.name == "imagefolder":
        assert data.image_size is not None, "config.py requires it"
        assert data.root is not None, "config.py requires it"
        folder = data.root / "train"
        classes = sum(each.is_dir() for each in folder.iterdir()) if folder.is_dir() else 0
        if not classes:
            classes, assumed = IMAGEFOLDER_CLASSES, f"{IMAGEFOLDER_CLASSES} classes assumed: {folder} is not here"
        shape = (3, data.image_size, data.image_size)
    elif is_own(data.name):
        own = own_data.sizes(data.model_dump_json(), seed)
        shape, classes = own.input_shape, own.num_classes
    else:
        shape, classes = SHAPES[data.name]
    with torch.device("meta"):
        network = make_model(model, shape, classes, seed=0)
    return traced(network, shape), assumed


def traced(model: nn.Module, shape: tuple[int, ...]) -> Workload:
    """A classifier on the meta device, in training mode, under cross-entropy."""
    low, high = (_trace(model, shape, examples) for examples in _TRACED)
    span = _TRACED[1] - _TRACED[0]

    def line(at_low: float, at_high: float) -> tuple[float, float]:
        each = (at_high - at_low) / span
        return at_low - _TRACED[0] * each, each

    assert len(low.operations) == len(high.operations), "the number of operations depends on the batch"
    operations = tuple(
        Operation(*line(a[0], b[0]), *line(a[1], b[1])) for a, b in zip(low.operations, high.operations, strict=True)
    )
    sizes = [p.numel() for p in model.parameters()]
    return Workload(sum(sizes), len(sizes), operations, line(low.saved, high.saved))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """(FLOPs, numbers read and written) of every operation that is not a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[float, float]] = []
        self.saved = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if read and not func.is_view:
            counter = flop_registry.get(func.overloadpacket)
            flops = float(counter(*args, **kwargs, out_val=out)) if counter else 0.0
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.operations.append((flops, float(sum(t.numel() for t in (*read, *written)))))
        return out


def _trace(model: nn.Module, shape: tuple[int, ...], examples: int) -> _Recorder:
    images = torch.empty(examples, *shape, device="meta")
    labels = torch.zeros(examples, dtype=torch.long, device="meta")
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; the tensors are held, so that no storage is counted under another's name

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    recorder = _Recorder()
    with recorder:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
    for p in model.parameters():
        p.grad = None
    recorder.saved = sum(
        t.untyped_storage().nbytes() / t.element_size() for storage, t in kept.items() if storage not in parameters
    )
    return recorder
