"""What real training loops do to an optimizer, in one process: accumulation, mixed precision, schedules, odd models."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.ops import StochasticDepth

import phisam
from phisam import schedules
from tests.phisam.contract import Part, closure_of, evaluation_weights, every_other, sgd
from tests.phisam.test_optimizer import Counting, assert_bit_equal, examples, make_model, state
from tests.phisam.test_sharding import Branching

Settings = dict[str, Any]

# One of each kind of step: drawn points, two components of psi, pairs, the exponential rows, a direction that needs
# the gradient first, a mask that needs single examples, and no point at all.
KINDS: dict[str, Callable[[], Settings]] = {
    "trace": lambda: {"measure": phisam.trace(), "lam": 0.3},
    "frobenius": lambda: {"measure": phisam.frobenius(), "lam": 0.01},
    "symmetric": lambda: {"measure": phisam.trace(), "noise": phisam.gaussian().symmetric(), "lam": 0.3},
    "adaptive": lambda: {"measure": phisam.frobenius(), "noise": phisam.gaussian().adaptive(0.01), "lam": 0.01},
    "log_determinant": lambda: {"measure": phisam.log_determinant(), "lam": 0.3},
    "sam": lambda: {"measure": phisam.sam(), "lam": 1.0},
    "asam": lambda: {"measure": phisam.asam(), "lam": 1.0},
    "ssam": lambda: {"measure": phisam.ssam(fisher_samples=16, refresh_every=2), "lam": 1.0},
    "sgd": lambda: {"measure": phisam.sgd()},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def smooth_model() -> nn.Module:
    """Float64, with neither buffers nor dropout: losses are means over examples."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def make(model: nn.Module, kind: str = "frobenius", base: Any = None, **settings: Any) -> phisam.PhiSAM:
    return phisam.PhiSAM(
        model,
        base if base is not None else sgd(model.parameters()),
        **{"rho": 0.1, "n_samples": 2, **KINDS[kind](), **settings},
    )


def micro_batches(model: nn.Module, k: int, dtype: torch.dtype = torch.float64) -> list[Callable[[Part], Tensor]]:
    """The shared examples in k equal parts."""
    x, y = examples()

    def loss(part: Part, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(part(x)), part(y))

    return [functools.partial(loss, x=x_i, y=y_i) for x_i, y_i in zip(x.to(dtype).chunk(k), y.chunk(k), strict=True)]


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Recorded:
    """A closure on the shared examples that remembers what it was evaluated at: (parameters, number of examples)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[tuple[Tensor, int]] = []
        x, y = examples()
        self.x, self.y = x.to(next(model.parameters()).dtype), y

    def __call__(self, part: Part) -> Tensor:
        x, y = part(self.x), part(self.y)
        self.calls.append((flat(self.model), len(x)))
        return nn.functional.cross_entropy(self.model(x), y)

    def gradient(self, at: Tensor, n_examples: int) -> Tensor:
        """grad L(at) on the first n_examples, by autograd on a function of the parameters."""
        named = dict(self.model.named_parameters())
        parts = at.split([p.numel() for p in named.values()])
        x = {
            name: part.view_as(p).clone().requires_grad_() for (name, p), part in zip(named.items(), parts, strict=True)
        }
        outputs = functional_call(self.model, x, (self.x[:n_examples],))
        loss = nn.functional.cross_entropy(outputs, self.y[:n_examples])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(x.values()))])


# Gradient accumulation.


@pytest.mark.parametrize("k", [2, 4])
@every_kind
def test_accumulation_is_the_whole_batch(kind: str, k: int) -> None:
    model, whole = smooth_model(), smooth_model()
    opt, whole_opt = make(model, kind), make(whole, kind)
    for _ in range(3):
        loss = opt.step(micro_batches(model, k))
        whole_loss = whole_opt.step(micro_batches(whole, 1))
        torch.testing.assert_close(loss, whole_loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(opt.last_step.losses, whole_opt.last_step.losses, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient_of(model), gradient_of(whole), rtol=0, atol=1e-12)
    torch.testing.assert_close(flat(model), flat(whole), rtol=0, atol=1e-12)
    assert opt.gradient_evaluations_per_step == whole_opt.gradient_evaluations_per_step


@pytest.mark.parametrize("k", [2, 3, 4])
@every_kind
def test_accumulation_with_lam_0_is_ordinary_accumulation_bit_for_bit(kind: str, k: int) -> None:
    """Buffers included, for k that 1 / k is exact for and for one that it is not."""
    model, plain = make_model(), make_model()
    opt = make(model, kind, lam=0.0)
    plain_opt = sgd(plain.parameters())
    x, y = examples(12)

    def parts(model: nn.Module) -> list[Callable[[Part], Tensor]]:
        return [
            lambda part, x=x, y=y: nn.functional.cross_entropy(model(part(x)), part(y))  # type: ignore[misc]
            for x, y in zip(x.chunk(k), y.chunk(k), strict=True)
        ]

    for _ in range(4):
        opt.step(parts(model))
        plain_opt.zero_grad()
        for closure in parts(plain):
            (closure(lambda t: t) / k).backward()
        plain_opt.step()
    assert_bit_equal(state(model), state(plain))


@every_kind
def test_buffers_move_as_in_ordinary_accumulation(kind: str) -> None:
    model, plain = make_model(), make_model()
    make(model, kind).step(micro_batches(model, 4, torch.float32))
    for closure in micro_batches(plain, 4, torch.float32):
        closure(lambda t: t)
    assert_bit_equal(dict(plain.named_buffers()), dict(model.named_buffers()))


class Alive:
    """Counts the calls of a closure whose graphs still hold what they saved for the backward."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.most = 0

    def _release(self, call: int) -> None:
        self.held[call] -= 1

    @contextmanager
    def graph(self, call: int) -> Iterator[None]:
        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: Tensor) -> Saved:
            saved = Saved(tensor)
            self.held[call] = self.held.get(call, 0) + 1
            weakref.finalize(saved, self._release, call)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            yield
        self.most = max(self.most, sum(count > 0 for count in self.held.values()))


