"""(phi, psi): n + 1 losses in, n + 1 weights out.

The objective of Definition 8 with the estimator of Appendix H depends on x through n + 1 losses only,

    F(L_0, ..., L_n) = L_0 + lam rho^2 R_rho,      R_rho = phi( mean_i psi(delta_i) ),
    delta_i = (L_i - L_0) / rho^2,                 L_0 = L(x),  L_i = L(x + rho v_i),

so its gradient is an affine combination of n + 1 gradients, with weights that autograd finds on plain scalars:

    g = sum_e w_e grad L_e,                        w = dF/dL,   sum_e w_e = 1.

That one line (`Measure.weights`) serves Algorithms 1, 2 and 3 of the paper and every other (phi, psi).

A rank that evaluates several points cannot wait for all losses before it adds up gradients. It keeps one running
sum per component of psi, the *rows*, and multiplies each row by one factor at the end:

    w_e = sum_l factor_l * slope_{e,l},            slope_{e,l} = psi'_l(delta_e),
                                                   factor_l = lam / n * d phi / d t_l.

Measures with psi = exp(sigma t) keep their slopes as (mantissa, log_scale), since exp overflows at once.
All arithmetic is in float64: these are n + 1 numbers, and delta divides a small difference by rho^2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from phisam import noise as mu
from phisam.noise import Draw, Noise, Scaled

Phi = Callable[[Tensor], Tensor]
Psi = Callable[[Tensor], Tensor | Sequence[Tensor]]


class Measure:
    """A (phi, psi, mu) sharpness measure, Definition 1: S = phi( E_mu psi( v^T H v / 2 ) ).

    Args:
        phi: R^m -> R. Gets a scalar tensor if m = 1, else a tensor (m,); returns a scalar tensor.
        psi: R -> R^m. Gets a scalar tensor; returns a scalar tensor (m = 1), a tensor (m,) or m scalar tensors.
        noise: mu, or a sequence of m noises, one for each component of psi, as Algorithm 2 and Theorem 7 have it:
            then a step has n m perturbed points, and point 1 + i m + l is the draw i of mu_l.
        name: what tables and logs call it.
        elementwise: psi may be called once on a vector of deltas, and then returns tensors of its shape.

    phi and psi must be differentiable by torch's autograd.

    Raises:
        TypeError: noise is not a Noise or a sequence of them.
    """

    def __init__(
        self,
        phi: Phi,
        psi: Psi,
        noise: Noise | Sequence[Noise],
        *,
        name: str = "custom",
        elementwise: bool = False,
    ) -> None:
        self.phi = phi
        self.psi = psi
        self.name = name
        self.elementwise = elementwise
        self.noises = _noises(noise)

    def __repr__(self) -> str:
        return f"Measure({self.name}, mu={' x '.join(noise.name for noise in self.noises)})"

    def with_noise(self, noise: Noise | Sequence[Noise]) -> Self:
        """The same (phi, psi) with another mu."""
        other = copy.copy(self)
        other.noises = _noises(noise)
        return other

    def n_points(self, n_samples: int) -> int:
        """Perturbed points of a step: n, or n m with one noise per component. A step evaluates one point more.

        Raises:
            ValueError: n_samples is too small for the estimator.
        """
        if n_samples < 1:
            raise ValueError(
                f"{self.name}: n_samples = {n_samples}, but the mean over mu needs n_samples >= 1; "
                "for no perturbation at all use measure=phisam.sgd()"
            )
        if n_samples % 2 and any(noise.paired for noise in self.noises):
            raise ValueError(
                f"{self.name}: n_samples = {n_samples}, but antithetic draws come in pairs v, -v: make it even"
            )
        return n_samples * len(self.noises)

    def evaluations(self, n_samples: int) -> list[int]:
        """Gradient evaluations of the points 0, 1, ..., n: 2 where the noise is symmetric, else 1."""
        return [1, *(len(self.noise_of(point).signs) for point in range(1, self.n_points(n_samples) + 1))]

    def noise_of(self, point: int) -> Noise:
        """mu of a perturbed point e >= 1."""
        return self.noises[(point - 1) % len(self.noises)]

    def draw_of(self, point: int) -> Draw:
        """How the v of a perturbed point e >= 1 is made."""
        noise, m = self.noise_of(point), len(self.noises)
        second_of_pair = noise.paired and (point - 1) // m % 2 == 1
        return Draw(noise, point - m, -1) if second_of_pair else Draw(noise, point, 1)

    @property
    def needs_gradient(self) -> bool:
        """A perturbed point can be made only when grad L(x) is known."""
        return any(noise.of_gradient for noise in self.noises)

    def weights(self, losses: Tensor, rho: float, lam: float) -> Tensor:
        """w = dF/dL, shape (n + 1,), in the dtype of `losses` (n + 1,); sums to 1.

        losses[0] is L(x), losses[e] is L(x + rho v_e). Equations: Algorithms 1 to 3 and section 3 of the docs.
        """
        if lam == 0:  # also where R_rho overflows
            return (torch.arange(len(losses), device=losses.device) == 0).to(losses.dtype)
        with torch.enable_grad():
            L = losses.detach().double().requires_grad_()
            F = L[0] + lam * rho**2 * self._value(_delta(L, rho))
            (w,) = torch.autograd.grad(F, L)
        return w.to(losses.dtype)

    def value(self, losses: Tensor, rho: float) -> Tensor:
        """R_rho of Definition 8, a scalar tensor in the dtype of `losses` (n + 1,)."""
        return self._value(_delta(losses.detach().double(), rho)).detach().to(losses.dtype)

    def slopes(self, delta: Tensor, point: int) -> tuple[Tensor, Tensor | None]:
        """psi'_l(delta_e), l < m, for one perturbed point: (mantissas (m,), log_scale or None for 0)."""
        with torch.enable_grad():
            t = delta.detach().double().requires_grad_()
            components = self._components(t[None])[0]
            slopes = torch.stack([_derivative(component, t) for component in components])
        if len(self.noises) > 1:  # this point is a draw of mu_l: it feeds component l alone
            own = torch.arange(len(self.noises), device=slopes.device) == (point - 1) % len(self.noises)
            slopes = slopes * own
        return slopes, None

    def factors(self, losses: Tensor, rho: float, lam: float, log_scale: Tensor | None) -> Tensor:
        """lam / n * d phi / d t_l, shape (m,), times exp(log_scale): what rows of slopes are multiplied by."""
        assert log_scale is None
        psi = self._mean_inputs(_delta(losses.detach().double(), rho))
        with torch.enable_grad():
            t = psi.mean(0).detach().requires_grad_()
            partial_phi = _derivative(self._phi(t, len(psi)), t)
        return lam / len(psi) * partial_phi

    def _value(self, delta: Tensor) -> Tensor:
        psi = self._mean_inputs(delta)
        return self._phi(psi.mean(0), len(psi))

    def _phi(self, t: Tensor, n: int) -> Tensor:
        """phi for t (m,); n lets a subclass correct the bias of its estimator."""
        value = self.phi(t if t.numel() > 1 else t.reshape(()))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"{self.name}: phi must return one number as a tensor, got {value!r}")
        return value.reshape(())

    def _mean_inputs(self, delta: Tensor) -> Tensor:
        """psi as (n, m): what the mean over the n draws is taken of."""
        psi = self._components(delta)
        m = len(self.noises)
        if m == 1:
            return psi
        if psi.shape[1] != m:
            raise ValueError(f"{self.name}: {m} noises need a psi with {m} components, it has {psi.shape[1]}")
        return psi.reshape(-1, m, m).diagonal(dim1=1, dim2=2)

    def _components(self, delta: Tensor) -> Tensor:
        """psi of every delta (N,), as a tensor (N, m)."""
        if self.elementwise:
            psi = self.psi(delta)
            return psi[:, None] if isinstance(psi, Tensor) else torch.stack(list(psi), dim=-1)
        return torch.stack([self._vector(self.psi(delta_i)) for delta_i in delta])

    def _vector(self, psi: Tensor | Sequence[Tensor]) -> Tensor:
        parts = [psi] if isinstance(psi, Tensor) else list(psi) if isinstance(psi, Sequence) else []
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(f"{self.name}: psi must return a tensor or a sequence of tensors, got {psi!r}")
        return torch.cat([part.reshape(-1) for part in parts])


