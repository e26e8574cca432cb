"""Three small networks whose dense Hessian is known, for the tests of `phisam.sharpness`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor, nn

from phisam import reference, sharpness

NETWORKS = ["tanh", "relu", "batchnorm"]


def network(name: str) -> nn.Module:
    """float32, in training mode, 2 x 6 units; BatchNorm's running statistics are not those of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        act = nn.Tanh() if name == "tanh" else nn.ReLU()
        norm = [nn.BatchNorm1d(6)] if name == "batchnorm" else []
        model = nn.Sequential(nn.Linear(4, 6), *norm, act, nn.Linear(6, 6), act, nn.Linear(6, 3))
        for _ in range(3):
            model(torch.randn(20, 4))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    """30 examples in three batches of unlike sizes."""
    generator = Generator().manual_seed(12)
    inputs = torch.randn(30, 4, generator=generator)
    targets = torch.randint(0, 3, (30,), generator=generator)
    return list(zip(inputs.split([8, 15, 7]), targets.split([8, 15, 7]), strict=True))


def hessian(name: str, **settings: object) -> sharpness.Hessian:
    return sharpness.Hessian(network(name), nn.CrossEntropyLoss(), batches(), **settings)  # type: ignore[arg-type]


@cache
def dense(name: str) -> Tensor:
    """The Hessian of the mean over all examples, float64, by `reference.hessian`: no line of phisam.sharpness."""
    model = network(name).double().eval()
    inputs = torch.cat([batch[0] for batch in batches()]).double()
    targets = torch.cat([batch[1] for batch in batches()])
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def L(x: Tensor) -> Tensor:
        parts = torch.split(x, [shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, state, (inputs,)), targets)

    return reference.hessian(L, torch.cat([p.reshape(-1) for p in model.parameters()]))