@every_kind
def test_one_graph_is_alive_at_a_time(kind: str) -> None:
    """What accumulation is for: memory is that of one micro-batch, at every point, the last one too."""
    model, alive, calls = smooth_model(), Alive(), iter(range(10**6))

    def tracked(closure: Callable[[Part], Tensor]) -> Callable[[Part], Tensor]:
        def wrapped(part: Part) -> Tensor:
            with alive.graph(next(calls)):
                return closure(part)

        return wrapped

    make(model, kind).step([tracked(closure) for closure in micro_batches(model, 4)])
    assert next(calls) >= (4 if kind == "sgd" else 8)
    assert alive.most == 1


@every_kind
def test_each_micro_batch_has_dropout_masks_of_its_own_and_keeps_them_at_all_points(kind: str) -> None:
    """The micro-batches are the same examples, and nothing is perturbed: only their masks can tell them apart."""
    model = make_model(dropout=0.5)
    model[1] = nn.Identity()
    settings: Settings = {"base": torch.optim.SGD([{"params": model.parameters(), "rho_scale": 0.0}], lr=0.0)}
    losses: dict[int, set[float]] = {0: set(), 1: set(), 2: set()}

    def closure(part: Part, i: int) -> Tensor:
        loss = closure_of(model)(part)
        if len(part(torch.zeros(16))) == 16:
            losses[i].add(loss.item())
        return loss

    make(model, kind, **settings).step([functools.partial(closure, i=i) for i in losses])
    assert all(len(values) == 1 for values in losses.values())
    assert len(set.union(*losses.values())) == 3


