"""What must hold around a step in one process: exactness, restoration, resumption, and words for mistakes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import phisam

MEASURES: dict[str, Callable[[], phisam.Measure]] = {
    "trace": phisam.trace,
    "frobenius": phisam.frobenius,
    "determinant": phisam.determinant,
    "log_determinant": phisam.log_determinant,
    "exp_product": lambda: phisam.exp_product(sigma=0.1),
    "eigen_power": lambda: phisam.eigen_power(2),
    "sgd": phisam.sgd,
}

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "fused_adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
}


class Counting(nn.Module):
    """A custom buffer that depends on the data, one that is replaced instead of written to, and dropout."""

    calls: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.sums += x.detach().sum(0)
        return x


def make_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), Counting(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
    )


def examples(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    x, y = examples()
    return lambda: nn.functional.cross_entropy(model(x), y)


def make(
    measure: phisam.Measure, base: str = "sgd", model: nn.Module | None = None, **kwargs: Any
) -> tuple[nn.Module, phisam.PhiSAM]:
    model = model if model is not None else make_model()
    return model, phisam.PhiSAM(model, BASES[base](model.parameters()), measure, **{"n_samples": 3, **kwargs})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bit_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MEASURES)
def test_lam_0_is_the_base_optimizer_bit_for_bit(name: str, base: str) -> None:
    model, opt = make(MEASURES[name](), base, lam=0.0)
    plain = make_model()
    plain_opt = BASES[base](plain.parameters())
    for _ in range(5):
        opt.step(closure_of(model))
        plain_opt.zero_grad()
        closure_of(plain)().backward()
        plain_opt.step()
    assert_bit_equal(state(model), state(plain))


@pytest.mark.parametrize(
    ("measure", "lam", "micro_batches", "backwards"),
    [
        (phisam.trace(), 1.0, 1, 3),
        (phisam.trace(), 1.0, 2, 6),
        (phisam.trace(), 0.5, 1, 4),
        (phisam.frobenius(), 1.0, 1, 4),
        (phisam.sam(), 1.0, 1, 2),  # its direction is the gradient at x
    ],
)
def test_x_has_no_backward_where_its_weight_is_known_to_be_0(
    measure: phisam.Measure, lam: float, micro_batches: int, backwards: int
) -> None:
    model = nn.Linear(4, 3)
    seen: list[int] = []

    def closure() -> Tensor:
        outputs = model(examples()[0])
        outputs.register_hook(lambda _: seen.append(1))
        return outputs.square().mean()

    opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), measure, lam=lam, n_samples=3)
    opt.step([closure] * micro_batches)
    assert len(seen) == backwards


@pytest.mark.parametrize("name", MEASURES)
def test_only_point_0_changes_buffers(name: str) -> None:
    model, opt = make(MEASURES[name]())
    plain = make_model()
    closure_of(plain)()
    opt.step(closure_of(model))
    for (key, buffer), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), key


def test_every_point_starts_from_the_same_buffers_and_dropout_masks() -> None:
    """With v = 0 all points are the same computation, so any difference of losses would come from elsewhere."""

    class DependsOnBuffer(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.calls)

    model = make_model(dropout=0.5)
    model[2] = DependsOnBuffer()
    d = sum(p.numel() for p in model.parameters())
    _, opt = make(phisam.trace(), model=model, noise=phisam.dirac(torch.zeros(d)))
    opt.step(closure_of(model))
    losses = opt.last_step.losses
    assert torch.equal(losses, losses[0].expand(4))
    opt.step(closure_of(model))
    assert opt.last_step.losses[0] != losses[0]


def test_dropout_masks_change_from_step_to_step_and_leave_the_users_stream_alone() -> None:
    model, opt = make(phisam.sgd(), model=make_model(dropout=0.5), base="sgd")
    for group in opt.param_groups:
        group["lr"] = 0.0
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses = [float(opt.step(closure_of(model))) for _ in range(3)]
    assert torch.equal(torch.rand(3), expected)
    assert len(set(losses)) == 3


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("at_call", [0, 1, 3])
def test_a_closure_that_raises_leaves_everything_as_it_was(at_call: int) -> None:
    model, opt = make(phisam.frobenius(), rho=0.5)
    opt.step(closure_of(model))
    before, before_opt = state(model), copy.deepcopy(opt.state_dict())
    calls = iter(range(10))

    def closure() -> Tensor:
        loss = closure_of(model)()
        if next(calls) == at_call:
            raise InterruptionError
        return loss

    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    with pytest.raises(InterruptionError):
        opt.step(closure)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_bit_equal(before, state(model))
    undisturbed = copy.deepcopy(model)
    undisturbed_opt = phisam.PhiSAM(
        undisturbed, BASES["sgd"](undisturbed.parameters()), phisam.frobenius(), rho=0.5, n_samples=3
    )
    undisturbed_opt.load_state_dict(before_opt)
    undisturbed_opt.step(closure_of(undisturbed))
    opt.step(closure_of(model))
    assert_bit_equal(state(undisturbed), state(model))


def test_parameters_are_restored_bit_for_bit() -> None:
    """A base optimizer that does not move sees the parameters that the step began with."""
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = phisam.PhiSAM(model, base, phisam.frobenius(), rho=1e3, n_samples=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        opt.step(closure_of(model))
    assert_bit_equal(before, dict(model.named_parameters()))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bad", ["loss_0", "loss_2", "gradient"])
def test_a_step_with_inf_or_nan_is_skipped_counted_and_said_once(
    bad: str, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, opt = make(phisam.log_determinant(), base)
    opt.step(closure_of(model))
    before, before_base = state(model), copy.deepcopy(opt.base_optimizer.state_dict())
    calls = iter(range(10**6))

    def closure() -> Tensor:
        loss = closure_of(model)()
        point = next(calls) % 4
        if bad == "gradient":
            return loss + (0 * next(model.parameters()).sum()).sqrt()  # plus 0, with gradient NaN
        return loss * math.inf if bad == f"loss_{point}" else loss

    with caplog.at_level(logging.WARNING, logger="phisam"):
        for _ in range(3):
            opt.step(closure)
    assert_bit_equal(before, state(model))
    after_base = opt.base_optimizer.state_dict()
    for index, slots in before_base["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, after_base["state"][index][slot]), slot
    assert (opt.skipped_steps, opt.skipped_in_a_row) == (3, 3)
    assert sum("is skipped" in record.getMessage() for record in caplog.records) == 1
    opt.step(closure_of(model))
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert (opt.skipped_steps, opt.skipped_in_a_row) == (3, 0)
    opt.step(closure)
    other, resumed = make(phisam.log_determinant(), base)
    resumed.load_state_dict(opt.state_dict())
    resumed.step(lambda: closure_of(other)() * math.inf)
    assert (resumed.skipped_steps, resumed.skipped_in_a_row) == (5, 2)


def test_negative_w_0_is_said_once_with_its_number(caplog: pytest.LogCaptureFixture) -> None:
    model, opt = make(phisam.trace(), lam=3.0)
    with caplog.at_level(logging.WARNING, logger="phisam"):
        opt.step(closure_of(model))
        opt.step(closure_of(model))
    assert [("w_0 = -2 " in record.getMessage()) for record in caplog.records] == [True]


class Reads(TorchDispatchMode):
    """Counts reads of a tensor by the host: each would make the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MEASURES)
