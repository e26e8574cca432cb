"""autograd.grad may hand out one tensor for two parameters, or an expanded one: rows must not write into either."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import phisam
from phisam import reference
from tests.phisam.cases import draws


class Sum(nn.Module):
    """Two parameters that enter as a + b: the backward of an addition gives both the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.1, 0.4], dtype=torch.float64))


def test_two_parameters_that_enter_as_a_sum() -> None:
    def L(x: Tensor) -> Tensor:
        return ((x[:2] + x[2:]) ** 4).sum()

    model = Sum()
    measure = phisam.trace().with_noise(phisam.gaussian())
    opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.0), measure, rho=0.1, lam=0.5, n_samples=3)
    opt.step(lambda: ((model.a + model.b) ** 4).sum())
    x = torch.cat([model.a, model.b]).detach()
    expected = reference.algorithm_1(L, x, draws(measure, 3, 4), 0.1, lambda t: t, lambda t: t, 0.5)
    assert model.a.grad is not None
    assert model.b.grad is not None
    torch.testing.assert_close(torch.cat([model.a.grad, model.b.grad]), expected, rtol=1e-12, atol=1e-12)
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()


def test_a_parameter_with_an_expanded_gradient() -> None:
    """The gradient of x.sum() is one number with stride 0."""
    model = Sum()
    opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.0), phisam.trace(), lam=0.5)
    opt.step(lambda: model.a.sum() - model.b.sum())
    assert model.a.grad is not None
    assert model.b.grad is not None
    torch.testing.assert_close(torch.cat([model.a.grad, model.b.grad]).tolist(), [1.0, 1.0, -1.0, -1.0])