@every_kind
def test_a_micro_batch_that_raises_leaves_everything_as_it_was(kind: str) -> None:
    model = make_model(dropout=0.3)
    opt = make(model, kind)
    undisturbed = copy.deepcopy(model)
    undisturbed_opt = make(undisturbed, kind)
    calls = 0

    def counted(part: Part) -> Tensor:
        nonlocal calls
        calls += 1
        return closure_of(undisturbed)(part)

    for _ in range(2):
        undisturbed_opt.step([counted, counted, counted])
    assert calls >= 6

    before = state(model)
    for at_call in range(calls // 2):
        seen = iter(range(10**6))

        def closure(part: Part, at_call: int = at_call, seen: Iterator[int] = seen) -> Tensor:
            loss = closure_of(model)(part)
            if next(seen) == at_call:
                raise KeyboardInterrupt
            return loss

        with pytest.raises(KeyboardInterrupt):
            opt.step([closure, closure, closure])
        assert_bit_equal(before, state(model))
    for _ in range(2):
        opt.step([closure_of(model)] * 3)
    assert_bit_equal(state(undisturbed), state(model))


def test_the_usual_ways_to_write_closures() -> None:
    """Values bound as defaults are the idiom for closures made in a loop: they are not a place for `part`."""
    x, y = examples()
    model = make_model()
    criterion = nn.functional.cross_entropy

    class Objective:
        def __call__(self, part: Part) -> Tensor:
            return self.loss(part)

        def loss(self, part: Part) -> Tensor:
            return criterion(model(part(x)), part(y))

    forms: list[Any] = [
        lambda: criterion(model(x), y),
        lambda x=x, y=y: criterion(model(x), y),
        lambda part, x=x, y=y: criterion(model(part(x)), part(y)),
        functools.partial(lambda a, b: criterion(model(a), b), x, y),
        functools.partial(lambda part, a, b: criterion(model(part(a)), part(b)), a=x, b=y),
        Objective(),
        Objective().loss,
    ]
    opt = make(model, base=torch.optim.SGD(model.parameters(), lr=0.0), seed=3)
    own = copy.deepcopy(opt.state_dict())
    expected = opt.step(forms[0])
    for form in forms:
        opt.load_state_dict(copy.deepcopy(own))
        assert torch.equal(opt.step(form), expected)
        assert torch.equal(opt.step((form, form)), expected)


@pytest.mark.parametrize("closures", [[], [1.0], None])
def test_what_is_no_closure(closures: Any) -> None:
    with pytest.raises(ValueError, match="step needs a closure"):
        make(make_model()).step(closures)


# every = k.


@every_kind
def test_every_k_is_lam_that_is_k_times_as_strong_in_every_kth_step(kind: str) -> None:
    lam = KINDS[kind]().get("lam", 0.3) / 3
    model, spelled_out = make_model(dropout=0.3), make_model(dropout=0.3)
    opt = make(model, kind, lam=lam, every=3)
    spelled_out_opt = make(spelled_out, kind, lam=lambda step: 0.0 if step % 3 else 3 * lam)
    for step in range(8):
        opt.step(closure_of(model))
        spelled_out_opt.step(closure_of(spelled_out))
        last, expected = opt.last_step, spelled_out_opt.last_step
        if step % 3:
            assert last.losses.shape == last.weights.shape == (1,)
            assert last.delta.shape == (0,)
            assert float(last.weights) == 1.0
        else:
            assert torch.equal(last.losses, expected.losses)
            assert torch.equal(last.weights, expected.weights)
        assert torch.equal(last.losses[0], expected.losses[0])
    assert_bit_equal(state(model), state(spelled_out))
    assert opt.lam == pytest.approx(lam)


@pytest.mark.parametrize(
    ("kind", "n", "cost"), [("frobenius", 4, 4), ("symmetric", 4, 8), ("sam", 4, 1), ("sgd", 4, 0)]
)
def test_every_k_costs_1_and_a_kth_of_the_points(kind: str, n: int, cost: int) -> None:
    model = make_model()
    opt = make(model, kind, n_samples=n, every=3)
    closure = Recorded(model)
    for _ in range(6):
        opt.step(closure)
    assert len(closure.calls) == 6 + 2 * cost
    assert opt.gradient_evaluations_per_step == pytest.approx(1 + cost / 3)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_that_is_no_count(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be"):
        make(make_model(), every=every)


# perturb_fraction.


@pytest.mark.parametrize(("fraction", "n_examples"), [(0.5, 8), (0.25, 4), (0.3, 5), (0.01, 1)])
@every_kind
def test_perturb_fraction_is_its_formula(kind: str, fraction: float, n_examples: int) -> None:
    """g = grad L(whole) + sum_e (w_e - [e = 0]) grad L_e(part), the part for the measure, x itself too."""
    model = smooth_model()
    opt = make(model, kind, torch.optim.SGD(model.parameters(), lr=0.0), perturb_fraction=fraction)
    closure = Recorded(model)
    opt.step(closure)
    x = flat(model)
    of_part = [(at, n) for at, n in closure.calls if n == n_examples]
    if kind == "ssam" and n_examples == 1:
        of_part = of_part[-2:]  # before these come the single examples of the Fisher mask
    expected = closure.gradient(x, 16)
    if kind != "sgd":
        assert torch.equal(of_part[0][0], x)
        weights = evaluation_weights(opt)
        weights[0] -= 1
        assert len(weights) == len(of_part)
        for weight, (at, n) in zip(weights, of_part, strict=True):
            expected = expected + weight * closure.gradient(at, n)
        losses = torch.stack([part_loss(model, n_examples)])
        torch.testing.assert_close(opt.last_step.losses[:1], losses, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient_of(model), expected, rtol=0, atol=1e-11)
    assert sum(n == 16 for _, n in closure.calls) == 1


def part_loss(model: nn.Module, n_examples: int) -> Tensor:
    with torch.no_grad():
        return closure_of(model, torch.float64)(lambda t: t[:n_examples])


def test_the_loss_that_a_step_returns_is_of_the_whole_batch() -> None:
    """What a loop logs as its training loss must not change meaning with perturb_fraction."""
    model = smooth_model()
    opt = make(model, base=torch.optim.SGD(model.parameters(), lr=0.0), perturb_fraction=0.5)
    torch.testing.assert_close(opt.step(Recorded(model)), part_loss(model, 16), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "n", "cost"), [("frobenius", 4, 4), ("symmetric", 4, 8), ("sam", 4, 1), ("sgd", 4, 0)]
)
def test_perturb_fraction_costs_what_it_says(kind: str, n: int, cost: int) -> None:
    """In examples seen: 1 + f (n + 1) batches, and without a point the one batch."""
    model = make_model()
    for every, steps in ((1, 3), (2, 4)):
        opt = make(model, kind, n_samples=n, perturb_fraction=0.25, every=every)
        closure = Recorded(model)
        for _ in range(steps):
            opt.step(closure)
        seen = sum(n for _, n in closure.calls) / 16 / steps
        assert seen == pytest.approx(1 + (0.25 * (cost + 1) if cost else 0) / every)
        assert opt.gradient_evaluations_per_step == pytest.approx(seen)


@every_kind
def test_perturb_fraction_leaves_buffers_as_a_forward_on_the_whole_batch_does(kind: str) -> None:
    model, plain = make_model(), make_model()
    make(model, kind, perturb_fraction=0.5).step(closure_of(model))
    closure_of(plain)(lambda t: t)
    assert_bit_equal(dict(plain.named_buffers()), dict(model.named_buffers()))


@every_kind
def test_perturb_fraction_with_lam_0_is_the_base_optimizer_bit_for_bit(kind: str) -> None:
    model, plain = make_model(), make_model()
    opt, plain_opt = make(model, kind, lam=0.0, perturb_fraction=0.5), sgd(plain.parameters())
    for _ in range(4):
        opt.step(closure_of(model))
        plain_opt.zero_grad()
        closure_of(plain)(lambda t: t).backward()
        plain_opt.step()
    assert_bit_equal(state(model), state(plain))


@every_kind
def test_perturb_fraction_of_each_micro_batch(kind: str) -> None:
    """The measure sees the first half of each micro-batch: those halves in front, it is the first half of one batch."""
    x, y = examples()
    order = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15])
    model, whole = smooth_model(), smooth_model()
    settings = {**KINDS[kind](), "perturb_fraction": 0.5}
    opt, whole_opt = make(model, kind, **settings), make(whole, kind, **settings)
    for _ in range(3):
        opt.step(micro_batches(model, 2))
        whole_opt.step(lambda part: nn.functional.cross_entropy(whole(part(x[order].double())), part(y[order])))
    torch.testing.assert_close(flat(model), flat(whole), rtol=0, atol=1e-12)


@every_kind
def test_the_whole_batch_as_part_is_the_step_without_it(kind: str) -> None:
    model, without = make_model(), make_model()
    opt, without_opt = make(model, kind, perturb_fraction=1.0), make(without, kind)
    for _ in range(2):
        opt.step(closure_of(model))
        without_opt.step(closure_of(without))
    assert_bit_equal(state(model), state(without))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan])
def test_perturb_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="perturb_fraction must be"):
        make(make_model(), perturb_fraction=fraction)


