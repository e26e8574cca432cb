"""H, as a matrix that is known through its products only: the adapter over curvlinops.

    L(x) = sum_b n_b / N criterion(model(inputs_b), targets_b)          N examples, n_b of them in batch b
    H V  = sum_b n_b / N H_b V                                           V (d, k): k columns share each forward pass

curvlinops does the products; everything it lacks is here: wrappers are taken off, the mode is evaluation, numbers are
float64 unless asked otherwise, ranks share the work, columns are taken in chunks (which bounds the memory), and what
cannot be measured is refused in words.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from phisam.sharpness.ranks import Ranks
from phisam.sharpness.refusals import Unmeasurable, explained

Inputs = Any  # a tensor, or a mapping of names to tensors
Batch = tuple[Inputs, Tensor]
Criterion = Callable[..., Tensor]
Share = Literal["auto", "probes", "data"]
Progress = Callable[[int, int], None]

DENSE_LIMIT = 5000


class Curvature:
    """A symmetric (d, d) matrix of a model's loss. Use `Hessian` or `GGN`.

    The model is copied when this is made, in `dtype` and in evaluation mode: BatchNorm uses its running statistics,
    dropout is off, the caller's model is untouched, and the matrix stays that of the moment. DDP's and torch.compile's
    wrappers are taken off: through DDP a product would silently be that of one rank's examples.

    Args:
        model: its parameters with requires_grad are x, in the order of `model.parameters()`.
        criterion: criterion(outputs, targets) -> the mean loss of its batch, a scalar tensor.
        batches: (inputs, targets); inputs are a tensor or a mapping of tensors, the first dimension counts examples.
            The same on every rank. They stay where and what they are, and are cast and moved when they are used.
        dtype: of the model and its products. In float32 a product near zero loss is 6e-4 off.
        chunk: columns of one product that share their forward passes. Time per column falls with it, memory rises.
        group: the ranks that measure together; every call that measures is then collective. None: this process alone.
        share: what ranks divide. "probes": random vectors. "data": batches, whole ones. "auto": whichever suits the
            estimator: probes where they are independent, data for eigenvalues and Lanczos.

    Raises:
        ValueError: there is no batch, no trained parameter, or the criterion's reduction is not a mean.
        Unmeasurable: two forward passes differ, ranks hold different models or batches, or parameters are sharded.
        ImportError: curvlinops is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        batches: Iterable[Batch],
        *,
        dtype: torch.dtype = torch.float64,
        chunk: int = 25,
        group: dist.ProcessGroup | None = None,
        share: Share = "auto",
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be an integer >= 1, got {chunk!r}")
        if share not in ("auto", "probes", "data"):
            raise ValueError(f'share must be "auto", "probes" or "data", got {share!r}')
        self.dtype = dtype
        self.chunk = chunk
        self.share = share
        self._curvlinops = _curvlinops()
        self._network = _Network(_copied(model, dtype), dtype)
        self._criterion = _Criterion(criterion, dtype)
        named = [(name, p) for name, p in self._network.model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the model has no parameter with requires_grad: there is nothing to differentiate by")
        self.names = tuple(name for name, _ in named)
        self._parameters = [p for _, p in named]
        self.shapes = tuple(p.shape for p in self._parameters)
        self.d = sum(p.numel() for p in self._parameters)
        self.device = self._parameters[0].device
        self.peers = Ranks(group)
        self._batches: Sequence[Batch] = list(batches)
        if not self._batches:
            raise ValueError("there is no batch to measure on")
        self.n_examples = sum(n_examples(inputs) for inputs, _ in self._batches)
        self._check_ranks()
        self._check_deterministic()
        self._whole = self._operator(self._batches)
        own = self._batches[self.peers.rank :: self.peers.size]
        self._own = self._operator(own) if own else None

    @property
    def rank(self) -> int:
        """This process's rank in the group; 0 without one."""
        return self.peers.rank

    @property
    def ranks(self) -> int:
        """How many processes measure together."""
        return self.peers.size

    def matvec(self, V: Tensor) -> Tensor:
        """H V for V (d, k) or (d,), by this process alone and on all batches; dtype and device as V has them.

        Raises:
            ValueError: V has other than d rows.
            Unmeasurable: an operation of the model has no second derivative.
        """
        return self._product(self._whole, V)

    def shared_matvec(self, V: Tensor) -> Tensor:
        """`matvec` with the batches dealt to the ranks: one all-reduce of d k numbers. Collective, with one V."""
        if self.peers.size == 1:
            return self.matvec(V)
        partial = torch.zeros_like(V) if self._own is None else self._product(self._own, V)
        return self.peers.sum(partial)

    def dense(self) -> Tensor:
        """H, (d, d), by d products.

        Raises:
            ValueError: d is beyond 5000.
        """
        if self.d > DENSE_LIMIT:
            raise ValueError(f"the dense matrix of {self.d} parameters is refused, beyond {DENSE_LIMIT}: use matvec")
        return self.matvec(torch.eye(self.d, dtype=self.dtype, device=self.device))

    def loss(self) -> float:
        """L(x), on all batches, by this process alone."""
        with torch.no_grad():
            return sum(float(self._batch_loss(batch)) for batch in self._batches)

    def gradient(self) -> Tensor:
        """grad L(x), (d,), on all batches, by this process alone."""
        total = torch.zeros(self.d, dtype=self.dtype, device=self.device)
        for batch in self._batches:
            total += self._flat_gradient(self._batch_loss(batch))
        return total

    def squared_gradients(self, examples: int) -> Tensor:
        """sum_k (grad L_k)^2, (d,), over the first `examples` examples, each on its own: the Fisher information's."""
        total = torch.zeros(self.d, dtype=self.dtype, device=self.device)
        for inputs, targets in self._singles(examples):
            total += self._flat_gradient(self._criterion(self._network(inputs), targets)).square()
        return total

    def parameters(self) -> Tensor:
        """x, (d,): a copy of the parameters as they were when this was made."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A vector (d,) as one tensor for each parameter name."""
        parts = torch.split(v, [shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def _operator(self, batches: Sequence[Batch]) -> Any:
        raise NotImplementedError

    def _product(self, operator: Any, V: Tensor) -> Tensor:
        if V.ndim not in (1, 2) or len(V) != self.d:
            raise ValueError(f"expected (d,) or (d, k) with d = {self.d}, got {tuple(V.shape)}")
        columns = V.reshape(self.d, -1)
        product = torch.empty_like(columns)
        for start in range(0, columns.shape[1], self.chunk):
            part = columns[:, start : start + self.chunk].to(self.device, self.dtype)
            try:
                product[:, start : start + self.chunk] = operator @ part
            except (RuntimeError, NotImplementedError) as error:
                raise explained(error) from error
        return product.reshape(V.shape)

    def _batch_loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        loss: Tensor = self._criterion(self._network(inputs), targets)
        return loss * (n_examples(inputs) / self.n_examples)

    def _flat_gradient(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients])

    def _singles(self, count: int) -> Iterable[Batch]:
        for inputs, targets in self._batches:
            for k in range(min(n_examples(inputs), count)):
                one = slice(k, k + 1)
                yield sliced(inputs, one), targets[one]
            count -= min(n_examples(inputs), count)

    def _check_ranks(self) -> None:
        sums = [self.parameters().double().sum()]
        for inputs, targets in self._batches:
            tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
            sums += [tensor.double().sum().to(self.device) for tensor in [*tensors, targets]]
        counts = torch.tensor([self.d, self.n_examples, len(self._batches)], dtype=torch.float64, device=self.device)
        # One number for all batches, whose count may differ between ranks.
        mixed = torch.stack([total * (i + 1) for i, total in enumerate(sums[1:])]).sum()
        if not self.peers.equal(torch.cat([counts, torch.stack([sums[0], mixed])])):
            raise Unmeasurable(
                "the ranks hold different models or different batches: give each of them the same model and the same "
                "list of batches, and the work is divided here (a data loader's shard of each rank will not do)"
            )

    def _check_deterministic(self) -> None:
        with torch.no_grad():
            first, second = (float(self._batch_loss(self._batches[0])) for _ in range(2))
        # Sums on a GPU may come in any order, dropout and noise are far beyond this.
        tolerance = 1e3 * torch.finfo(self.dtype).eps * abs(first)
        same = first == second or abs(first - second) <= tolerance or (first != first and second != second)
        if not self.peers.all(same, self.device):
            raise Unmeasurable(
                f"two forward passes on one batch gave the losses {first!r} and {second!r}: the model is random in "
                "evaluation mode too (a dropout with training=True, noise that is drawn in forward), so there is no "
                "one Hessian: switch that off for the measurement"
            )


class Hessian(Curvature):
    """H = second derivatives of L at x. Arguments as `Curvature` has them."""

    def _operator(self, batches: Sequence[Batch]) -> Any:
        return self._curvlinops.HessianLinearOperator(
            self._network, self._criterion, self._parameters, batches, **_unchecked(self.n_examples)
        )


class GGN(Curvature):
    """G = sum_b n_b / N J_b^T (d^2 criterion / d outputs^2) J_b, the generalised Gauss-Newton matrix of L at x.

    It is H without the curvature of the network itself, and has no negative eigenvalue where the criterion is convex in
    the outputs. Arguments as `Curvature` has them.
    """

    def _operator(self, batches: Sequence[Batch]) -> Any:
        return self._curvlinops.GGNLinearOperator(
            self._network, self._criterion, self._parameters, batches, **_unchecked(self.n_examples)
        )

    def jacobian(self, batches: Sequence[Batch]) -> Any:
        """d outputs / d x of these batches, (examples x outputs, d), as an operator of curvlinops."""
        return self._curvlinops.JacobianLinearOperator(
            self._network, self._parameters, batches, **_unchecked(sum(n_examples(inputs) for inputs, _ in batches))
        )

    def outputs(self, inputs: Inputs) -> Tensor:
        """The network's outputs, without a graph."""
        with torch.no_grad():
            outputs: Tensor = self._network(inputs)
        return outputs

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""
        loss: Tensor = self._criterion(outputs, targets.to(self.device))
        return loss

    @property
    def batches(self) -> Sequence[Batch]:
        """What it is measured on."""
        return self._batches


class _Network(nn.Module):
    """The model, for inputs of any floating dtype and on any device."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        self._device = next(model.parameters()).device

    def forward(self, inputs: Inputs) -> Any:
        return self.model(_mapped(inputs, lambda tensor: _cast(tensor, self._dtype).to(self._device)))


class _Criterion(nn.Module):
    """The criterion as curvlinops wants it: a module that says how it reduces."""

    reduction = "mean"

    def __init__(self, criterion: Criterion, dtype: torch.dtype) -> None:
        super().__init__()
        reduction = getattr(criterion, "reduction", "mean")
        if reduction != "mean":
            raise ValueError(
                f'the criterion must return the mean loss of its batch, but its reduction is "{reduction}"'
            )
        self._criterion = copy.deepcopy(criterion).to(dtype) if isinstance(criterion, nn.Module) else criterion
        self._dtype = dtype

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        device = outputs.device if isinstance(outputs, Tensor) else targets.device
        loss = self._criterion(outputs, _cast(targets, self._dtype).to(device))
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the criterion must return the mean loss of its batch, a scalar tensor, but got {shape}")
        return loss


def n_examples(inputs: Inputs) -> int:
    """Examples of a batch."""
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def sliced(inputs: Inputs, part: slice) -> Inputs:
    """Some examples of a batch."""
    return _mapped(inputs, lambda tensor: tensor[part])


def _unchecked(num_data: int) -> dict[str, Any]:
    """curvlinops' own checks cost products, print, and find less than those above."""
    return {"check_deterministic": False, "num_data": num_data, "batch_size_fn": n_examples}


def _mapped(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return function(inputs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy without wrappers, in `dtype` and in evaluation mode."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    sharded = isinstance(model, FullyShardedDataParallel) or any(isinstance(p, DTensor) for p in model.parameters())
    if sharded:
        raise Unmeasurable(
            "the model's parameters are sharded over the ranks: load its full state_dict into a plain model and "
            "measure that"
        )
    if not any(True for _ in model.parameters()):
        raise ValueError("the model has no parameter")
    return copy.deepcopy(model).to(dtype).eval()


def _curvlinops() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # curvlinops' imports, and torch itself before its first jvp, call torch.jit.script, which is deprecated.
            warnings.simplefilter("ignore")
            import curvlinops

            torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
    except ImportError as error:
        raise ImportError(
            f"measuring sharpness needs curvlinops ({error}); install it with: pip install 'phisam[sharpness]'"
        ) from error
    module: ModuleType = curvlinops
    return module
