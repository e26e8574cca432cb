"""The steps that are compared, each around torch.optim.SGD with momentum.

    SGD             the measure of all: one process, the whole batch
    DDP-SGD         several workers, each with a whole batch of its own: one evaluation and one all-reduce
    trace n = 1, frobenius n = 2, ..., sam          PhiSAM
    trace n=1, lam=1                                one process: w_0 = 0, and x has no backward
    naive n = 2     what one writes without PhiSAM: each point through DDP, so n + 1 all-reduces and n + 1 gradients
    pytorch_optimizer's SAM                         one process

A method is built on a model of its own and is then a function of the whole batch, of which it takes its rank's share.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phisam
from ray_jobs.bench import workloads
from ray_jobs.optimizer_config import OwnMeasure
from ray_jobs.section import is_own
from ray_jobs.user_code import own_measure

RHO, LAM, SEED = 0.01, 1e-4, 0  # small: 1,000 steps on one batch stay finite
LEARNING_RATE = 1e-4

Step = Callable[[Tensor, Tensor], object]
"""step(images, labels), of the whole batch."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    evaluations: forward-and-backward passes over the whole batch, summed over the workers.
    limit: evaluations / workers: what a step would cost, in SGD steps, if evaluations were all and nobody waited.
    data_size: each rank gets 1 / data_size of the batch.
    alone: one process takes the step while the others wait; the model is not wrapped.
    """

    name: str
    kind: str
    n_samples: int
    evaluations: int
    limit: float
    data_size: int
    alone: bool
    build: Callable[[nn.Module], Step]


def methods(workers: int, n_samples: Sequence[int], measure: str | None = None) -> Iterator[Method]:
    """All rows for so many workers, SGD first. Collective where they are built."""
    yield Method("SGD", "sgd", 0, 1, 1.0, 1, True, sgd)
    if workers > 1:
        yield Method("DDP-SGD", "ddp-sgd", 0, workers, 1.0, 1, False, ddp_sgd)
    sharpness = {n: named_measure(measure or ("trace" if n == 1 else "frobenius"), n) for n in n_samples}
    for n, chosen in sharpness.items():
        yield phisam_method(f"{chosen.name} n = {n}", chosen, n, workers)
        if workers == 1 and chosen.weight_at_x(1.0) == 0:  # the paper's lam; the row above is what any other costs
            yield phisam_method(f"{chosen.name} n={n}, lam=1", chosen, n, workers, lam=1.0, kind="lam = 1")
    yield phisam_method("sam", phisam.sam(), 1, workers, lam=1.0)
    if workers > 1:
        for n, chosen in sharpness.items():
            points = chosen.n_points(n) + 1
            build = Naive(chosen, n)
            yield Method(f"naive n = {n}", "naive", n, points, points / workers, workers, False, build)
    elif importlib.util.find_spec("pytorch_optimizer"):
        yield Method("pytorch_optimizer SAM", "pytorch_optimizer", 1, 2, 2.0, 1, False, pytorch_optimizer_sam)


def named_measure(name: str, n: int) -> phisam.Measure:
    """A measure by the name of its function, ours or a user's, with its default settings."""
    if is_own(name):
        return own_measure(OwnMeasure(name=name), n)
    measure: phisam.Measure = getattr(phisam, name)()
    return measure


def phisam_method(
    name: str, measure: phisam.Measure, n: int, workers: int, lam: float = LAM, kind: str = "phisam"
) -> Method:
    """PhiSAM over the mesh that `sample_mesh` chooses."""
    evaluations = sum(measure.evaluations(n))
    data_size = workers // phisam.sample_size(workers, n, measure=measure)

    def build(model: nn.Module) -> Step:
        mesh = phisam.sample_mesh(n, measure=measure)
        wrapped = data_parallel(model)
        base = base_optimizer(model)
        opt = phisam.PhiSAM(wrapped, base, measure, rho=RHO, lam=lam, n_samples=n, seed=SEED, mesh=mesh)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            x, y = share(images, mesh), share(labels, mesh)
            return opt.step(lambda: workloads.loss_of(wrapped, x, y))

        return step

    return Method(name, kind, n, evaluations, evaluations / workers, data_size, False, build)


def share(tensor: Tensor, mesh: phisam.SampleMesh) -> Tensor:
    """This data rank's part of the batch."""
    return tensor.chunk(mesh.data_size)[mesh.data_rank]


def data_parallel(model: nn.Module) -> nn.Module:
    """DDP as the service's worker sets it up, if there are several workers.

    Only the broadcast of x at the beginning is left out: all ranks make the same model, and gloo's thread may be the
    last to let go of the copy that was sent, which nobody sees end: it then counts as memory (d) of every step.
    """
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has another name for broadcast_buffers
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False, init_sync=False)


def base_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), **base_settings(model))


def base_settings(model: nn.Module) -> dict[str, Any]:
    """Fused on CUDA, as in the service's worker."""
    return {"lr": LEARNING_RATE, "momentum": 0.9, "fused": next(model.parameters()).is_cuda}


def ddp_sgd(model: nn.Module) -> Step:
    """The same through DDP."""
    return sgd(data_parallel(model))


def sgd(model: nn.Module) -> Step:
    """zero_grad, forward, backward, step."""
    optimizer = base_optimizer(model)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = workloads.loss_of(model, images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def pytorch_optimizer_sam(model: nn.Module) -> Step:
    """SAM of the package pytorch_optimizer, used as its documentation shows."""
    from pytorch_optimizer import SAM

    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, **base_settings(model))

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = workloads.loss_of(model, images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.first_step(zero_grad=True)
        workloads.loss_of(model, images, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.second_step(zero_grad=True)
        return loss.detach()

    return step


@dataclass(frozen=True)
class Naive:
    """The loop over points around DDP: every gradient is reduced, and kept until the weights are known.

    It draws PhiSAM's noise and takes PhiSAM's weights, so that without BatchNorm both take the same step.
    """

    measure: phisam.Measure
    n_samples: int

    def __call__(self, model: nn.Module) -> Step:
        ddp = data_parallel(model)
        optimizer = base_optimizer(model)
        parameters = list(model.parameters())
        sizes = [p.numel() for p in parameters]
        v = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        generator = Generator(v.device)
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        steps = 0

        def step(images: Tensor, labels: Tensor) -> Tensor:
            """Every point through DDP, its gradient kept until the weights are known."""
            nonlocal steps
            images, labels = images.chunk(world_size)[rank], labels.chunk(world_size)[rank]
            x = [p.detach().clone() for p in parameters]
            losses, gradients = [], []
            for point in range(self.measure.n_points(self.n_samples) + 1):
                if point:
                    draw = self.measure.draw_of(point)
                    draw.noise.draw_(v, generator, SEED, steps, draw.point)
                    with torch.no_grad():
                        for p, start, part in zip(parameters, x, torch.split(v, sizes), strict=True):
                            torch.add(start, part.view_as(p), alpha=RHO, out=p)
                optimizer.zero_grad()
                loss = workloads.loss_of(ddp, images, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach().double())
                gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
            means = torch.stack(losses) / world_size
            if world_size > 1:
                dist.all_reduce(means)
            weights = self.measure.weights(means, RHO, LAM)
            with torch.no_grad():
                for i, p in enumerate(parameters):
                    p.copy_(x[i])
                    p.grad = sum(
                        (w.to(p.dtype) * g[i] for w, g in zip(weights, gradients, strict=True)), p.new_zeros(())
                    )
            optimizer.step()
            steps += 1
            return means[0]

        return step