@pytest.mark.parametrize(
    "settings",
    [
        {"perturb_fraction": 0.5},
        KINDS["ssam"](),
        {"measure": phisam.trace(), "noise": phisam.gaussian().masked(phisam.fisher_mask())},
    ],
    ids=["perturb_fraction", "ssam", "fisher_mask"],
)
def test_a_closure_that_cannot_pick_examples_is_told_the_form(settings: Settings) -> None:
    x, y = examples()
    model = make_model()
    opt = make(model, **settings)
    before = state(model)
    for closure in (
        lambda: nn.functional.cross_entropy(model(x), y),
        [closure_of(model), lambda: nn.functional.cross_entropy(model(x), y)],
    ):
        with pytest.raises(ValueError, match=r"lambda part: criterion\(model\(part\(inputs\)\), part\(targets\)\)"):
            opt.step(closure)
    assert_bit_equal(before, state(model))


# Schedules.


def test_schedules_are_their_formulas() -> None:
    def values(schedule: Callable[[int], float], steps: int = 7) -> list[float]:
        return [schedule(step) for step in range(steps)]

    assert values(schedules.constant(0.3), 3) == [0.3] * 3
    assert values(schedules.linear(1.0, 3.0, 4)) == pytest.approx([1, 1.5, 2, 2.5, 3, 3, 3])
    cosine = [3 + (1 - 3) * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert values(schedules.cosine(1.0, 3.0, 4)) == pytest.approx([*cosine, 3, 3, 3])
    assert values(schedules.warmup(2.0, 4)) == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2])
    assert values(schedules.warmup(schedules.linear(4.0, 0.0, 8), 2), 4) == pytest.approx([2, 3.5, 3, 2.5])


def test_rho_and_lam_follow_their_schedules_and_read_as_those_of_the_coming_step() -> None:
    model = make_model()
    rho, lam = schedules.warmup(0.4, 4), schedules.linear(0.1, 0.0, 3)
    opt = make(model, rho=rho, lam=lam)
    for step in range(6):
        assert (opt.rho, opt.lam) == (rho(step), lam(step))
        opt.step(closure_of(model))
        last = opt.last_step
        torch.testing.assert_close(last.delta, (last.losses[1:] - last.losses[0]) / rho(step) ** 2)
        torch.testing.assert_close(last.weights, opt.measure.weights(last.losses, rho(step), lam(step)))


def test_a_schedule_is_replaced_by_assignment() -> None:
    model = make_model()
    opt = make(model, rho=schedules.linear(0.1, 0.2, 10), lam=0.1)
    opt.step(closure_of(model))
    assert opt.rho == pytest.approx(0.11)
    opt.rho, opt.lam = 0.5, schedules.linear(0.0, 1.0, 4)
    assert (opt.rho, opt.lam) == (0.5, 0.25)
    opt.step(closure_of(model))
    assert (opt.rho, opt.lam) == (0.5, 0.5)


@pytest.mark.parametrize("kind", ["frobenius", "sam"])
def test_a_resumed_run_goes_on_in_its_schedules(kind: str) -> None:
    settings: Settings = {"rho": schedules.warmup(0.2, 6), "lam": schedules.cosine(0.5, 0.0, 7), "every": 2}
    model = make_model(dropout=0.3)
    opt = make(model, kind, **settings)
    for _ in range(3):
        opt.step(closure_of(model))
    resumed = copy.deepcopy(model)
    resumed_opt = make(resumed, kind, **settings)
    resumed_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        assert (resumed_opt.rho, resumed_opt.lam) == (opt.rho, opt.lam)
        opt.step(closure_of(model))
        resumed_opt.step(closure_of(resumed))
    assert_bit_equal(state(model), state(resumed))
    assert opt.rho == pytest.approx(0.2)


def test_a_schedule_that_leaves_the_range_is_said_where_it_does() -> None:
    """rho of a linear decay to 0 is 0 in the last step: an error in words, and the model as it was."""
    model = make_model()
    opt = make(model, rho=schedules.linear(0.1, 0.0, 2))
    for _ in range(2):
        opt.step(closure_of(model))
    before = state(model)
    with pytest.raises(ValueError, match="rho must be a positive finite number, got 0"):
        opt.step(closure_of(model))
    assert_bit_equal(before, state(model))


@every_kind
def test_rho_scale_multiplies_a_groups_share_of_every_noise(kind: str) -> None:
    """The points with rho_scale (0, 2) are those without, moved not at all and twice as far."""

    def moved(scales: tuple[float, float]) -> list[Tensor]:
        model = smooth_model()
        first, second = list(model[0].parameters()), list(model[2].parameters())
        groups = [{"params": first, "rho_scale": scales[0]}, {"params": second, "rho_scale": scales[1]}]
        closure = Recorded(model)
        make(model, kind, torch.optim.SGD(groups, lr=0.0)).step(closure)
        x = flat(model)
        return [at - x for at, n in closure.calls if n == 16]

    d_first = sum(p.numel() for p in smooth_model()[0].parameters())
    for plain, scaled in zip(moved((1.0, 1.0)), moved((0.0, 2.0)), strict=True):
        torch.testing.assert_close(scaled[:d_first], torch.zeros(d_first, dtype=torch.float64), rtol=0, atol=0)
        torch.testing.assert_close(scaled[d_first:], 2 * plain[d_first:], rtol=0, atol=1e-14)


# Mixed precision.


def autocast_closure(model: nn.Module, dtype: torch.dtype) -> Callable[[Part], Tensor]:
    x, y = examples()

    def closure(part: Part) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(part(x))
        assert outputs.dtype == dtype
        return nn.functional.cross_entropy(outputs.float(), part(y))

    return closure


