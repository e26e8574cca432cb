"""What a run description becomes on a worker."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import phisam
from phisam.noise import Scaling
from ray_jobs import config, worker
from ray_jobs.data import Batches, load_dataset, micro_batches
from ray_jobs.divergence import Guard
from ray_jobs.models import make_model
from ray_jobs.optimizer_config import NoiseConfig
from ray_jobs.saving import Saver, State
from tests.phisam import gloo
from tests.ray_jobs import loop


def run_config(**sections: Any) -> config.RunConfig:
    run = {"name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "optimizer": {"measure": "sgd"}}
    return config.RunConfig.model_validate({**run, "training": {"epochs": 4}, **sections})


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
        ({"measure": "sam"}, phisam.sam()),
        ({"measure": {"name": "asam", "eta": 0.5}}, phisam.asam(0.5)),
        ({"measure": {"name": "ssam"}}, phisam.ssam()),
    ],
)
def test_measures_by_name_weigh_as_the_librarys(settings: dict[str, Any], expected: phisam.Measure) -> None:
    measure = worker.make_measure(optimizer_config(**settings))
    losses = torch.tensor([1.0, 1.5, 0.7, 1.1], dtype=torch.float64)
    assert torch.equal(measure.weights(losses, 0.5, 0.3), expected.weights(losses, 0.5, 0.3))
    assert repr(measure) == repr(expected)


def test_sgd_has_no_points() -> None:
    assert worker.make_measure(optimizer_config(measure="sgd")).n_points(5) == 0


def test_asam_and_ssam_get_their_settings() -> None:
    asam = worker.make_measure(optimizer_config(measure={"name": "asam", "eta": 0.5, "scaled": "weight"}))
    assert asam.noises[0].scaling == Scaling(0.5, "weight")
    described = optimizer_config(measure={"name": "ssam", "sparsity": 0.9, "fisher_samples": 4})
    assert worker.make_measure(described, steps_per_epoch=35).noises[0].mask == phisam.fisher_mask(0.9, 4, 35)


def test_options_of_a_noise() -> None:
    def made(**options: Any) -> phisam.Noise:
        settings: NoiseConfig | None = optimizer_config(noise={"name": "gaussian", **options}).noise
        assert settings is not None
        return worker.make_noise(settings, steps_per_epoch=35)

    assert (made().paired, made().two_sided, made().scaling) == (False, False, None)
    both = made(antithetic=True, adaptive=0.0)
    assert (both.paired, both.two_sided, both.scaling) == (True, False, Scaling(0.0, "all"))
    both = made(symmetric=True, adaptive=0.5)
    assert (both.paired, both.two_sided, both.scaling) == (False, True, Scaling(0.5, "all"))
    assert made(adaptive=0.5, scaled="weight").scaling == Scaling(0.5, "weight")
    assert made(fisher_mask={"sparsity": 0.9}).mask == phisam.fisher_mask(0.9, 16, 35)


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
    """What each step of a run multiplies by."""
    described = run_config(training={"epochs": epochs}, schedule=schedule).schedule
    return [worker.scheduled(1.0, described, step, steps, epochs) for step in range(epochs * steps)]


def test_schedules() -> None:
    assert factors("constant") == [1.0] * 20
    assert worker.scheduled(0.3, None, 7, 5, 4) == 0.3
    assert factors({"name": "step", "every": 2, "gamma": 0.25}) == [1.0] * 10 + [0.25] * 10
    assert factors({"name": "multistep", "milestones": [1, 3], "gamma": 0.1})[::5] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert factors({"name": "linear", "min_factor": 0.2}) == pytest.approx([1 - 0.8 * i / 20 for i in range(20)])
    model = nn.Linear(1, 1)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=20, eta_min=0.2)
    for factor in factors({"name": "cosine", "min_factor": 0.2}):
        assert factor == pytest.approx(base.param_groups[0]["lr"])
        base.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_warmup_is_linear_over_steps_and_ends_at_the_value(name: str) -> None:
    warm = factors({"name": name, "warmup_epochs": 2})
    assert warm[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert warm[10] == 1.0
    assert warm[15] == pytest.approx(0.5)  # the decay fills what the warm-up left


def test_lr_rho_and_lam_follow_each_their_own_schedule() -> None:
    base = {"name": "sgd", "lr": 0.2}
    schedules = {
        "rho_schedule": {"name": "step", "every": 1, "gamma": 0.5},
        "lam_schedule": {"name": "constant", "warmup_epochs": 2},
    }
    described = run_config(
        optimizer={"measure": "trace", "base": base, "rho": 0.4, "lam": 0.8, **schedules}, schedule="linear"
    )
    model = nn.Linear(2, 1)
    optimizer = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=9.0), phisam.trace(), rho=9.0, lam=9.0)
    worker.follow_schedules(optimizer, described, epoch=1, step=1, steps_per_epoch=5)  # the seventh step of 20
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 14 / 20)
    assert optimizer.rho == pytest.approx(0.4 * 0.5)
    assert optimizer.lam == pytest.approx(0.8 * 7 / 10)
    assert worker._settings(optimizer)["strength"] == pytest.approx(0.8 * 7 / 10 * 0.2**2)


def described_step(n_samples: int = 2, **settings: Any) -> tuple[phisam.PhiSAM, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return phisam.PhiSAM(model, base, phisam.trace(), n_samples=n_samples, **settings), model


def test_averages_are_of_what_step_returns_and_of_the_steps_that_had_a_sharpness_term() -> None:
    """The measure sees L_0 of a part of the batch here, and R_rho every third step."""
    optimizer, model = described_step(rho=0.5, every=3, perturb_fraction=0.5)
    inputs = torch.randn(8, 3, dtype=torch.float64)
    averages = worker.Averages(torch.zeros(2, 2, dtype=torch.float64), 2)
    losses, sharpness = [], []
    for step in range(6):
        loss = optimizer.step(lambda part: model(part(inputs)).square().mean())
        averages.add(loss, optimizer.last_step)
        losses.append(float(loss))
        if step % 3 == 0:
            assert float(optimizer.last_step.losses[0]) != pytest.approx(losses[-1])
            sharpness.append(float(optimizer.last_step.sharpness))
    assert averages.means() == pytest.approx((sum(losses) / 6, sum(sharpness) / 2))


def test_averages_leave_out_what_is_not_finite() -> None:
    averages = worker.Averages(torch.zeros(2, 2, dtype=torch.float64), 2)
    for loss, sharpness in [(1.0, 4.0), (math.inf, math.nan), (3.0, math.inf)]:
        numbers = torch.tensor([loss, sharpness], dtype=torch.float64)
        losses = torch.stack([torch.zeros_like(numbers[1]), numbers[1], numbers[1]])  # trace's R_rho is the mean delta
        record = phisam.StepRecord(losses, torch.zeros(3), 1.0, phisam.trace())
        averages.add(numbers[0], record)
    assert averages.means() == (2.0, 4.0)
    nothing = worker.Averages(torch.zeros(2, 2, dtype=torch.float64), 2).means()
    assert all(math.isnan(mean) for mean in nothing)


def test_the_sharpness_term_of_sgd_is_zero() -> None:
    averages = worker.Averages(torch.zeros(2, 2, dtype=torch.float64), 0)
    model = nn.Linear(3, 2)
    optimizer = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), phisam.sgd())
    loss = optimizer.step(lambda: model(torch.ones(2, 3)).square().mean())
    averages.add(loss, optimizer.last_step)
    assert averages.means() == (float(loss), 0.0)


# What a run computes must not depend on how it is dealt over ranks and micro-batches.

DEALT = {
    "part": {"measure": "frobenius", "rho": 0.05, "lam": 0.01, "n_samples": 3, "perturb_fraction": 0.5},
    "ssam": {"measure": {"name": "ssam", "fisher_samples": 8}, "rho": 0.1},
    "asam": {"measure": "asam", "rho": 0.5, "every": 2, "perturb_fraction": 0.25},
    "pairs": {"measure": "trace", "noise": {"name": "gaussian", "symmetric": True}, "rho": 0.05, "max_grad_norm": 0.1},
}


def described_run(name: str, count: int) -> config.RunConfig:
    return run_config(
        model={"name": "mlp", "width": 8, "depth": 2},
        optimizer={"base": {"name": "sgd", "lr": 0.05}, "sample_parallel": 1, **DEALT[name]},
        training={"epochs": 4, "batch_size": 32, "precision": "float64", "micro_batches": count},
    )


def trained(rank: int) -> dict[str, Tensor]:
    """Parameters after six steps, as train_loop takes them, of each case with one micro-batch and with two."""
    results = {}
    dataset = load_dataset(config.DataConfig(name="digits", fraction=0.1), seed=0)
    for name in DEALT:
        for count in (1, 2):
            described = described_run(name, count)
            model = make_model(described.model, dataset.input_shape, 10, seed=0).double()
            ddp = DistributedDataParallel(model)
            batches = Batches(dataset.train, 32, 0, dataset.normalizer(torch.float64))
            optimizer = worker.make_optimizer(described, ddp, batches.steps_per_epoch)
            assert optimizer.mesh.sample_size == 1

            def loss_on(images: Tensor, labels: Tensor, part: Any, ddp: nn.Module = ddp) -> Tensor:
                return cross_entropy(ddp(part(images)), part(labels))

            for epoch in range(2):
                epochs_batches = batches.epoch(epoch, optimizer.mesh.data_rank, optimizer.mesh.data_size)
                for images, labels in list(epochs_batches)[:3]:
                    optimizer.step([partial(loss_on, *share) for share in micro_batches(images, labels, count)])
            results[f"{name}/{count}"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return results


def test_a_training_does_not_depend_on_data_ranks_nor_micro_batches() -> None:
    (alone,) = gloo.run(1, trained)
    first, second = gloo.run(2, trained)
    for case in first:
        expected = alone[f"{case.partition('/')[0]}/1"]
        torch.testing.assert_close(alone[case], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(first[case], expected, rtol=0, atol=1e-10)
        assert torch.equal(first[case], second[case])


def test_the_optimizer_gets_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "every": 3,
        "perturb_fraction": 0.25,
        "max_grad_norm": 0.7,
        "rho": 0.3,
        "lam": 0.6,
        "n_samples": 4,
        "scope": "shard",
    }
    described = run_config(optimizer={"measure": "trace", **settings}, training={"epochs": 1, "seed": 5})
    scaler = torch.amp.GradScaler("cpu")
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})  # stands for DDP where there is one process
    monkeypatch.setattr(phisam, "PhiSAM", lambda *_, **given: given)
    given: Any = worker.make_optimizer(described, cast(DistributedDataParallel, model), 10, scaler)
    assert given.pop("mesh") == phisam.SampleMesh()
    assert given == {**settings, "seed": 5, "grad_scaler": scaler}


def test_a_checkpoint_resumes_the_grad_scaler(tmp_path: Path) -> None:
    """fp16: without its state a resumed run would begin at another scale, and skip other steps."""

    def fresh() -> tuple[nn.Module, phisam.PhiSAM, torch.amp.GradScaler]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # so large that first steps overflow in fp16
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, phisam.PhiSAM(model, base, phisam.trace(), rho=0.1, grad_scaler=scaler), scaler

    def train(model: nn.Module, optimizer: phisam.PhiSAM, steps: int) -> None:
        def closure() -> Tensor:
            with torch.autocast("cpu", torch.float16):
                out = model(torch.ones(4, 3))
            return out.float().square().mean()

        for _ in range(steps):
            optimizer.step(closure)

    def state(model: nn.Module, optimizer: phisam.PhiSAM, scaler: torch.amp.GradScaler) -> State:
        return State(model, optimizer, scaler, Guard(config.DivergenceConfig(), optimizer, torch.device("cpu")))

    model, optimizer, scaler = fresh()
    train(model, optimizer, 30)
    assert scaler.get_scale() < 2.0**40
    nobody = SimpleNamespace(stop_asked=False)
    with loop.alone(), loop.on_ray([]):
        saver = Saver(config.CheckpointConfig(every_steps=30), tmp_path, state(model, optimizer, scaler), 40, nobody)
        course = saver.begin(None)
        course.step = 30
        assert not saver.after_step(course)
        train(model, optimizer, 10)

        again, other, its_scaler = fresh()
        saver._finish()
        saver = Saver(config.CheckpointConfig(), tmp_path, state(again, other, its_scaler), 40, nobody)
        assert saver.begin(None).step == 30
        train(again, other, 10)
    assert json.dumps(its_scaler.state_dict()) == json.dumps(scaler.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert other.skipped_steps == optimizer.skipped_steps > 0
