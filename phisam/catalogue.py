"""The measures that have a name: Table 1 of the paper, its baselines SAM, ASAM, SSAM and SGD, and two of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from phisam import noise as mu
from phisam.measures import Measure, Phi, delta_of, derivative
from phisam.noise import Noise, Scaled


class _OneComponent(Measure):
    """psi: R -> R, so that there is one mu."""

    def n_points(self, n_samples: int) -> int:
        if len(self.noises) > 1:
            raise ValueError(f"{self.name}: {len(self.noises)} noises, but psi has one component: give one noise")
        return super().n_points(n_samples)


class _Linear(_OneComponent):
    """phi(t) = psi(t) = t: w_i = lam / n and w_0 = 1 - lam, whatever the losses are."""

    def __init__(self, noise: Noise, name: str) -> None:
        super().__init__(
            lambda t: t, lambda t: t, noise, name=name, elementwise=True, slope=lambda t: (torch.ones_like(t),)
        )

    def weights(self, losses: Tensor, rho: float, lam: float) -> Tensor:
        """w_0 = 1 - lam, w_i = lam / n."""
        w = torch.full_like(losses, lam / (len(losses) - 1))
        w[0] = 1 - lam
        return w

    def weight_at_x(self, lam: float) -> float:
        return 1 - lam

    def factors(self, losses: Tensor, rho: float, lam: float, log_scale: Tensor | None) -> Tensor:
        """lam / n."""
        return losses.new_full((1,), lam / (len(losses) - 1))


class _Frobenius(Measure):
    """S = sum_i lambda_i^2 = ‖H‖_F^2, row 2 of Table 1; unbiased: Algorithm 3."""

    def __init__(self, unbiased: bool) -> None:
        super().__init__(
            lambda t: 2 * (t[1] - t[0] ** 2),
            lambda t: (t, t**2),
            mu.gaussian(),
            name="frobenius",
            elementwise=True,
            slope=lambda t: (torch.ones_like(t), 2 * t),
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

    def weights(self, losses: Tensor, rho: float, lam: float) -> Tensor:
        """w_0 = 1, w_i = 4 lam (delta_i - mean delta) / (n - 1): Algorithm 3; n in place of n - 1: equation (105)."""
        if len(self.noises) > 1:
            return super().weights(losses, rho, lam)
        delta = delta_of(losses.detach().double(), rho)
        w = 4 * lam / (len(delta) - int(self.unbiased)) * (delta - delta.mean())
        return torch.cat([torch.ones_like(w[:1]), w]).to(losses.dtype)

    def factors(self, losses: Tensor, rho: float, lam: float, log_scale: Tensor | None) -> Tensor:
        """lam / n c (-4 mean delta, 2), c = n / (n - 1); equation (105): c = 1."""
        if len(self.noises) > 1:
            return super().factors(losses, rho, lam, log_scale)
        mean = delta_of(losses.detach().double(), rho).mean()
        n = len(losses) - 1
        c = n / (n - 1) if self.unbiased else 1.0
        return lam / n * torch.stack([-4 * c * mean, torch.full_like(mean, 2 * c)])


class _Exponential(_OneComponent):
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

    def slopes(self, delta: Tensor, point: int) -> tuple[Tensor, Tensor | None]:
        delta = delta.detach().double()
        return torch.full_like(delta, self.sigma)[None], self.sigma * delta

    def factors(self, losses: Tensor, rho: float, lam: float, log_scale: Tensor | None) -> Tensor:
        assert log_scale is not None
        x = self.sigma * delta_of(losses.detach().double(), rho)
        with torch.enable_grad():
            u = _log_mean_exp(x).requires_grad_()
            slope = derivative(self.phi_of_log(u), u)
        factor = lam * slope * torch.exp(log_scale - torch.logsumexp(x, 0))
        return factor[None] if lam else torch.zeros_like(factor)[None]

    def _value(self, delta: Tensor) -> Tensor:
        return self.phi_of_log(_log_mean_exp(self.sigma * delta))


class _Ascent(_Linear):
    """mu is a Dirac at a function of grad L: more draws would be the same point again."""

    def n_points(self, n_samples: int) -> int:
        return super().n_points(1 if self.needs_gradient else n_samples)


class _Unperturbed(Measure):
    """phi = 0: no perturbed point, g = grad L."""

    def __init__(self) -> None:
        super().__init__(lambda t: 0 * t, lambda t: t, (), name="sgd", elementwise=True)

    def with_noise(self, noise: Noise | Sequence[Noise]) -> Self:
        return self

    def n_points(self, n_samples: int) -> int:
        return 0

    def weights(self, losses: Tensor, rho: float, lam: float) -> Tensor:
        return torch.ones_like(losses)

    def value(self, losses: Tensor, rho: float) -> Tensor:
        return losses.new_zeros(())


def trace() -> Measure:
    """phi(t) = psi(t) = t, mu = sphere: S = tr(H) / 2d, row 1 of Table 1. With mu = gaussian: tr(H) / 2.

    w_0 = 1 - lam, so lam > 1 leaves the objective unbounded below; lam = 1 is the loss averaged over the noise.
    """
    return _Linear(mu.sphere(), "trace")


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


def _log_mean_exp(x: Tensor) -> Tensor:
    """log mean_i exp(x_i), exact also for tiny x: max + log1p(mean expm1(x - max))."""
    top = x.detach().amax()
    return top + torch.log1p(torch.expm1(x - top).mean())
