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
The measures that have a name are in `catalogue.py`.
All arithmetic is in float64: these are n + 1 numbers, and delta divides a small difference by rho^2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from phisam.noise import Draw, Noise

Phi = Callable[[Tensor], Tensor]
Psi = Callable[[Tensor], Tensor | Sequence[Tensor]]
Slope = Callable[[Tensor], Sequence[Tensor]]


class Measure:
    """A (phi, psi, mu) sharpness measure, Definition 1: S = phi( E_mu psi( v^T H v / 2 ) ).

    Args:
        phi: R^m -> R. Gets a scalar tensor if m = 1, else a tensor (m,); returns a scalar tensor.
        psi: R -> R^m. Gets a scalar tensor; returns a scalar tensor (m = 1), a tensor (m,) or m scalar tensors.
        noise: mu, or a sequence of m noises, one for each component of psi, as Algorithm 2 and Theorem 7 have it:
            then a step has n m perturbed points, and point 1 + i m + l is the draw i of mu_l.
        name: what tables and logs call it.
        elementwise: psi may be called once on a vector of deltas, and then returns tensors of its shape.
        slope: psi' of one delta, as m scalar tensors; None: by autograd, which costs a tenth of a millisecond a point.

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
        slope: Slope | None = None,
    ) -> None:
        self.phi = phi
        self.psi = psi
        self.slope = slope
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
            (w,) = torch.autograd.grad(L[0] + lam * rho**2 * self._value(delta_of(L, rho)), L)
        return w.to(losses.dtype)

    def weight_at_x(self, lam: float) -> float | None:
        """w_0 where it is the same whatever the losses are, so that it is known before them; else None."""
        return None

    def value(self, losses: Tensor, rho: float) -> Tensor:
        """R_rho of Definition 8, a scalar tensor in the dtype of `losses` (n + 1,)."""
        return self._value(delta_of(losses.detach().double(), rho)).to(losses.dtype)

    def slopes(self, delta: Tensor, point: int) -> tuple[Tensor, Tensor | None]:
        """psi'_l(delta_e), l < m, for one perturbed point: (mantissas (m,), log_scale or None for 0)."""
        t = delta.detach().double()
        if self.slope is not None:
            slopes = torch.stack(list(self.slope(t)))
        else:
            with torch.enable_grad():
                t.requires_grad_()
                components = self._components(t[None])[0]
                slopes = torch.stack([derivative(component, t) for component in components])
        if len(self.noises) > 1:  # this point is a draw of mu_l: it feeds component l alone
            own = torch.arange(len(self.noises), device=slopes.device) == (point - 1) % len(self.noises)
            slopes = slopes * own
        return slopes, None

    def factors(self, losses: Tensor, rho: float, lam: float, log_scale: Tensor | None) -> Tensor:
        """lam / n * d phi / d t_l, shape (m,), times exp(log_scale): what rows of slopes are multiplied by."""
        assert log_scale is None
        psi = self._mean_inputs(delta_of(losses.detach().double(), rho))
        with torch.enable_grad():
            t = psi.mean(0).detach().requires_grad_()
            partial_phi = derivative(self._phi(t, len(psi)), t)
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


def delta_of(losses: Tensor, rho: float) -> Tensor:
    """delta_i = (L_i - L_0) / rho^2, shape (n,)."""
    return (losses[1:] - losses[0]) / rho**2


def derivative(y: Tensor, t: Tensor) -> Tensor:
    """dy/dt; zero where y does not depend on t."""
    if not y.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(y, t, retain_graph=True, materialize_grads=True)[0]


def _noises(noise: Noise | Sequence[Noise]) -> tuple[Noise, ...]:
    noises = (noise,) if isinstance(noise, Noise) else tuple(noise) if isinstance(noise, Sequence) else (noise,)
    if not all(isinstance(part, Noise) for part in noises):
        raise TypeError(f"noise must be a phisam noise (phisam.gaussian(), ...) or a list of them, got {noise!r}")
    return noises