class _Frobenius(Measure):
    """S = sum_i lambda_i^2 = ‖H‖_F^2, row 2 of Table 1; unbiased: Algorithm 3."""

    def __init__(self, unbiased: bool) -> None:
        super().__init__(
            lambda t: 2 * (t[1] - t[0] ** 2),
            lambda t: (t, t**2),
            mu.gaussian(),
            name="frobenius",
            elementwise=True,
        )
        self.unbiased = unbiased

    def n_points(self, n_samples: int) -> int:
        if self.unbiased and n_samples < 2:
            raise ValueError(
                f"frobenius: n_samples = {n_samples}, but the unbiased covariance of Algorithm 3 divides by n - 1; "
                "use n_samples >= 2, or measure=phisam.frobenius(unbiased=False)"
            )
        if n_samples == 2 and any(noise.paired for noise in self.noises):
            raise ValueError(
                "frobenius: n_samples = 2 antithetic draws are one pair, whose deltas differ by the gradient alone, so "
                "that nothing of the Hessian would be seen; use symmetric(), or n_samples >= 4"
            )
        return super().n_points(n_samples)

    def _phi(self, t: Tensor, n: int) -> Tensor:
        return super()._phi(t, n) * (n / (n - 1) if self.unbiased else 1.0)

    def _value(self, delta: Tensor) -> Tensor:
        if len(self.noises) > 1:
            return super()._value(delta)
        if self.unbiased and len(delta) < 2:
            self.n_points(len(delta))
        # 2 (mean delta^2 - (mean delta)^2) without its cancellation.
        return 2 * delta.var(correction=int(self.unbiased))


