"""S(x) = phi( E_mu psi( v^T H v / 2 ) ), Definition 1, of any (phi, psi, mu).

v^T H v is summed over all batches before psi sees it: a minibatch's H would bias every psi that is not linear (+189 %
was measured for psi(t) = t^2). phi of the mean over n draws is biased where phi is not linear: the jackknife makes it
the unbiased U-statistic for a phi of degree 2, such as Frobenius's, and takes the leading term off for any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phisam.measures import Measure
from phisam.noise import FisherMask, Noise, normalize_
from phisam.sharpness.curvature import Curvature, Progress
from phisam.sharpness.eigenvalues import Which, top_eigenvalues
from phisam.sharpness.estimate import Estimate, jackknife
from phisam.sharpness.norms import dots
from phisam.sharpness.probes import draw, per_probe
from phisam.sharpness.refusals import Unmeasurable

_GAUSSIAN = "gaussian"


def measure(
    curvature: Curvature,
    measure: Measure,
    probes: int = 100,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> Estimate:
    """S(x) of a measure, with n = `probes` draws of its mu (of each mu, if it has one for every component of psi).

    mu's options act as in training: adaptive scales v by |x| + eta, a mask cuts it. antithetic and symmetric have no
    effect, since v and -v have the same v^T H v: every draw is a new one. A mu that is one vector (Dirac, or SAM's
    gradient direction) needs one product and has no error: `probes` is then ignored.

    Raises:
        ValueError: the measure has no S (`sgd`), or probes < 3 where mu is random.
        Unmeasurable: psi grows so fast that its variance is infinite under this Gaussian mu and this H, or an operation
            of the model has no second derivative.
    """
    noises = measure.noises
    if not noises:
        raise ValueError(f"{measure.name}: phi = 0, so there is no sharpness to measure")
    if all(noise.fill is None for noise in noises):
        exact = _half_forms(curvature, noises, 1, seed, progress)
        return Estimate(measure.name, float(_value(measure, exact)), 0.0, 1)
    if probes < 3:
        raise ValueError(f"probes = {probes}, but the jackknife's standard error needs probes >= 3")
    for noise in dict.fromkeys(noises):
        _check_variance(curvature, measure, noise, seed)
    t = _half_forms(curvature, noises, probes, seed, progress)
    return jackknife(lambda draws: _value(measure, draws), t, measure.name)


def _value(measure: Measure, t: Tensor) -> Tensor:
    """phi( mean_i psi(t_i) ) for t (n, m): the delta of a step with rho = 1, in the order of its points."""
    return measure.value(torch.cat([t.new_zeros(1), t.reshape(-1)]), 1.0)


def _half_forms(
    curvature: Curvature, noises: Sequence[Noise], probes: int, seed: int, progress: Progress | None
) -> Tensor:
    """v^T H v / 2, (probes, m), float64: column l has mu_l's draws."""
    m = len(noises)

    def reduce(V: Tensor, HV: Tensor) -> Tensor:
        return dots(V, HV)[:, None] / 2

    columns = []
    for component, noise in enumerate(noises):
        make = _Draws(curvature, noise, seed, m, component)
        values = per_probe(curvature, probes, make, reduce, _shifted(progress, component, m))
        columns.append(values[:, 0])
    return torch.stack(columns, 1)