def scaler(**settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **settings)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp16_accumulated"])
@every_kind
def test_autocast_follows_float32_closely(kind: str, precision: str) -> None:
    """The gradient, and the losses of 5 steps; with rho large enough for the half precision of the activations."""
    model, full = make_model(), make_model()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    settings: Settings = {"rho": 0.5, "max_grad_norm": 1.0}
    opt = make(model, kind, **settings, grad_scaler=None if precision == "bf16" else scaler(init_scale=2.0**10))
    full_opt = make(full, kind, **settings)
    closures: Any = autocast_closure(model, dtype)
    full_closures: Any = closure_of(full)
    if precision == "fp16_accumulated":
        closures, full_closures = [closures] * 2, [full_closures] * 2
    tolerance = 0.1 if precision == "bf16" else 0.02
    for _ in range(5):
        loss, full_loss = opt.step(closures), full_opt.step(full_closures)
        assert float(loss) == pytest.approx(float(full_loss), rel=tolerance)
        difference = torch.linalg.vector_norm(gradient_of(model) - gradient_of(full))
        assert difference < tolerance * torch.linalg.vector_norm(gradient_of(full))
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert opt.skipped_steps == 0


LOOPS: dict[str, Settings] = {
    "plain": {},
    "every": {"every": 2},
    "perturb_fraction": {"perturb_fraction": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.1},
}


@pytest.mark.parametrize("base", ["sgd", "fused_adam"])
@pytest.mark.parametrize("accumulated", [False, True], ids=["one_batch", "accumulated"])
@pytest.mark.parametrize("loop", LOOPS)
@every_kind
def test_a_scale_that_is_a_power_of_2_changes_no_bit(kind: str, loop: str, accumulated: bool, base: str) -> None:
    """Scaling by a power of 2 is exact: whatever differs was left scaled, unscaled twice, or clipped before."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return sgd(model.parameters()) if base == "sgd" else torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)

    model, plain = make_model(dropout=0.3), make_model(dropout=0.3)
    scale = scaler(init_scale=2.0**8, growth_interval=2)
    opt = make(model, kind, optimizer(model), **LOOPS[loop], grad_scaler=scale)
    plain_opt = make(plain, kind, optimizer(plain), **LOOPS[loop])
    for _ in range(4):
        opt.step(micro_batches(model, 2, torch.float32) if accumulated else closure_of(model))
        plain_opt.step(micro_batches(plain, 2, torch.float32) if accumulated else closure_of(plain))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert_bit_equal(state(model), state(plain))
    assert torch.equal(opt.last_step.losses, plain_opt.last_step.losses)
    assert scale.get_scale() == 2.0**10  # updated once a step


@pytest.mark.parametrize("accumulated", [False, True], ids=["one_batch", "accumulated"])
@every_kind
def test_an_overflow_skips_the_step_and_lowers_the_scale(kind: str, accumulated: bool) -> None:
    model = make_model(dropout=0.3)
    scale = scaler(init_scale=2.0**40, backoff_factor=2.0**-30, growth_interval=100)
    opt = make(model, kind, grad_scaler=scale)
    closure: Any = autocast_closure(model, torch.float16)
    before = state(model)
    opt.step([closure] * 2 if accumulated else closure)
    assert_bit_equal(before, state(model))
    assert all(p not in opt.state or opt.state[p].get("momentum_buffer") is None for p in model.parameters())
    assert (opt.skipped_steps, scale.get_scale()) == (1, 2.0**10)

    # The step was counted, and it is as if it had been left out: another run that begins in step 1 is the same.
    other = make_model(dropout=0.3)
    other_opt = make(other, kind, grad_scaler=scaler(init_scale=2.0**10, growth_interval=100))
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    closures = [autocast_closure(each, torch.float16) for each in (model, other)]
    for _ in range(3):
        opt.step([closures[0]] * 2 if accumulated else closures[0])
        other_opt.step([closures[1]] * 2 if accumulated else closures[1])
    assert_bit_equal(state(model), state(other))
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert (opt.skipped_steps, scale.get_scale()) == (1, 2.0**10)


@pytest.mark.parametrize("base", ["sgd", "fused_adam"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("kind", ["trace", "frobenius"])
def test_one_point_that_overflows_skips_the_whole_step(kind: str, call: int, base: str) -> None:
    """Its loss is finite, its gradient too: only scaled it is not."""
    model = make_model()
    optimizer = sgd if base == "sgd" else functools.partial(torch.optim.Adam, fused=True)
    opt = make(model, kind, optimizer(model.parameters()), grad_scaler=scaler(init_scale=2.0**16))
    opt.step(closure_of(model))
    before, before_base = state(model), copy.deepcopy(opt.base_optimizer.state_dict())
    calls = iter(range(10))

    def closure(part: Part) -> Tensor:
        loss = closure_of(model)(part)
        return loss * 1e37 if next(calls) == call else loss

    opt.step(closure)
    assert_bit_equal(before, state(model))
    for slots, expected in zip(
        opt.base_optimizer.state_dict()["state"].values(), before_base["state"].values(), strict=True
    ):
        assert_bit_equal({k: v for k, v in expected.items() if isinstance(v, Tensor)}, slots)
    assert opt.skipped_steps == 1
    assert opt.state_dict()["phisam"]["step"] == 2


def test_a_resumed_run_with_a_scaler_is_bit_exact() -> None:
    """The scaler is the user's, and saved as torch has it."""
    model = make_model(dropout=0.3)
    scale = scaler(init_scale=2.0**20, growth_interval=2)
    opt = make(model, "sam", grad_scaler=scale)
    for _ in range(4):
        opt.step(autocast_closure(model, torch.float16))
    resumed, resumed_scale = copy.deepcopy(model), scaler()
    resumed_scale.load_state_dict(copy.deepcopy(scale.state_dict()))
    resumed_opt = make(resumed, "sam", grad_scaler=resumed_scale)
    resumed_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        opt.step(autocast_closure(model, torch.float16))
        resumed_opt.step(autocast_closure(resumed, torch.float16))
        assert scale.get_scale() == resumed_scale.get_scale()
    assert_bit_equal(state(model), state(resumed))