class _Exponential(Measure):
    """psi(t) = exp(sigma t), with phi given on u = log t, so that nothing overflows.

    With u = log mean_i exp(sigma delta_i):  w_i = lam sigma d phi/du softmax(sigma delta)_i.
    """

    def __init__(self, name: str, sigma: float, phi_of_log: Phi, noise: Noise) -> None:
        super().__init__(
            lambda t: phi_of_log(torch.log(t)),
            lambda t: torch.exp(sigma * t),
            noise,
            name=name,
            elementwise=True,
        )
        self.sigma = sigma
        self.phi_of_log = phi_of_log

    def n_points(self, n_samples: int) -> int:
        if len(self.noises) > 1:
            raise ValueError(f"{self.name}: {len(self.noises)} noises, but psi has one component: give one noise")
        return super().n_points(n_samples)

    def slopes(self, delta: Tensor, point: int) -> tuple[Tensor, Tensor | None]:
        delta = delta.detach().double()
        return torch.full_like(delta, self.sigma)[None], self.sigma * delta

    def factors(self, losses: Tensor, rho: float, lam: float, log_scale: Tensor | None) -> Tensor:
        assert log_scale is not None
        x = self.sigma * _delta(losses.detach().double(), rho)
        with torch.enable_grad():
            u = _log_mean_exp(x).requires_grad_()
            slope = _derivative(self.phi_of_log(u), u)
        factor = lam * slope * torch.exp(log_scale - torch.logsumexp(x, 0))
        return factor[None] if lam else torch.zeros_like(factor)[None]

    def _value(self, delta: Tensor) -> Tensor:
        return self.phi_of_log(_log_mean_exp(self.sigma * delta))


class _Ascent(Measure):
    """phi(t) = psi(t) = t with mu a Dirac at a function of grad L: more draws would be the same point again."""

    def __init__(self, noise: Noise, name: str) -> None:
        super().__init__(lambda t: t, lambda t: t, noise, name=name, elementwise=True)

    def n_points(self, n_samples: int) -> int:
        return 1 if all(noise.of_gradient for noise in self.noises) else super().n_points(n_samples)


class _Unperturbed(Measure):
    """phi = 0: no perturbed point, g = grad L."""

    def __init__(self) -> None:
        super().__init__(lambda t: 0 * t, lambda t: t, (), name="sgd", elementwise=True)

    def n_points(self, n_samples: int) -> int:
        return 0

    def _value(self, delta: Tensor) -> Tensor:
        return delta.sum()  # of no numbers: zero, on the right device


def trace() -> Measure:
    """phi(t) = psi(t) = t, mu = sphere: S = tr(H) / 2d, row 1 of Table 1. With mu = gaussian: tr(H) / 2.

    w_0 = 1 - lam, so lam > 1 leaves the objective unbounded below; lam = 1 is the loss averaged over the noise.
    """
    return Measure(lambda t: t, lambda t: t, mu.sphere(), name="trace", elementwise=True)


def frobenius(unbiased: bool = True) -> Measure:
    """phi(t) = 2 (t_2 - t_1^2), psi(t) = (t, t^2), mu = N(0, I): S = sum_i lambda_i^2 = ‖H‖_F^2, row 2 of Table 1.

    The same draws serve both components. unbiased=True is Algorithm 3 (Frob-SAM): phi carries n / (n - 1) and
    w_i = 4 lam (L_i - mean L) / (rho^2 (n - 1)), which needs n_samples >= 2. unbiased=False is equation (105).
    """
    return _Frobenius(unbiased)


def determinant() -> Measure:
    """phi(t) = 1 / t^2, psi(t) = exp(-t), mu = hypercube(0.01): S proportional to det H, row 3 of Table 1 (Det-SAM).

    The constant (2 pi)^d of the table overflows for any network; it is absorbed in lam.
    w_i = 2 lam exp(-2 log T) softmax(-delta)_i with T = mean exp(-delta), computed in the log domain.
    """
    return _Exponential("determinant", -1.0, lambda u: torch.exp(-2 * u), mu.hypercube())


