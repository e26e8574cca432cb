"""Slices of the loss: against losses written out by hand, against one process, and what they must not disturb."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from phisam.sharpness import landscape
from tests.phisam import gloo


def model_and_batches() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    for _ in range(5):
        model(torch.randn(16, 4, dtype=torch.float64) + 1)  # running statistics other than those of any batch below
    sizes = (8, 5)
    return model, [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_losses_are_those_of_the_moved_weights_in_eval_mode() -> None:
    model, batches = model_and_batches()
    u, w = landscape.random_directions(model, 2)
    points = [(0.0, 0.0), (0.5, -0.25), (-1.0, 2.0)]
    losses = landscape.slice_losses(model, cross_entropy, batches, [u, w], points)

    x = nn.utils.parameters_to_vector(model.parameters()).detach()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for point, loss in zip(points, losses, strict=True):
        nn.utils.vector_to_parameters(x + point[0] * u + point[1] * w, model.parameters())
        assert loss.item() == pytest.approx(cross_entropy(model.eval()(inputs), targets).item(), rel=1e-12)


def test_the_model_is_left_as_it_was_bit_for_bit_also_when_the_criterion_raises() -> None:
    model, batches = model_and_batches()
    model[0].eval()  # a module with a mode of its own
    before, modes = state(model), [module.training for module in model.modules()]
    gradients = torch.autograd.grad(cross_entropy(model(batches[0][0]), batches[0][1]), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    before = state(model)

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    (u,) = landscape.random_directions(model, 1)
    landscape.slice_losses(model, cross_entropy, batches, [u], [(0.1,), (1e300,)])
    with pytest.raises(RuntimeError, match="no loss today"):
        landscape.slice_losses(model, fails, batches, [u], [(0.1,)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


def test_a_forward_that_counts_in_a_buffer_starts_each_point_from_the_same_count() -> None:
    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1))
            self.register_buffer("count", torch.zeros(1))

        def forward(self, inputs: Tensor) -> Tensor:
            self.count += 1
            return self.x + self.count

    model = Counting()
    losses = landscape.slice_losses(
        model, lambda out, _: out.sum(), [(torch.zeros(1), torch.zeros(1))], [torch.ones(1)], [(0.0,), (1.0,)]
    )
    assert losses.tolist() == [1.0, 2.0]
    assert model.count.item() == 0


def test_each_filter_of_a_direction_has_the_norm_of_the_models_filter_and_biases_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    model[3].bias.requires_grad_(False)
    (u,) = landscape.random_directions(model, 1)
    sizes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    parts = dict(zip(sizes, u.split([shape.numel() for shape in sizes.values()]), strict=True))
    for name in ("0.weight", "3.weight"):
        own = model.get_parameter(name).detach().double().flatten(1).norm(dim=1)
        torch.testing.assert_close(parts[name].view(sizes[name]).flatten(1).norm(dim=1), own, rtol=1e-12, atol=0)
    assert not parts["0.bias"].any()
    assert not parts["1.weight"].any()
    assert "3.bias" not in parts


def test_directions_depend_on_seed_and_number_alone() -> None:
    model, _ = model_and_batches()
    first, second = landscape.random_directions(model, 2, seed=5)
    (alone,) = landscape.random_directions(model, 1, seed=5)
    (other,) = landscape.random_directions(model, 1, seed=6)
    assert torch.equal(first, alone)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_slice_of_a_relu_network_does_not_change_when_layers_are_rescaled() -> None:
    def network(scale: float) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        return model

    batch = [(torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))]
    points = landscape.line(landscape.grid(1.0, 5))
    one, other = (
        landscape.slice_losses(model, cross_entropy, batch, landscape.random_directions(model, 1), points)
        for model in (network(1.0), network(16.0))
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


def test_a_grid_is_symmetric_and_has_the_model_in_the_middle() -> None:
    axis = landscape.grid(0.7, 5)
    assert axis[2] == 0
    assert axis.tolist() == [-value for value in reversed(axis.tolist())]
    assert axis[-1] == 0.7
    assert landscape.plane(axis[:2], axis[2:])[1] == (axis[0], axis[3])
    with pytest.raises(ValueError, match="radius above 0"):
        landscape.grid(0.0, 5)


def test_known_points_are_not_evaluated_and_the_rest_is_told() -> None:
    model, batches = model_and_batches()
    (u,) = landscape.random_directions(model, 1)
    told: dict[int, float] = {}
    losses = landscape.slice_losses(
        model,
        cross_entropy,
        batches,
        [u],
        [(0.0,), (0.1,), (0.2,)],
        known={1: 42.0},
        on_point=told.__setitem__,
    )
    assert losses[1] == 42
    assert told == {0: losses[0].item(), 2: losses[2].item()}


def test_what_does_not_fit_is_refused() -> None:
    model, batches = model_and_batches()
    (u,) = landscape.random_directions(model, 1)
    with pytest.raises(ValueError, match=r"direction 0 has shape \(3,\)"):
        landscape.slice_losses(model, cross_entropy, batches, [torch.zeros(3)], [(0.0,)])
    with pytest.raises(ValueError, match="2 coordinates for 1 directions"):
        landscape.slice_losses(model, cross_entropy, batches, [u], [(0.0, 1.0)])
    with pytest.raises(ValueError, match="at least one example"):
        landscape.slice_losses(model, cross_entropy, [], [u], [(0.0,)])


def _on_rank(rank: int) -> list[int]:
    model, batches = model_and_batches()
    wrapped = nn.parallel.DistributedDataParallel(model)
    (u,) = landscape.random_directions(wrapped, 1)
    points, known = landscape.line(landscape.grid(1.0, 5)), {2: 7.0}
    evaluated: list[int] = []
    losses = landscape.slice_losses(
        wrapped,
        cross_entropy,
        batches,
        [u],
        points,
        known=known,
        group=dist.group.WORLD,
        on_point=lambda index, _: evaluated.append(index),
    )
    alone = landscape.slice_losses(model, cross_entropy, batches, [u], points, known=known)
    assert torch.equal(losses, alone)
    return evaluated


def test_points_are_dealt_to_ranks_and_come_out_as_in_one_process() -> None:
    assert gloo.run(3, _on_rank) == [[0, 4], [1], [3]]