def test_a_closure_that_raises_under_a_scaler_leaves_it_as_it_was() -> None:
    model = make_model()
    scale = scaler(init_scale=2.0**8, growth_interval=2)
    opt = make(model, "frobenius", grad_scaler=scale)
    opt.step(closure_of(model))
    before, before_scale = state(model), scale.state_dict()
    calls = iter(range(10))

    def closure(part: Part) -> Tensor:
        loss = closure_of(model)(part)
        if next(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_bit_equal(before, state(model))
    assert scale.state_dict() == before_scale
    opt.step(closure_of(model))
    assert scale.get_scale() == 2.0**9


def test_a_step_that_is_refused_after_its_backward_leaves_the_scaler_usable() -> None:
    """The loss of the refused step depends on parameters, but on none of the base optimizer's."""
    x, y = examples()
    model = nn.ModuleDict({"trained": nn.Linear(4, 3), "other": nn.Linear(4, 3)})
    scale = scaler(init_scale=2.0**8, growth_interval=1)
    opt = make(model, "trace", sgd(model["trained"].parameters()), grad_scaler=scale)
    with pytest.raises(ValueError, match="depends on no parameter of the base optimizer"):
        opt.step(lambda: nn.functional.cross_entropy(model["other"](x), y))
    opt.step(lambda: nn.functional.cross_entropy(model["trained"](x), y))
    assert (scale.get_scale(), opt.skipped_steps) == (2.0**9, 0)


def test_a_scaler_that_is_turned_off_is_none() -> None:
    """GradScaler(enabled=False) is how loops switch to bf16 or float32 by one flag."""
    model, plain = make_model(), make_model()
    opt, plain_opt = make(model, grad_scaler=scaler(enabled=False)), make(plain)
    for _ in range(2):
        opt.step(closure_of(model))
        plain_opt.step(closure_of(plain))
    assert_bit_equal(state(model), state(plain))


@pytest.mark.parametrize("settings", [{}, {"grad_scaler": True}], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", ["frobenius", "sam"])
def test_max_grad_norm_clips_once_after_the_micro_batches(kind: str, settings: Settings) -> None:
    if settings:
        settings = {"grad_scaler": scaler(init_scale=2.0**6)}
    whole, model = smooth_model(), smooth_model()
    make(whole, kind).step(micro_batches(whole, 1))
    make(model, kind, max_grad_norm=0.05, **settings).step(micro_batches(model, 4))
    norm = torch.linalg.vector_norm(gradient_of(whole))
    assert norm > 0.1
    torch.testing.assert_close(gradient_of(model), gradient_of(whole) * 0.05 / norm, rtol=1e-4, atol=0)


# Models.


@pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, "eager") for kind in KINDS), ("frobenius", "aot_eager"), ("sam", "aot_eager")]
)
@pytest.mark.parametrize("inner", [True, False], ids=["optimizer_of_the_model", "optimizer_of_the_compiled"])
def test_a_compiled_model_takes_the_same_steps(kind: str, inner: bool, backend: str) -> None:
    """The compiled code must read the parameters and buffers that PhiSAM writes."""
    model, plain = make_model().double(), make_model().double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    opt, plain_opt = make(model if inner else compiled, kind), make(plain, kind)
    x, y = examples()
    for _ in range(3):
        opt.step(lambda part: nn.functional.cross_entropy(compiled(part(x.double())), part(y)))
        plain_opt.step(closure_of(plain, torch.float64))
    for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)


@every_kind
def test_channels_last_is_kept_and_changes_nothing(kind: str) -> None:
    def train(memory_format: torch.memory_format) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
        model = model.to(memory_format=memory_format)
        x = (
            torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(3))
            .double()
            .to(memory_format=memory_format)
        )
        y = examples()[1]
        noise = {"noise": phisam.gaussian().masked(every_other(model))} if kind == "frobenius" else {}
        opt = make(model, kind, **noise)
        for _ in range(3):
            opt.step(lambda part: nn.functional.cross_entropy(model(part(x)), part(y)))
        return model

    model, contiguous = train(torch.channels_last), train(torch.contiguous_format)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    for (name, value), expected in zip(model.state_dict().items(), contiguous.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10, msg=name)