def test_with_a_fused_base_optimizer_the_host_reads_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = make(MEASURES[name](), "fused_adam")
    opt.step(closure_of(model))
    # On CUDA the monitor looks at numbers that have arrived in pinned memory; here that read is left out.
    monkeypatch.setattr(opt._monitor, "_report", lambda: None)
    with Reads() as reads:
        opt.step(closure_of(model))
    assert reads.count == 0


def test_with_another_base_optimizer_the_host_reads_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = make(phisam.frobenius(), "sgd")
    monkeypatch.setattr(opt._monitor, "_report", lambda: None)
    with Reads() as reads:
        opt.step(closure_of(model))
    assert reads.count == 1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MEASURES)
def test_resume_is_bit_exact(name: str, base: str, tmp_path: Any) -> None:
    model, opt = make(MEASURES[name](), base, model=make_model(dropout=0.3), lam=0.3)
    for _ in range(3):
        opt.step(closure_of(model))
    opt.rho, opt.lam = 0.02, 0.4
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    for _ in range(3):
        opt.step(closure_of(model))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, resumed_opt = make(MEASURES[name](), base, model=make_model(dropout=0.3), seed=99)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    for _ in range(3):
        resumed_opt.step(closure_of(resumed))
    assert_bit_equal(state(model), state(resumed))


