"""What a run description becomes on a worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import phisam
from ray_jobs import config, worker


def optimizer_config(**settings: Any) -> config.OptimizerConfig:
    return config.OptimizerConfig.model_validate({"measure": "trace", **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"measure": "trace"}, phisam.trace()),
        ({"measure": "frobenius", "n_samples": 3}, phisam.frobenius()),
        ({"measure": {"name": "frobenius", "unbiased": False}}, phisam.frobenius(unbiased=False)),
        ({"measure": "determinant"}, phisam.determinant()),
        ({"measure": "log_determinant"}, phisam.log_determinant()),
        ({"measure": {"name": "exp_product", "sigma": 0.2}}, phisam.exp_product(0.2)),
        ({"measure": {"name": "eigen_power", "k": 3}}, phisam.eigen_power(3)),
    ],
)
def test_measures_by_name_weigh_as_the_librarys(settings: dict[str, Any], expected: phisam.Measure) -> None:
    measure = worker.make_measure(optimizer_config(**settings))
    losses = torch.tensor([1.0, 1.5, 0.7, 1.1], dtype=torch.float64)
    assert torch.equal(measure.weights(losses, 0.5, 0.3), expected.weights(losses, 0.5, 0.3))
    assert repr(measure) == repr(expected)


def test_sgd_has_no_points() -> None:
    assert worker.make_measure(optimizer_config(measure="sgd")).n_points(5) == 0


@pytest.mark.parametrize("noise", ["gaussian", "sphere", "rademacher", {"name": "hypercube", "half_width": 0.5}])
def test_noises_by_name(noise: Any) -> None:
    measure = worker.make_measure(optimizer_config(noise=noise))
    assert measure.noises[0].name == (noise if isinstance(noise, str) else "hypercube")


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ({"name": "sgd", "lr": 0.2, "nesterov": True}, torch.optim.SGD),
        ({"name": "adam", "betas": [0.8, 0.9]}, torch.optim.Adam),
        ({"name": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
    ],
)
def test_base_optimizers_by_name(base: dict[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    optimizer = worker.make_base_optimizer(optimizer_config(base=base), nn.Linear(2, 2), fused=False)
    assert type(optimizer) is kind
    for key, value in base.items():
        if key != "name":
            assert optimizer.defaults[key] == (tuple(value) if isinstance(value, list) else value)


def factors(schedule: Any, epochs: int = 4, steps: int = 5) -> list[float]:
    run = {"name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "optimizer": {"measure": "sgd"}}
    loaded = config.RunConfig.model_validate({**run, "training": {"epochs": epochs}, "schedule": schedule})
    return [
        worker.learning_rate_factor(loaded.schedule, epoch, step, steps, epochs)
        for epoch in range(epochs)
        for step in range(steps)
    ]


def test_learning_rate_schedules() -> None:
    assert factors("constant") == [1.0] * 20
    assert factors({"name": "step", "every": 2, "gamma": 0.25}) == [1.0] * 10 + [0.25] * 10
    assert factors({"name": "multistep", "milestones": [1, 3], "gamma": 0.1})[::5] == pytest.approx([1, 0.1, 0.1, 0.01])
    model = nn.Linear(1, 1)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=20, eta_min=0.2)
    for factor in factors({"name": "cosine", "min_factor": 0.2}):
        assert factor == pytest.approx(base.param_groups[0]["lr"])
        base.step()
        scheduler.step()


def test_warmup_is_linear_over_steps_and_ends_at_lr() -> None:
    warm = factors({"name": "cosine", "warmup_epochs": 2})
    assert warm[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert warm[10] == 1.0