def _shifted(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """The progress of one of several equal parts, as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, parts * total)


class _Draws:
    """The v of one mu, scaled and masked."""

    def __init__(self, curvature: Curvature, noise: Noise, seed: int, stride: int, offset: int) -> None:
        self._curvature = curvature
        self._noise = noise
        self._seed = seed
        self._stride = stride
        self._offset = offset
        self.factor = _factor(curvature, noise)
        self._gradient = curvature.gradient() if noise.of_gradient else None

    def __call__(self, part: range) -> Tensor:
        """(d, k) for the draws of these numbers; draw i of mu_l is probe i m + l."""
        if self._gradient is not None:  # T^2 grad L / ‖T grad L‖, ASAM's; T = 1 is SAM's
            scaling = _scaling(self._curvature, self._noise)
            scaled = self._gradient if scaling is None else self._gradient * scaling
            v = scaled.clone()
            normalize_(v, torch.linalg.vector_norm(scaled))
            V = v[:, None].expand(-1, len(part))
        else:
            numbers = range(
                part.start * self._stride + self._offset, part.stop * self._stride, part.step * self._stride
            )
            V = draw(self._curvature, self._noise, self._seed, numbers)
        return V if self.factor is None else V * self.factor[:, None]


def _factor(curvature: Curvature, noise: Noise) -> Tensor | None:
    """What a draw is multiplied by, (d,): T and the mask; None for 1."""
    parts = [part for part in (_scaling(curvature, noise), _mask(curvature, noise)) if part is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


def _scaling(curvature: Curvature, noise: Noise) -> Tensor | None:
    """T = |x| + eta on the tensors that are scaled, 1 elsewhere."""
    if noise.scaling is None:
        return None
    T = curvature.parameters().abs() + noise.scaling.eta
    for name, part in curvature.unflatten(T).items():
        if not noise.scaling.acts_on(name):
            part.fill_(1.0)
    return T


def _mask(curvature: Curvature, noise: Noise) -> Tensor | None:
    if noise.mask is None:
        return None
    if isinstance(noise.mask, FisherMask):
        fisher = curvature.squared_gradients(noise.mask.fisher_samples)
        mask = torch.zeros_like(fisher)
        mask[torch.topk(fisher, max(1, round((1 - noise.mask.sparsity) * curvature.d)), sorted=False).indices] = 1
        return mask
    if noise.mask.numel() != curvature.d:
        raise ValueError(
            f"{noise.name}: the mask has {noise.mask.numel()} numbers, the trained parameters have {curvature.d}"
        )
    return noise.mask.to(curvature.device, curvature.dtype)


def _check_variance(curvature: Curvature, measure: Measure, noise: Noise, seed: int) -> None:
    """Refuses psi with E psi(v^T H v / 2)^2 infinite.

    Where |psi(t)| grows like exp(r |t|) and v = D z, z ~ N(0, I), with lambda_i the eigenvalues of D H D on that side,
    E exp(2 r |t|) = prod_i (1 - 2 r |lambda_i|)^{-1/2}, which is finite only if 2 r |lambda| < 1. For psi = exp(-t):
    lambda_min > -1/2. Other noises are bounded, and so is their variance.
    """
    if not noise.name.startswith(_GAUSSIAN) or noise.unit:
        return
    sides: tuple[tuple[int, Which], ...] = ((1, "largest"), (-1, "smallest"))
    for side, which in sides:
        rate = _growth(measure, side)
        if rate <= 0:
            continue
        extreme = side * float(top_eigenvalues(_Scaled(curvature, noise), 1, which=which, seed=seed).values[0])
        if extreme > 0 and 2 * rate * extreme >= 1:
            end = "largest" if side > 0 else "smallest"
            raise Unmeasurable(
                f"{measure.name}: under Gaussian draws the variance of psi is infinite here: |psi(t)| grows like "
                f"exp({rate:.3g} |t|) for t -> {'' if side > 0 else '-'}infinity, and the {end} eigenvalue of H (as "
                f"the noise scales it) is {side * extreme:.4g}, beyond {side / (2 * rate):.4g}; no number of probes "
                "would give a mean that can be trusted. Use a bounded mu: hypercube(a), sphere() or rademacher()"
            )


def _growth(measure: Measure, side: int) -> float:
    """r where |psi(t)| goes like |t|^k exp(r |t|), for t of this sign; inf for faster growth; 0 for slower.

    From psi at T, 2 T, 4 T: the second difference of log |psi| leaves r T alone, whatever k is. T is the largest at
    which nothing overflows, and T / 2 must agree.
    """
    for T in (1e6, 1e5, 1e4, 1e3, 1e2, 10.0, 1.0, 0.1):
        logs, before = _log_psi(measure, side, T), _log_psi(measure, side, T / 2)
        if logs is None or before is None:
            continue
        rate, slower = _rate(logs, T), _rate(before, T / 2)
        if rate * T <= 0.1 or rate < 0.9 * slower:
            return 0.0
        return math.inf if rate > 1.1 * slower else rate
    return math.inf


def _rate(logs: Sequence[float], T: float) -> float:
    return ((logs[2] - logs[1]) - (logs[1] - logs[0])) / T


def _log_psi(measure: Measure, side: int, T: float) -> list[float] | None:
    """log max_l |psi_l| at T, 2 T, 4 T; None where it overflows. 0 counts as a very small number."""
    values = []
    for t in (T, 2 * T, 4 * T):
        psi = measure.psi(torch.tensor(side * t, dtype=torch.float64))
        parts = [psi] if isinstance(psi, Tensor) else list(psi)
        values.append(max(float(part.detach().abs().max()) for part in parts))
    if not all(math.isfinite(value) for value in values):
        return None
    return [math.log(max(value, 1e-300)) for value in values]


class _Scaled(Curvature):
    """D H D for the D of a noise."""

    def __init__(self, curvature: Curvature, noise: Noise) -> None:
        self.__dict__.update(curvature.__dict__)
        self._inner = curvature
        self._factor = _factor(curvature, noise)

    def matvec(self, V: Tensor) -> Tensor:
        return self._scaled(V, self._inner.matvec)

    def shared_matvec(self, V: Tensor) -> Tensor:
        return self._scaled(V, self._inner.shared_matvec)

    def _scaled(self, V: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        if self._factor is None:
            return product(V)
        D = self._factor[:, None].to(V.dtype)
        return D * product(D * V)