def test_the_state_of_a_bare_optimizer_is_refused_and_nothing_is_lost() -> None:
    model, opt = make(phisam.trace())
    opt.step(closure_of(model))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r'no "phisam" entry.*base_optimizer\.load_state_dict'):
        opt.load_state_dict(BASES["sgd"](make_model().parameters()).state_dict())
    assert opt.state_dict()["phisam"] == before["phisam"]
    assert len(opt.state_dict()["state"]) == len(before["state"])


@pytest.mark.parametrize("on", ["base", "phisam"])
def test_schedulers_work_on_either_optimizer(on: str) -> None:
    model, opt = make(phisam.trace())
    scheduler = torch.optim.lr_scheduler.StepLR(opt if on == "phisam" else opt.base_optimizer, step_size=1, gamma=0.5)
    for expected in (0.05, 0.025, 0.0125):
        assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"] == expected
        opt.step(closure_of(model))
        scheduler.step()


def test_param_groups_and_state_stay_shared_after_load_and_add() -> None:
    model = make_model()
    base = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    opt = phisam.PhiSAM(model, base, phisam.trace(), n_samples=1)
    opt.step(closure_of(model))
    opt.add_param_group({"params": model[5].parameters(), "lr": 0.2})
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is base.param_groups
    assert [(group["lr"], group["rho_scale"], group["momentum"]) for group in opt.param_groups] == [
        (0.1, 1.0, 0.9),
        (0.2, 1.0, 0.9),
    ]
    before = model[5].weight.detach().clone()
    opt.step(closure_of(model))
    assert opt.state is base.state
    assert not torch.equal(before, model[5].weight)


def test_rho_scale_multiplies_a_groups_share_of_v() -> None:
    """With rho_scale = 0 on all but the last bias, the loss at a point is the loss with that bias moved by rho v."""
    model = make_model()
    bias = model[5].bias
    rest = [p for p in model.parameters() if p is not bias]
    base = torch.optim.SGD([{"params": rest, "rho_scale": 0.0}, {"params": [bias], "rho_scale": 2.0}], lr=0.0)
    d = sum(p.numel() for p in model.parameters())
    opt = phisam.PhiSAM(
        model, base, phisam.trace(), noise=phisam.dirac(torch.full((d,), 0.5)), rho=0.25, lam=0.3, n_samples=1
    )
    opt.step(closure_of(model))
    moved = make_model()
    with torch.no_grad():
        moved[5].bias += 0.25
    assert torch.equal(opt.last_step.losses[1].float(), closure_of(moved)().detach())


def test_frozen_and_unused_parameters_stay_without_gradient() -> None:
    """A None gradient stays None, so that weight decay leaves an unused parameter where it is."""
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3), "frozen": nn.Linear(4, 3)})
    model["frozen"].requires_grad_(False)
    x, y = examples()
    opt = phisam.PhiSAM(
        model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), phisam.frobenius(), n_samples=3
    )
    before = state(model)
    opt.step(lambda: nn.functional.cross_entropy(model["used"](x) + model["frozen"](x), y))
    assert model["unused"].weight.grad is None
    assert torch.equal(before["unused.weight"], model["unused"].weight)
    assert torch.equal(before["frozen.weight"], model["frozen"].weight)
    assert not torch.equal(before["used.weight"], model["used"].weight)


def test_parameters_may_be_frozen_and_thawed_between_steps() -> None:
    model, opt = make(phisam.trace())
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    opt.step(closure_of(model))
    assert torch.equal(before, model[0].weight)
    model[0].requires_grad_(True)
    opt.step(closure_of(model))
    assert not torch.equal(before, model[0].weight)


def test_last_step_holds_the_numbers_of_the_step() -> None:
    model, opt = make(phisam.frobenius(), rho=0.5, lam=0.2)
    with pytest.raises(RuntimeError, match="no step was taken yet"):
        _ = opt.last_step
    loss = opt.step(closure_of(model))
    last = opt.last_step
    assert (last.losses.shape, last.weights.shape, last.delta.shape) == ((4,), (4,), (3,))
    assert not any(t.requires_grad for t in (last.losses, last.weights, last.delta, last.sharpness, loss))
    assert float(loss) == pytest.approx(float(last.losses[0]))
    torch.testing.assert_close(last.delta, (last.losses[1:] - last.losses[0]) / 0.25)
    torch.testing.assert_close(last.weights, opt.measure.weights(last.losses, 0.5, 0.2))
    assert float(last.sharpness) == pytest.approx(2 * float(last.delta.var()))
    assert opt.gradient_evaluations_per_step == 4