class Tied(nn.Module):
    """A small language model whose output layer is its embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5, bias=False)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(tokens))))  # type: ignore[no-any-return]


@every_kind
def test_a_tied_parameter_is_one_parameter(kind: str) -> None:
    """Perturbed once, alike in both places; its gradient is the sum of both uses."""
    tokens = torch.tensor([0, 1, 2, 3, 4, 0, 2, 4])
    targets = torch.tensor([1, 2, 3, 4, 0, 2, 4, 1])
    model = Tied().double()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = make(model, kind, base)
    points: list[dict[str, Tensor]] = []

    def closure(part: Part) -> Tensor:
        assert model.decoder.weight is model.embedding.weight
        if len(part(tokens)) == len(tokens):
            points.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return nn.functional.cross_entropy(model(part(tokens)), part(targets))

    opt.step(closure)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for weight, point in zip(evaluation_weights(opt), points, strict=True):
        x = {name: value.requires_grad_() for name, value in point.items()}
        untied = {**x, "decoder.weight": x["embedding.weight"]}
        loss = nn.functional.cross_entropy(functional_call(model, untied, (tokens,)), targets)
        for name, gradient in zip(x, torch.autograd.grad(loss, list(x.values())), strict=True):
            expected[name] += weight * gradient
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-11, msg=name)
    assert len(points) == 1 or not torch.equal(points[0]["embedding.weight"], points[1]["embedding.weight"])


@every_kind
def test_frozen_parameters_are_neither_perturbed_nor_moved(kind: str) -> None:
    """Frozen in the base optimizer's groups, and left out of them: as a smaller model whose constant they are."""
    x, y = examples()

    def train(frozen: str) -> tuple[nn.Module, phisam.PhiSAM]:
        model = smooth_model()
        first = list(model[0].parameters())
        rest = list(model[2].parameters())
        model[0].requires_grad_(frozen == "left_out")
        opt = make(model, kind, sgd(rest if frozen == "left_out" else [*first, *rest]))
        for _ in range(3):
            opt.step(lambda part: nn.functional.cross_entropy(model(part(x.double())), part(y)))
        return model, opt

    head = smooth_model()[2]
    head_opt = make(head, kind)
    features = torch.tanh(smooth_model()[0](x.double())).detach()
    for _ in range(3):
        head_opt.step(lambda part: nn.functional.cross_entropy(head(part(features)), part(y)))
    for frozen in ("left_out", "not_required"):
        model, _ = train(frozen)
        assert_bit_equal(state(model[0]), state(smooth_model()[0]))
        for p, expected in zip(model[2].parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)


def test_a_second_optimizer_for_the_rest_of_the_model() -> None:
    """The backbone's optimizer may step on gradients of its own, before or after PhiSAM's step on the head."""
    model = smooth_model()
    backbone, head = model[0], model[2]
    x, y = examples()
    opt = make(model, "frobenius", sgd(head.parameters()))
    other = torch.optim.Adam(backbone.parameters(), lr=1e-2)
    for _ in range(3):
        before = state(backbone)
        opt.step(lambda: nn.functional.cross_entropy(model(x.double()), y))
        assert_bit_equal(before, state(backbone))
        # What is left in .grad of parameters that are not PhiSAM's is nothing, not a part of some point's gradient.
        assert all(p.grad is None for p in backbone.parameters())
        head_before = state(head)
        nn.functional.cross_entropy(model(x.double()), y).backward()
        other.step()
        other.zero_grad()
        assert_bit_equal(head_before, state(head))
        assert any(not torch.equal(before[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["trace", "frobenius", "symmetric", "log_determinant"])
def test_a_parameter_that_only_some_points_use(kind: str) -> None:
    """Its gradient is the sum over the points that use it."""
    x, y = examples()
    model = Branching()
    wide: Settings = {"noise": phisam.gaussian()} if kind == "log_determinant" else {}
    opt = make(model, kind, torch.optim.SGD(model.parameters(), lr=0.0), rho=2.0, n_samples=6, seed=5, **wide)
    points: list[tuple[dict[str, Tensor], bool]] = []

    def closure() -> Tensor:
        used = bool(model.left.weight.sum() > -0.25)
        points.append(({name: p.detach().clone() for name, p in model.named_parameters()}, used))
        return nn.functional.cross_entropy(model(x.double()), y)

    opt.step(closure)
    assert len({used for _, used in points}) == 2
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for weight, (point, _) in zip(evaluation_weights(opt), points, strict=True):
        values = {name: value.requires_grad_() for name, value in point.items()}
        loss = nn.functional.cross_entropy(functional_call(model, values, (x.double(),)), y)
        gradients = torch.autograd.grad(loss, list(values.values()), materialize_grads=True, allow_unused=True)
        for name, gradient in zip(values, gradients, strict=True):
            expected[name] += weight * gradient
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-9, msg=name)


@every_kind
def test_a_parameter_that_no_point_uses_keeps_a_none_gradient(kind: str) -> None:
    x, y = examples()
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    opt = make(model, kind)
    before = state(model)
    for _ in range(2):
        opt.step([lambda part: nn.functional.cross_entropy(model["used"](part(x)), part(y))] * 2)
    assert model["unused"].weight.grad is None
    assert torch.equal(before["unused.weight"], model["unused"].weight)
    assert not torch.equal(before["used.weight"], model["used"].weight)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("kind", ["trace", "sam"])
def test_sparse_gradients_are_refused(kind: str, layer: Any) -> None:
    model = nn.Sequential(layer(5, 3, sparse=True))
    with pytest.raises(ValueError, match=r"module '0' makes sparse gradients.*sparse=False"):
        make(model, kind)


@every_kind
@pytest.mark.parametrize("layer", ["dropout", "stochastic_depth", "custom_buffer"])
def test_what_is_random_or_counts_is_the_same_at_all_points(kind: str, layer: str) -> None:
    """Where nothing is perturbed all losses of a step are equal, bit for bit; those of the next step are others."""

    class ReadsItsBuffer(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.calls)

    layers = {
        "dropout": nn.Dropout(0.5),
        "stochastic_depth": StochasticDepth(0.5, mode="row"),
        "custom_buffer": ReadsItsBuffer(),
    }
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), layers[layer], nn.Linear(6, 3))
    groups = [{"params": model.parameters(), "rho_scale": 0.0}]
    opt = make(model, kind, torch.optim.SGD(groups, lr=0.0))
    seen: list[float] = []
    for _ in range(2):
        opt.step(closure_of(model))
        losses = opt.last_step.losses
        assert torch.equal(losses, losses[0].expand_as(losses))
        seen.append(float(losses[0]))
    assert seen[0] != seen[1]


