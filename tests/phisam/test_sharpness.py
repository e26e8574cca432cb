"""phisam.sharpness against the dense float64 Hessian of three small networks: values, standard errors, refusals."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

import phisam
from phisam import sharpness
from tests.phisam.sharpness_cases import NETWORKS, batches, dense, hessian, network

EXACT = {"rtol": 0.0, "atol": 1e-10}


def assert_within(estimate: sharpness.Estimate, exact: float | Tensor, errors: float = 4.0) -> None:
    assert estimate.standard_error > 0
    assert abs(estimate.value - float(exact)) <= errors * estimate.standard_error, (estimate, float(exact))


# Products


@pytest.mark.parametrize("name", NETWORKS)
def test_matrix_is_the_dense_hessian(name: str) -> None:
    torch.testing.assert_close(hessian(name).dense(), dense(name), **EXACT)


def test_the_model_is_left_alone() -> None:
    model = network("batchnorm")
    before = copy.deepcopy(model.state_dict())
    h = sharpness.Hessian(model, nn.CrossEntropyLoss(), batches())
    H = h.dense()
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    torch.testing.assert_close(h.dense(), H, rtol=0, atol=0)


def test_chunk_changes_nothing() -> None:
    V = torch.randn(hessian("tanh").d, 7, dtype=torch.float64, generator=Generator().manual_seed(1))
    torch.testing.assert_close(hessian("tanh", chunk=3).matvec(V), hessian("tanh").matvec(V), **EXACT)
    few, many = (sharpness.frobenius_squared(hessian("tanh", chunk=chunk), probes=10) for chunk in (3, 25))
    assert few.value == pytest.approx(many.value, rel=1e-12)
    assert few.standard_error == pytest.approx(many.standard_error, rel=1e-10)


def test_one_chunk_of_vectors_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    h = hessian("tanh", chunk=4)
    widths: list[int] = []
    matvec = h.matvec
    monkeypatch.setattr(h, "matvec", lambda V: widths.append(V.shape[1]) or matvec(V))
    sharpness.trace(h, probes=10)
    assert widths == [4, 4, 2]


def test_only_trained_parameters_count() -> None:
    model = network("relu")
    model[0].requires_grad_(False)
    h = sharpness.Hessian(model, nn.CrossEntropyLoss(), batches())
    frozen = sum(p.numel() for p in model[0].parameters())
    assert h.names[0] == "2.weight"
    torch.testing.assert_close(h.dense(), dense("relu")[frozen:, frozen:], **EXACT)


def test_loss_gradient_and_layout() -> None:
    model = network("tanh").double()
    h = hessian("tanh")
    inputs = torch.cat([batch[0] for batch in batches()]).double()
    targets = torch.cat([batch[1] for batch in batches()])
    loss = nn.functional.cross_entropy(model(inputs), targets)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert h.loss() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(h.unflatten(h.gradient()), dict(zip(h.names, gradient, strict=True)), **EXACT)
    torch.testing.assert_close(h.unflatten(h.parameters()), {n: p.detach() for n, p in model.named_parameters()})


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network("tanh")

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.inner(inputs["x"])


def test_inputs_may_be_a_mapping() -> None:
    named = [({"x": inputs}, targets) for inputs, targets in batches()]
    h = sharpness.Hessian(ByName(), nn.CrossEntropyLoss(), named)
    torch.testing.assert_close(h.dense(), dense("tanh"), **EXACT)
    assert sharpness.measure(h, phisam.ssam()).value == sharpness.measure(hessian("tanh"), phisam.ssam()).value


# Trace and Frobenius norm


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_and_frobenius(name: str) -> None:
    trace, frobenius = sharpness.trace_and_frobenius(hessian(name), probes=400)
    assert_within(trace, dense(name).trace())
    assert_within(frobenius, dense(name).square().sum())
    assert trace.probes == frobenius.probes == 400


def test_standard_errors_are_those_of_theory() -> None:
    """Var z^T H z = 2 ‖H‖_F^2 and Var ‖H z‖^2 = 2 tr H^4 for Gaussian z."""
    H = dense("tanh")
    trace, frobenius = sharpness.trace_and_frobenius(hessian("tanh"), probes=2000)
    assert trace.standard_error == pytest.approx(math.sqrt(2 * float(H.square().sum()) / 2000), rel=0.1)
    assert frobenius.standard_error == pytest.approx(math.sqrt(2 * float((H @ H).square().sum()) / 2000), rel=0.15)


def test_intervals_cover() -> None:
    """Of 100 measurements about 95 lie within 2 standard errors; fewer than 88 would have a chance below 1 %."""
    h, exact = hessian("relu", chunk=50), float(dense("relu").square().sum())
    estimates = [sharpness.frobenius_squared(h, probes=50, seed=seed) for seed in range(100)]
    inside = sum(abs(e.value - exact) <= 2 * e.standard_error for e in estimates)
    assert inside >= 86
    spread = torch.tensor([e.value for e in estimates]).std()
    assert float(spread) == pytest.approx(sum(e.standard_error for e in estimates) / 100, rel=0.3)


def test_probes_are_seeded() -> None:
    h = hessian("tanh")
    assert sharpness.trace(h, 5, seed=1) == sharpness.trace(h, 5, seed=1)
    assert sharpness.trace(h, 5, seed=1).value != sharpness.trace(h, 5, seed=2).value


# Eigenvalues


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_top_eigenvalues(name: str, which: sharpness.eigenvalues.Which) -> None:
    exact = torch.linalg.eigvalsh(dense(name))
    order = {"largest": exact.flip(0), "smallest": exact, "magnitude": exact[exact.abs().argsort(descending=True)]}
    found = sharpness.top_eigenvalues(hessian(name), 3, which=which, tolerance=1e-8)
    assert found.converged
    torch.testing.assert_close(found.values, order[which][:3], **EXACT)
    residuals = torch.linalg.vector_norm(dense(name) @ found.vectors - found.vectors * found.values, dim=0)
    torch.testing.assert_close(found.residuals, residuals, **EXACT)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(3, dtype=torch.float64), **EXACT)


def test_eigenvalues_that_are_not_there_yet_say_so() -> None:
    exact = torch.linalg.eigvalsh(dense("tanh"))
    found = sharpness.top_eigenvalues(hessian("tanh"), 2, max_products=5)
    assert not found.converged
    assert found.products == 7
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (exact - value).abs().min() <= residual
    assert [e.name for e in found.estimates()] == ["top_eigenvalue", "top_eigenvalue_2"]
    assert found.estimates()[0].standard_error == found.residuals[0].item()


def quadratic(eigenvalues: Tensor) -> sharpness.Hessian:
    """L = x^T diag(eigenvalues) x / 2 at a random x."""

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(len(eigenvalues)))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.x.expand(len(inputs), -1)

    def criterion(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs.square() * eigenvalues).sum() / (2 * len(outputs))

    return sharpness.Hessian(Vector(), criterion, [(torch.zeros(2, 1), torch.zeros(2))])


def test_multiple_eigenvalues_are_all_found() -> None:
    spectrum = torch.cat([torch.tensor([5.0, 5.0, 5.0]), torch.linspace(-1, 2, 97)]).double()
    found = sharpness.top_eigenvalues(quadratic(spectrum), 4, tolerance=1e-10)
    torch.testing.assert_close(found.values, spectrum.new_tensor([5.0, 5.0, 5.0, 2.0]), **EXACT)
    no_multiplicity = sharpness.top_eigenvalues(quadratic(torch.ones(40).double()), 3)
    torch.testing.assert_close(no_multiplicity.values, torch.ones(3).double(), **EXACT)


# Spectrum


@pytest.mark.parametrize("name", NETWORKS)
def test_spectral_density(name: str) -> None:
    exact = torch.linalg.eigvalsh(dense(name))
    density = sharpness.spectral_density(hessian(name), probes=60, steps=10)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(60, dtype=torch.float64), **EXACT)
    for k in (1, 2, 3, 4):
        assert_within(density.trace_of(lambda t, k=k: t**k, "power"), (exact**k).sum())
    curve, error = density.curve(torch.linspace(-2, 4, 601), width=0.1)
    bumps = torch.exp(-((torch.linspace(-2, 4, 601, dtype=torch.float64)[:, None] - exact) ** 2) / 0.02)
    expected = (bumps / (0.1 * math.sqrt(2 * math.pi))).mean(1)
    assert float(curve.sum() * 0.01) == pytest.approx(1.0, abs=0.02)
    assert ((curve - expected).abs() <= 5 * error + 2e-3).all()


def test_quadrature_is_that_of_the_dense_matrix() -> None:
    """Probe by probe, and also where every eigenvalue has long converged: no ghosts."""
    h, H = hessian("tanh"), dense("tanh")
    density = sharpness.spectral_density(h, probes=3, steps=h.d)
    for probe in range(3):
        v = sharpness.probes.draw(h, phisam.gaussian(), 0, range(probe, probe + 1))[:, 0]
        q = v / v.norm()
        power = q
        for k in range(1, 8):
            power = H @ power
            quadrature = (density.nodes[probe] ** k * density.weights[probe]).sum()
            torch.testing.assert_close(quadrature, q @ power, **EXACT)
        log = torch.log1p(density.nodes[probe].abs() / 1e-3) @ density.weights[probe]
        values, vectors = torch.linalg.eigh(H)
        torch.testing.assert_close(log, torch.log1p(values.abs() / 1e-3) @ (vectors.T @ q) ** 2, rtol=1e-6, atol=0)


def test_steps_are_doubled_until_stable() -> None:
    smooth = sharpness.spectral_density(quadratic(torch.linspace(1, 2, 400).double()), probes=2, tolerance=0.05)
    strict = sharpness.spectral_density(quadratic(torch.linspace(1, 2, 400).double()), probes=2, tolerance=0.005)
    assert smooth.stable
    assert strict.stable
    assert smooth.steps.max() < strict.steps.min() < 400
    assert not sharpness.spectral_density(quadratic(torch.linspace(-1, 2, 400).double()), 2, steps=4).stable
    few_values = sharpness.spectral_density(quadratic(torch.tensor([1.0, 2.0, 3.0] * 50).double()), probes=2)
    assert few_values.steps.tolist() == [3, 3]


@pytest.mark.parametrize("name", NETWORKS)
def test_log_determinant(name: str) -> None:
    exact = torch.linalg.eigvalsh(dense(name)).abs()
    ladder = (1e-4, 1e-2, 1.0)
    for delta, estimate in zip(ladder, sharpness.log_determinant(hessian(name), ladder, probes=20), strict=True):
        assert estimate.name == f"log_determinant_{delta:g}"
        assert_within(estimate, torch.log1p(exact / delta).sum())


def test_what_the_steps_leave_open_is_in_the_standard_error() -> None:
    spectrum = torch.linspace(-1, 1, 120).double() ** 3
    exact = torch.log1p(spectrum.abs() / 1e-3).sum()
    (rough,) = sharpness.log_determinant(quadratic(spectrum), [1e-3], probes=40, steps=6)
    (fine,) = sharpness.log_determinant(quadratic(spectrum), [1e-3], probes=40)
    assert rough.standard_error > 2 * fine.standard_error
    assert_within(rough, exact)
    assert_within(fine, exact)


# GGN


@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_through_the_gram_matrix(name: str) -> None:
    ggn = sharpness.GGN(network(name), nn.CrossEntropyLoss(), batches())
    exact = torch.linalg.eigvalsh(dense_ggn(name)).flip(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(ggn.dense()).flip(0), exact, **EXACT)
    spectrum = sharpness.ggn_spectrum(ggn)
    torch.testing.assert_close(spectrum.eigenvalues, exact[: len(spectrum.eigenvalues)], **EXACT)
    expected = torch.log1p(exact.clamp_min(0) / 0.01).sum()
    assert spectrum.log_determinant(0.01).value == pytest.approx(float(expected), abs=1e-8)


def dense_ggn(name: str) -> Tensor:
    """sum_n J_n^T A_n J_n / N with A_n = diag(p) - p p^T."""
    model = network(name).double().eval()
    inputs = torch.cat([batch[0] for batch in batches()]).double()
    state = {n: p.detach() for n, p in model.named_parameters()}
    J = torch.func.jacrev(lambda state: torch.func.functional_call(model, state, (inputs,)))(state)
    J = torch.cat([part.reshape(30, 3, -1) for part in J.values()], dim=2)
    p = model(inputs).softmax(1).detach()
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncd,nce,nef->df", J, A, J) / 30


def test_log_pseudo_determinant() -> None:
    """A linear model on few examples: the rank is N C, and the Gram matrix is known in closed form."""
    X = torch.randn(4, 9, dtype=torch.float64, generator=Generator().manual_seed(2))
    model = nn.Linear(9, 2, bias=False)
    ggn = sharpness.GGN(model, nn.MSELoss(), [(X[:3], torch.zeros(3, 2)), (X[3:], torch.zeros(1, 2))])
    estimate = sharpness.ggn_log_determinant(ggn)
    expected = 2 * torch.logdet(X @ X.T * (2 / (4 * 2)))
    assert estimate.value == pytest.approx(float(expected), abs=1e-10)
    assert estimate.standard_error == 0
    with pytest.raises(ValueError, match="N C = 4 examples x 2 outputs = 8 is beyond the limit of 7"):
        sharpness.ggn_log_determinant(ggn, limit=7)
    with pytest.raises(TypeError, match=r"expected a sharpness\.GGN, got a Hessian"):
        sharpness.ggn_log_determinant(hessian("tanh"))  # type: ignore[arg-type]


def test_criterion_without_a_gram_matrix_is_refused() -> None:
    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.square().mean()

    with pytest.raises(sharpness.Unmeasurable, match="not convex in the model's outputs"):
        sharpness.ggn_spectrum(sharpness.GGN(network("tanh"), concave, batches()))


# Measures of Definition 1

EXACT_MEASURES: dict[str, tuple[Callable[[], phisam.Measure], Callable[[Tensor], Tensor]]] = {
    "trace": (phisam.trace, lambda e: e.sum() / (2 * len(e))),
    "trace, gaussian": (lambda: phisam.trace().with_noise(phisam.gaussian()), lambda e: e.sum() / 2),
    "frobenius": (phisam.frobenius, lambda e: e.square().sum()),
    "frobenius, biased": (lambda: phisam.frobenius(unbiased=False), lambda e: e.square().sum()),
    "exp_product": (lambda: phisam.exp_product(0.1), lambda e: (1 - 0.1 * e).prod()),
    "second moment": (
        lambda: phisam.eigen_power(2).with_noise(phisam.gaussian()),
        lambda e: (2 * e.square().sum() + e.sum() ** 2) / 4,
    ),
    "two noises": (
        lambda: phisam.Measure(
            lambda t: t[0] * t[1], lambda t: (t, t**2), [phisam.gaussian(), phisam.sphere()], elementwise=True
        ),
        lambda e: e.sum() / 2 * (2 * e.square().sum() + e.sum() ** 2) / (4 * len(e) * (len(e) + 2)),
    ),
}


@pytest.mark.parametrize("case", EXACT_MEASURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_measures(name: str, case: str) -> None:
    make, exact = EXACT_MEASURES[case]
    assert_within(sharpness.measure(hessian(name), make(), probes=400), exact(torch.linalg.eigvalsh(dense(name))))


def test_frobenius_is_the_u_statistic() -> None:
    """t_2 - t_1^2 by draws without repetition: 2 / (n (n - 1)) sum_{i < j} (t_i - t_j)^2 / 1, for both spellings."""
    h = hessian("tanh")
    V = sharpness.probes.draw(h, phisam.gaussian(), 0, range(12))
    t = ((h.matvec(V) * V).sum(0)) / 2
    pairs = [(t[i] - t[j]) ** 2 for i in range(12) for j in range(i)]
    expected = float(torch.stack(pairs).mean())
    for unbiased in (True, False):
        found = sharpness.measure(h, phisam.frobenius(unbiased), probes=12)
        assert found.value == pytest.approx(expected, rel=1e-10)


def test_jackknife_takes_the_bias_and_its_interval_covers() -> None:
    """phi = exp of the mean of 20 normals: the plain value is 2.5 % too large, far beyond what the test lets pass."""
    generator = Generator().manual_seed(6)
    estimates = [
        sharpness.estimate.jackknife(
            lambda draws: draws.mean().exp(), torch.randn(20, dtype=torch.float64, generator=generator), "exp"
        )
        for _ in range(1500)
    ]
    values = torch.tensor([e.value for e in estimates])
    assert float(values.mean()) == pytest.approx(1.0, abs=4 * float(values.std()) / 1500**0.5)
    inside = sum(abs(e.value - 1) <= 2 * e.standard_error for e in estimates) / 1500
    assert 0.9 < inside < 0.97


def test_measures_of_one_direction_are_exact() -> None:
    h, H = hessian("tanh"), dense("tanh")
    g, x = h.gradient(), h.parameters()
    unit = g / g.norm()
    sam = sharpness.measure(h, phisam.sam())
    assert sam.value == pytest.approx(float(unit @ H @ unit / 2), abs=1e-12)
    assert (sam.standard_error, sam.probes) == (0.0, 1)
    T = x.abs() + 0.01
    v = T * T * g / (T * g).norm()
    assert sharpness.measure(h, phisam.asam()).value == pytest.approx(float(v @ H @ v / 2), abs=1e-12)
    e = torch.zeros(h.d)
    e[3] = 1
    third = sharpness.measure(h, phisam.trace().with_noise(phisam.dirac(e)))
    assert third.value == pytest.approx(float(H[3, 3] / 2), abs=1e-12)


def test_options_of_the_noise() -> None:
    h, H = hessian("relu"), dense("relu")
    T = h.parameters().abs()
    mask = (torch.arange(h.d) % 3 == 0).double()
    adaptive = phisam.trace().with_noise(phisam.gaussian().adaptive())
    assert_within(sharpness.measure(h, adaptive, 400), (T * T * H.diagonal()).sum() / 2)
    masked = phisam.trace().with_noise(phisam.gaussian().masked(mask))
    assert_within(sharpness.measure(h, masked, 400), (mask * H.diagonal()).sum() / 2)
    plain, paired = phisam.trace(), phisam.trace().with_noise(phisam.sphere().antithetic())
    assert sharpness.measure(h, plain, 9).value == sharpness.measure(h, paired, 9).value


def shifted(lowest: float) -> sharpness.Hessian:
    return quadratic(torch.linspace(lowest, 0.2, 30).double())


@pytest.mark.parametrize("psi", [lambda t: torch.exp(-t), lambda t: t + torch.cosh(t)], ids=["exp", "cosh"])
def test_infinite_variance_is_refused(psi: Callable[[Tensor], Tensor]) -> None:
    """E exp(-t)^2 = prod (1 + 2 lambda)^{-1/2} under N(0, I): infinite from lambda = -1/2 on."""
    measure = phisam.Measure(lambda t: t, psi, phisam.gaussian())
    assert sharpness.measure(shifted(-0.45), measure, probes=5).probes == 5
    with pytest.raises(sharpness.Unmeasurable, match=r"infinite here.*smallest eigenvalue.*-0\.55, beyond -0\.5"):
        sharpness.measure(shifted(-0.55), measure)
    assert sharpness.measure(shifted(-0.55), measure.with_noise(phisam.hypercube(1.0)), probes=5).probes == 5
    small = phisam.gaussian().masked(torch.full((30,), 0.5))  # s = 1/2: from lambda = -2 on
    assert sharpness.measure(shifted(-1.9), measure.with_noise(small), probes=5).probes == 5
    with pytest.raises(sharpness.Unmeasurable, match="infinite"):
        sharpness.measure(shifted(-2.1), measure.with_noise(small))


@pytest.mark.parametrize(
    ("psi", "rate"),
    [
        (lambda t: torch.exp(3 * t), 3.0),
        (lambda t: torch.exp(1e-3 * t) * t**2, 1e-3),
        (lambda t: torch.exp(t**2), math.inf),
        (lambda t: 1 + t**4, 0.0),
        (lambda t: torch.tanh(t), 0.0),
        (lambda t: torch.exp(-t), 0.0),
        (lambda t: torch.exp(t.abs().sqrt()), 0.0),
        (lambda t: (t, torch.exp(2 * t)), 2.0),
    ],
)
def test_growth_of_psi(psi: phisam.measures.Psi, rate: float) -> None:
    measure = phisam.Measure(lambda t: t, psi, phisam.gaussian())
    assert sharpness.definition1._growth(measure, 1) == pytest.approx(rate, rel=0.05)


# Refusals


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v = self.map(inputs)[:, None, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0, 0, :3]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient  # type: ignore[attr-defined]


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.map = nn.Linear(4, 3)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.map(inputs))


def test_attention_names_what_to_set() -> None:
    h = sharpness.Hessian(Attention(), nn.CrossEntropyLoss(), batches())
    with pytest.raises(sharpness.Unmeasurable, match=r"_scaled_dot_product.*SDPBackend\.MATH"):
        sharpness.trace(h)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert math.isfinite(sharpness.trace(h, 3).value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda h: torch.cdist(h, h)[:, :3], "_cdist_forward, which has no second derivative"),
        (Square.apply, "autograd.Function without `setup_context` and `jvp`"),
        (
            lambda h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
            "activation checkpointing.*switch that off",
        ),
    ],
    ids=["cdist", "function", "checkpoint"],
)
def test_operations_without_a_second_derivative(function: Callable[[Tensor], Tensor], said: str) -> None:
    h = sharpness.Hessian(Calls(function), nn.CrossEntropyLoss(), batches())
    with pytest.raises(sharpness.Unmeasurable, match=said):
        sharpness.trace(h)


def test_randomness_in_evaluation_mode_is_refused() -> None:
    noisy = Calls(lambda h: nn.functional.dropout(h, 0.5, training=True))
    with pytest.raises(sharpness.Unmeasurable, match=r"two forward passes .*a dropout with training=True"):
        sharpness.Hessian(noisy, nn.CrossEntropyLoss(), batches())
    usual = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    without = nn.Sequential(usual[0])
    got, expected = (sharpness.Hessian(m, nn.CrossEntropyLoss(), batches()).dense() for m in (usual, without))
    torch.testing.assert_close(got, expected, **EXACT)


def test_mistakes_in_arguments() -> None:
    with pytest.raises(ValueError, match='its reduction is "sum"'):
        sharpness.Hessian(network("tanh"), nn.CrossEntropyLoss(reduction="sum"), batches())
    with pytest.raises(ValueError, match=r"a scalar tensor, but got \(8, 3\)"):
        sharpness.Hessian(network("tanh"), lambda outputs, targets: outputs, batches())
    with pytest.raises(ValueError, match="no batch"):
        sharpness.Hessian(network("tanh"), nn.CrossEntropyLoss(), [])
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        sharpness.Hessian(network("tanh").requires_grad_(False), nn.CrossEntropyLoss(), batches())
    with pytest.raises(ValueError, match="needs probes >= 2"):
        sharpness.trace(hessian("tanh"), probes=1)
    with pytest.raises(ValueError, match="k = 0"):
        sharpness.top_eigenvalues(hessian("tanh"), 0)
    with pytest.raises(ValueError, match="every delta must be a positive number"):
        sharpness.log_determinant(hessian("tanh"), [0.0])
    with pytest.raises(ValueError, match="no sharpness to measure"):
        sharpness.measure(hessian("tanh"), phisam.sgd())


# Around it


def test_progress_reaches_the_end() -> None:
    h = hessian("tanh", chunk=4)
    calls: dict[str, list[tuple[int, int]]] = {}

    def to(name: str) -> sharpness.Progress:
        return lambda done, total: calls.setdefault(name, []).append((done, total))

    sharpness.trace(h, 10, progress=to("trace"))
    sharpness.measure(h, phisam.frobenius(), 10, progress=to("measure"))
    sharpness.top_eigenvalues(h, progress=to("top"))
    sharpness.spectral_density(h, 3, progress=to("density"))
    sharpness.ggn_spectrum(sharpness.GGN(network("tanh"), nn.CrossEntropyLoss(), batches()), progress=to("ggn"))
    assert len(calls) == 5
    for steps in calls.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_probes_within_a_time() -> None:
    h = hessian("tanh")
    assert sharpness.probes_within(h, 1e-9) == 2
    assert sharpness.probes_within(h, 1e6, most=50) == 50


def test_curvlinops_is_imported_when_it_is_needed() -> None:
    """With -W error: what its import warns of reaches nobody. Without it: the message says what to install."""
    used = (
        "import sys, torch, phisam\n"
        "assert 'curvlinops' not in sys.modules\n"
        "model = torch.nn.Linear(2, 2)\n"
        "data = [(torch.ones(3, 2), torch.zeros(3, 2))]\n"
        "h = phisam.sharpness.Hessian(model, torch.nn.MSELoss(), data)\n"
        "phisam.sharpness.trace(h, 2)\n"
        "sys.modules['curvlinops'] = None\n"
        "try:\n    phisam.sharpness.Hessian(model, torch.nn.MSELoss(), data)\n"
        "except ImportError as error:\n    assert 'phisam[sharpness]' in str(error)\n"
        "else:\n    raise SystemExit('no ImportError')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", used], check=True, timeout=300)