def test_rows_need_no_more_memory_for_more_samples() -> None:
    """m + 1 rows however many points: the tensors that the running sums hold after 2 and after 40 points."""
    from phisam.gradient import Rows

    def held(points: int) -> int:
        rows = Rows(1)
        rows.add_unperturbed(0, [torch.ones(5)])
        for _ in range(points):
            rows.add([torch.ones(5)], torch.ones(2, dtype=torch.float64), None)
        return sum(len(row) for row in [*(row for _, row in rows._at_x), *rows._rows])

    assert held(2) == held(40) == 3


def test_rows_of_exponential_slopes_survive_losses_that_overflow() -> None:
    """Streaming with |delta| of 1e6 must give the gradient of the softmax limit: the one largest exp(-delta)."""
    x = nn.Parameter(torch.tensor([0.0]))
    model = nn.Module()
    model.x = x
    losses = iter([0.0, 30.0, -1000.0, 500.0])
    opt = phisam.PhiSAM(model, torch.optim.SGD([x], lr=0.0), phisam.log_determinant(), rho=0.01, lam=0.25, n_samples=3)
    slopes = iter([1.0, 10.0, 100.0, 1000.0])
    opt.step(lambda: (next(losses) + next(slopes) * (model.x - model.x.detach())).sum())
    assert opt.last_step.weights.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0])
    assert float(x.grad) == pytest.approx(0.5 * 1.0 + 0.5 * 100.0)


def test_a_skipped_first_step_of_a_fused_optimizer_leaves_no_garbage_behind() -> None:
    """torch's fused SGD makes its momentum in the first step, and would keep it uninitialised if that is skipped."""
    x, y = examples()

    def train(bad_first: bool) -> dict[str, Tensor]:
        model = make_model()
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        opt = phisam.PhiSAM(model, base, phisam.sgd())
        if bad_first:
            opt.step(lambda: nn.functional.cross_entropy(model(x), y) * math.inf)
        for _ in range(3):
            opt.step(closure_of(model))
        return state(model)

    for _ in range(5):
        assert_bit_equal(train(bad_first=True), train(bad_first=False))


def test_lam_0_is_the_base_optimizer_even_where_the_sharpness_overflows() -> None:
    for measure in (phisam.determinant(), phisam.exp_product(-1.0)):
        losses = torch.tensor([0.0, 400.0, 400.0], dtype=torch.float64)
        assert measure.weights(losses, 1.0, 0.0).tolist() == [1.0, 0.0, 0.0]
        _, log_scale = measure.slopes(losses[1], 1)
        assert measure.factors(losses, 1.0, 0.0, log_scale).tolist() == [0.0]


def test_max_grad_norm_clips_the_combined_gradient_once() -> None:
    model, opt = make(phisam.frobenius(), rho=0.5, lam=0.5)
    _, clipped = make(phisam.frobenius(), rho=0.5, lam=0.5, max_grad_norm=0.1)
    opt.step(closure_of(model))
    clipped.step(closure_of(clipped.model))
    whole = [p.grad for p in model.parameters()]
    norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in whole]))
    assert norm > 0.2
    for g, p in zip(whole, clipped.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, g * 0.1 / norm, rtol=1e-4, atol=1e-7)


def test_schedulers_that_look_at_defaults_work() -> None:
    model, opt = make(phisam.trace())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    opt.step(closure_of(model))
    scheduler.step()
    assert opt.base_optimizer.param_groups[0]["lr"] == opt.param_groups[0]["lr"] != 0.05


def test_a_model_whose_dtype_changes_is_laid_out_anew() -> None:
    model, opt = make(phisam.trace(), rho=1e-3)
    model.double()
    x, y = examples()
    opt.step(lambda: nn.functional.cross_entropy(model(x.double()), y))
    assert opt._perturbation._v.dtype == torch.float64
    model.bfloat16()
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        opt.step(closure_of(model))


# Mistakes.