def log_determinant() -> Measure:
    """phi(t) = -2 log t, psi(t) = exp(-t), mu = hypercube(0.01): S = log det H up to a constant.

    Not in the paper's table: monotone in `determinant`, with weights w_i = 2 lam softmax(-delta)_i that stay
    bounded whatever the losses do.
    """
    return _Exponential("log_determinant", -1.0, lambda u: -2 * u, mu.hypercube())


def exp_product(sigma: float) -> Measure:
    """phi(t) = 1 / t^2, psi(t) = exp(sigma t), mu = N(0, I): S = prod_i (1 - sigma lambda_i), row 4 of Table 1.

    Finite only while sigma lambda_i < 1 for all i, equation (46).

    Raises:
        ValueError: sigma is not a finite number other than 0.
    """
    if not math.isfinite(sigma) or sigma == 0:
        raise ValueError(f"exp_product: sigma must be a finite number other than 0, got {sigma!r}")
    return _Exponential("exp_product", float(sigma), lambda u: torch.exp(-2 * u), mu.gaussian())


def eigen_power(k: int, phi: Phi | None = None) -> Measure:
    """psi(t) = t^k, any phi (the identity by default), mu = sphere: a polynomial of the eigenvalues, (13) to (17).

    Raises:
        ValueError: k is not an integer >= 1.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"eigen_power: k must be an integer >= 1, got {k!r}")
    return Measure(phi or (lambda t: t), lambda t: t**k, mu.sphere(), name="eigen_power", elementwise=True)


def sam() -> Measure:
    """phi(t) = psi(t) = t, mu = Dirac at grad L / ‖grad L‖: SAM (Foret et al. 2021), Appendix H with n = 1.

    g = (1 - lam) grad L(x) + lam grad L(x + rho grad L / ‖grad L‖): with lam = 1 the gradient at the ascent point,
    which is SAM. One perturbed point, whatever n_samples is.
    """
    return _Ascent(mu.gradient_direction(), "sam")


def asam(eta: float = 0.01, scaled: Scaled = "all") -> Measure:
    """phi(t) = psi(t) = t, mu = Dirac at T^2 grad L / ‖T grad L‖, T = |x| + eta: ASAM (Kwon et al. 2021).

    Packages differ in which parameters T scales, and rho does not carry over between them: scaled = "all" scales every
    tensor; "weight" those with "weight" in their name, as the code of ASAM's authors does (T = 1 for the others).

    Raises:
        ValueError: eta is negative or not finite, or scaled is neither.
    """
    return _Ascent(mu.gradient_direction().adaptive(eta, scaled), "asam")


def ssam(sparsity: float = 0.5, fisher_samples: int = 16, refresh_every: int = 391) -> Measure:
    """phi(t) = psi(t) = t, mu = Dirac at mask * grad L / ‖grad L‖: SSAM-F (Mi et al. 2022), see `phisam.fisher_mask`.

    The closure must take `part`, since the mask looks at single examples.

    Raises:
        ValueError: sparsity is not in [0, 1), or a count is not an integer >= 1.
    """
    return _Ascent(mu.gradient_direction().masked(mu.fisher_mask(sparsity, fisher_samples, refresh_every)), "ssam")


def sgd() -> Measure:
    """phi = 0: the base optimizer alone, through the same step. n_samples, rho, lam and noise have no effect."""
    return _Unperturbed()


def _delta(losses: Tensor, rho: float) -> Tensor:
    """delta_i = (L_i - L_0) / rho^2, shape (n,)."""
    return (losses[1:] - losses[0]) / rho**2


def _log_mean_exp(x: Tensor) -> Tensor:
    """log mean_i exp(x_i), exact also for tiny x: max + log1p(mean expm1(x - max))."""
    top = x.detach().amax()
    return top + torch.log1p(torch.expm1(x - top).mean())


def _derivative(y: Tensor, t: Tensor) -> Tensor:
    """dy/dt; zero where y does not depend on t."""
    if not y.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(y, t, retain_graph=True, materialize_grads=True)[0]


def _noises(noise: Noise | Sequence[Noise]) -> tuple[Noise, ...]:
    noises = (noise,) if isinstance(noise, Noise) else tuple(noise) if isinstance(noise, Sequence) else (noise,)
    if not all(isinstance(part, Noise) for part in noises):
        raise TypeError(f"noise must be a phisam noise (phisam.gaussian(), ...) or a list of them, got {noise!r}")
    return noises