# What stands around a step.


@every_kind
def test_an_autocast_around_the_step_does_not_hide_the_perturbation(kind: str) -> None:
    """Autocast keeps half-precision copies of leaves until its outermost context ends: every point would see x."""
    model, inside = smooth_model().float(), smooth_model().float()
    opt, inside_opt = make(model, kind), make(inside, kind)
    x, y = examples()

    def loss(net: nn.Module, part: Part) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = net(part(x))
        return nn.functional.cross_entropy(outputs.float(), part(y))

    inside_opt.step(functools.partial(loss, inside))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(functools.partial(loss, model))
        after = loss(model, lambda x: x)
    assert torch.equal(opt.last_step.losses, inside_opt.last_step.losses)
    assert_bit_equal(state(model), state(inside))
    assert torch.equal(after, loss(inside, lambda x: x))


def test_the_state_after_a_schedule_that_ends_at_0_can_be_saved() -> None:
    model = smooth_model()
    opt = make(model, "trace", rho=schedules.linear(0.1, 0.0, 2))
    for _ in range(2):
        opt.step(micro_batches(model, 1))
    saved = opt.state_dict()
    resumed = make(smooth_model(), "trace", rho=0.25)
    resumed.load_state_dict(saved)
    assert resumed.rho == 0.25  # a schedule is code: the one who resumes has it


def test_a_state_without_masks_is_named() -> None:
    opt = make(smooth_model(), "ssam")
    saved = opt.state_dict()
    del saved["phisam"]["masks"]
    with pytest.raises(ValueError, match=r"the state has 0 Fisher masks, but the measure has 1"):
        opt.load_state_dict(saved)


def test_rho_scale_survives_a_bare_state_of_the_base_optimizer() -> None:
    model = smooth_model()
    groups = [{"params": model[0].parameters(), "rho_scale": 0.0}, {"params": model[2].parameters()}]
    opt = make(model, "trace", base=torch.optim.SGD(groups, lr=0.05))
    bare = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.01)
    opt.base_optimizer.load_state_dict(bare.state_dict())
    opt.step(micro_batches(model, 1))
    assert [group["rho_scale"] for group in opt.param_groups] == [0.0, 1.0]


@pytest.mark.parametrize("value", [math.nan, "0", None])
def test_a_rho_scale_that_is_no_number_is_refused(value: Any) -> None:
    model = smooth_model()
    with pytest.raises(ValueError, match="rho_scale of a parameter group must be a finite number"):
        make(model, "trace", base=torch.optim.SGD([{"params": model.parameters(), "rho_scale": value}], lr=0.1))


def test_an_optimizer_is_neither_copied_nor_pickled() -> None:
    with pytest.raises(TypeError, match=r"save opt\.state_dict\(\) and load it into a new PhiSAM"):
        copy.deepcopy(make(smooth_model()))


def test_an_example_that_is_not_finite_has_no_say_in_the_mask() -> None:
    x, y = examples()
    bad = x.double()
    bad[3] = math.nan
    model = smooth_model()
    opt = make(model, "ssam")

    def loss(part: Part) -> Tensor:
        return nn.functional.cross_entropy(model(part(bad)), part(y))

    fisher = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for k in set(range(16)) - {3}:
        alone = functools.partial(torch.narrow, dim=0, start=k, length=1)
        gradients = torch.autograd.grad(loss(alone), list(model.parameters()))
        fisher += torch.cat([g.reshape(-1) for g in gradients]).square()
    opt.step(loss)
    assert opt.skipped_steps == 1
    (mask,) = opt.state_dict()["phisam"]["masks"]
    assert set(mask.nonzero().flatten().tolist()) == set(fisher.topk(int(mask.sum())).indices.tolist())


def test_a_part_that_is_bound_by_its_name() -> None:
    model = smooth_model()
    opt = make(model, "trace", perturb_fraction=0.5)
    x, y = examples()

    def loss(x: Tensor, y: Tensor, part: Part) -> Tensor:
        return nn.functional.cross_entropy(model(part(x)), part(y))

    opt.step(functools.partial(loss, x.double(), y=y))
    with pytest.raises(ValueError, match=r"part picks examples from a tensor .* got \{"):
        opt.step(lambda part: part({"x": x}).sum())


def test_a_step_without_closure_names_the_scaler_too() -> None:
    with pytest.raises(ValueError, match=r"step needs a closure.*grad_scaler; scaler\.step has no part in it"):
        make(smooth_model()).step()


def test_sgd_asks_nothing_of_a_noise() -> None:
    noise = phisam.gaussian().masked(phisam.fisher_mask())
    model = smooth_model()
    opt = make(model, "sgd", noise=noise)
    x, y = examples()
    closure = lambda: nn.functional.cross_entropy(model(x.double()), y)  # noqa: E731
    expected = torch.autograd.grad(closure(), list(model.parameters()))
    opt.step(closure)  # without `part`, which a Fisher mask would ask for
    assert torch.equal(gradient_of(model), torch.cat([g.reshape(-1) for g in expected]))


def test_a_forward_that_was_patched_onto_a_ddp_wrapper_stays(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(smooth_model())
        calls = []
        own = ddp.forward
        ddp.forward = lambda *inputs: calls.append(1) or own(*inputs)
        opt = make(ddp, "trace", mesh=phisam.sample_mesh(2))
        x, y = examples()
        opt.step(lambda: nn.functional.cross_entropy(ddp(x.double()), y))
        ddp(x.double())
        assert len(calls) == 2  # the step's last point, and ours
    finally:
        torch.distributed.destroy_process_group()