def test_what_is_no_measure_no_count_and_no_base_optimizer() -> None:
    with pytest.raises(ValueError, match=r"measure must be a phisam\.Measure"):
        make(phisam.trace)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_samples must be an integer, got 2\.5"):
        make(phisam.trace(), n_samples=2.5)
    model = make_model()
    with pytest.raises(ValueError, match="LBFGS"):
        phisam.PhiSAM(model, torch.optim.LBFGS(model.parameters()), phisam.trace())
    with pytest.raises(ValueError, match=r"psi must return a tensor or a sequence of tensors, got 1\.0"):
        make(phisam.Measure(lambda t: t, lambda t: 1.0, phisam.gaussian()))  # type: ignore[arg-type,return-value]


def test_a_loss_without_any_trained_parameter() -> None:
    model = nn.ModuleDict({"trained": nn.Linear(4, 3), "other": nn.Linear(4, 3)})
    opt = phisam.PhiSAM(model, torch.optim.SGD(model["trained"].parameters(), lr=0.1), phisam.sgd())
    x, y = examples()
    with pytest.raises(ValueError, match="depends on no parameter of the base optimizer"):
        opt.step(lambda: nn.functional.cross_entropy(model["other"](x), y))


def test_a_closure_that_calls_backward() -> None:
    model, opt = make(phisam.trace())
    before = state(model)

    def closure() -> Tensor:
        loss = closure_of(model)()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"the closure called backward: it must only run the forward pass"):
        opt.step(closure)
    assert_bit_equal(before, state(model))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: None, r"must return the loss as a scalar tensor, got None"),
        (lambda loss: loss.expand(5), r"got a tensor of shape \(5,\); average it over the batch"),
        (lambda loss: loss.detach(), r"the loss has no gradient"),
        (lambda loss: loss.bfloat16(), r"the loss is torch\.bfloat16.*float32 or better"),
        (lambda loss: loss.item(), r"must return the loss as a scalar tensor, got [0-9]"),
    ],
)
def test_a_closure_that_returns_no_usable_loss(result: Callable[[Tensor], Any], message: str) -> None:
    model, opt = make(phisam.trace())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        opt.step(lambda: result(closure_of(model)()))
    assert_bit_equal(before, state(model))


def test_a_step_without_closure() -> None:
    _, opt = make(phisam.trace())
    with pytest.raises(ValueError, match="step needs a closure"):
        opt.step(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rho": 0.0}, r"rho must be a positive finite number, got 0\.0.*phisam\.sgd\(\)"),
        ({"rho": -1.0}, r"rho must be a positive finite number, got -1\.0"),
        ({"rho": math.nan}, r"rho must be a positive finite number, got nan"),
        ({"rho": math.inf}, r"rho must be a positive finite number, got inf"),
        ({"lam": math.nan}, r"lam must be a finite number, got nan"),
        ({"lam": -math.inf}, r"lam must be a finite number, got -inf"),
        ({"n_samples": 1}, r"frobenius: n_samples = 1, .* n_samples >= 2, or .*unbiased=False"),
        ({"scope": "local"}, r"""scope must be "global" or "shard", got 'local'"""),
    ],
)
def test_settings_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(phisam.frobenius(), **kwargs)


def test_n_samples_0_names_the_alternative() -> None:
    with pytest.raises(ValueError, match=r"trace: n_samples = 0.*measure=phisam\.sgd\(\)"):
        make(phisam.trace(), n_samples=0)


def test_rho_and_lam_are_checked_when_assigned() -> None:
    _, opt = make(phisam.trace())
    with pytest.raises(ValueError, match="rho must be"):
        opt.rho = 0.0
    with pytest.raises(ValueError, match="lam must be"):
        opt.lam = math.inf
    assert (opt.rho, opt.lam) == (0.01, 1.0)


def test_a_base_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"6 of the base optimizer's 6 parameter tensors are not the model's"):
        phisam.PhiSAM(make_model(), BASES["sgd"](make_model().parameters()), phisam.trace())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    model = make_model()
    model[5].to(dtype)
    with pytest.raises(ValueError, match=rf"parameter '5\.weight' is {dtype}.*model\.float\(\)"):
        make(phisam.trace(), model=model)


def test_parameters_of_two_dtypes() -> None:
    model = make_model()
    model[5].double()
    with pytest.raises(ValueError, match=r"'5\.weight' is torch\.float64 on cpu, but '0\.weight' is torch\.float32"):
        make(phisam.trace(), model=model)


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    with pytest.raises(ValueError, match=r"module '0' makes sparse gradients.*sparse=False"):
        phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), phisam.trace())


def test_nothing_to_train() -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        make(phisam.trace(), model=model)
