"""mu: the perturbations v_i, each a function of (seed, step, point) and of nothing else.

Because a draw does not depend on the rank, on the number of processes, or on what was drawn before it, any
sharding of the points gives the same step, a resumed run needs no generator state, and no noise is ever sent.
(Draws on CPU and on CUDA come from different generators and differ.)

v is made in blocks of `BLOCK` numbers, each with a key of its own, so that a rank that holds some pieces of the
parameters (FSDP2) keeps those pieces of v, and makes the blocks that they lie in one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Generator, Tensor

BLOCK = 1 << 18
_LOWEST = -(1 << 63)  # random_ from here, without an end, draws all 64 bits

_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1

_BOTH = "adaptive and preconditioned each say how far a parameter is moved; use one of them"

Fill = Callable[[Tensor, Generator], None]
Scaled = Literal["all", "weight"]


@dataclass(frozen=True)
class Scaling:
    """T = |x| + eta for the tensors that are scaled, 1 for the others."""

    eta: float
    scaled: Scaled

    def acts_on(self, name: str) -> bool:
        """Whether the parameter of this name is scaled."""
        return self.scaled == "all" or "weight" in name


@dataclass(frozen=True)
class Preconditioning:
    """D = (sqrt(m2) / rms + damping)^-power, over its root mean square; see `Noise.preconditioned`."""

    power: float
    damping: float


@dataclass(frozen=True)
class FisherMask:
    """Keeps the parameters with the largest diagonal Fisher information; see `fisher_mask`."""

    sparsity: float
    fisher_samples: int
    refresh_every: int


@dataclass(frozen=True)
class Draw:
    """What the v of one perturbed point is: sign * noise(seed, step, point)."""

    noise: Noise
    point: int
    sign: int


@dataclass(frozen=True, eq=False)
class Noise:
    """A distribution mu on R^d. Its options are methods, and chain: `gaussian().adaptive(0.01).symmetric()`.

    What v starts from is one of: `fill(block, generator)`, which overwrites a flat block of v with independent entries
    of one distribution; `value`, a fixed vector (d,); or grad L(x), where `fill` and `value` are None.

    unit: v is then divided by its norm over all parameters together. scaling, preconditioning, mask: see `adaptive`,
    `preconditioned` and `masked`. paired: see `antithetic`. two_sided: see `symmetric`.
    """

    name: str
    fill: Fill | None = None
    value: Tensor | None = None
    unit: bool = False
    scaling: Scaling | None = None
    preconditioning: Preconditioning | None = None
    mask: Tensor | FisherMask | None = None
    paired: bool = False
    two_sided: bool = False

    @property
    def of_gradient(self) -> bool:
        """v is made of grad L(x)."""
        return self.fill is None and self.value is None

    @property
    def signs(self) -> tuple[int, ...]:
        """The points of one draw: x + rho v, and with `symmetric` x - rho v."""
        return (1, -1) if self.two_sided else (1,)

    def antithetic(self) -> Noise:
        """Draws come in pairs: draw 2j + 1 is minus draw 2j. n_samples must be even; a step costs n + 1 as before.

        For measures that are linear in delta, such as trace: the first-order parts of a pair cancel. Frobenius leans to
        the gradient norm with it, and is better served by `symmetric`: see docs/options.md.

        Raises:
            ValueError: mu is no distribution that is drawn from, or symmetric already.
        """
        if self.value is not None:
            raise ValueError(
                f"{self.name}: -v is no draw of a mu that is one fixed v; symmetric() evaluates both sides"
            )
        self._must_be_drawn("antithetic")
        if self.two_sided:
            raise ValueError(
                f"{self.name}: each draw of a symmetric noise is a pair v, -v already; leave antithetic out"
            )
        return replace(self, name=f"{self.name}, antithetic", paired=True)

    def symmetric(self) -> Noise:
        """L_i = (L(x + rho v_i) + L(x - rho v_i)) / 2, so delta_i has no first-order term and sees the Hessian alone:

            delta_i = (L(x + rho v_i) + L(x - rho v_i) - 2 L(x)) / (2 rho^2) = v_i^T H v_i / 2 + O(rho^2).

        n_samples counts pairs: a step costs 2 n + 1 gradient evaluations.

        Raises:
            ValueError: mu is of the gradient, or antithetic already.
        """
        self._must_be_drawn("symmetric")
        if self.paired:
            raise ValueError(f"{self.name}: v and -v would give one delta twice; use one of antithetic, symmetric")
        return replace(self, name=f"{self.name}, symmetric", two_sided=True)

    def adaptive(self, eta: float = 0.0, scaled: Scaled = "all") -> Noise:
        """v becomes T v with T = |x| + eta, elementwise, after v was drawn (and normalised).

        With eta = 0 and scaled = "all" every measure is exactly invariant to the rescalings of Theorem 10, for every
        phi, psi and finite rho. For mu of the gradient it is ASAM: v = T^2 grad L / ‖T grad L‖.

        Args:
            eta: >= 0; added to |x|, so that parameters at 0 are perturbed too.
            scaled: "all" tensors, or those with "weight" in their name (the others keep T = 1).

        Raises:
            ValueError: eta is negative or not finite, or scaled is neither.
        """
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"adaptive: eta must be a finite number >= 0, got {eta!r}")
        if scaled not in ("all", "weight"):
            raise ValueError(f'adaptive: scaled must be "all" or "weight", got {scaled!r}')
        if self.preconditioning is not None:
            raise ValueError(f"{self.name}: {_BOTH}")
        return replace(self, name=f"{self.name}, adaptive", scaling=Scaling(float(eta), scaled))

    def preconditioned(self, power: float = 1.0, damping: float = 0.1) -> Noise:
        """v becomes D v, with D the diagonal that the base optimizer itself scales its steps by:

            D_j = c (sqrt(m2_j) / rms + damping)^-power,     rms = sqrt(mean_j m2_j),     c so that mean_j D_j^2 = 1

        and m2 the base optimizer's running second moment of g: Adam, AdamW, RMSprop, Adagrad and their kin. The mean is
        over all parameters together, so E‖D v‖^2 = E‖v‖^2 for every mu whose coordinates have one variance, and rho
        means what it means without D. Adam's bias correction, one factor for all, cancels, and so does the scale of the
        loss. Before the base optimizer has a second moment, in the first step, D = 1.

        The measure is then that of D H D: `frobenius` estimates sum_ij D_i^2 D_j^2 H_ij^2. As with `adaptive`, g is the
        gradient with D held.

        Args:
            power: > 0; 1 is Adam's own diagonal, 0.5 its square root.
            damping: > 0, relative to rms: a weight that never had a gradient, such as one behind an image's black
                border, is moved damping^-power times as far as it would be at 0 power, and not without bound.

        Raises:
            ValueError: a number is out of range, mu is not drawn, or the noise is adaptive.
        """
        for name, value in (("power", power), ("damping", damping)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"preconditioned: {name} must be a finite number > 0, got {value!r}")
        if self.fill is None:
            raise ValueError(f"preconditioned: {self.name} is one vector and not drawn: its length would not stay")
        if self.scaling is not None:
            raise ValueError(f"{self.name}: {_BOTH}")
        return replace(
            self,
            name=f"{self.name}, preconditioned",
            preconditioning=Preconditioning(float(power), float(damping)),
        )

    def masked(self, mask: Tensor | Sequence[Tensor] | FisherMask) -> Noise:
        """v becomes mask * v (after normalisation): 0 leaves a parameter unperturbed.

        Args:
            mask: a flat tensor (d,), one tensor per parameter in the model's order, or `fisher_mask(...)`.
        """
        return replace(self, name=f"{self.name}, masked", mask=mask if isinstance(mask, FisherMask) else _flat(mask))

    def draw_(self, v: Tensor, generator: Generator, seed: int, step: int, point: int) -> None:
        """Overwrite v, all of it, with the draw of (seed, step, point), before T and the mask; not for the gradient.

        `generator` lives on v's device and is re-seeded.
        """
        self.start_(v, [(0, v.numel())], v.numel(), generator, seed, step, point)
        if self.unit:
            normalize_(v, torch.linalg.vector_norm(v))

    def start_(
        self,
        v: Tensor,
        spans: Sequence[tuple[int, int]],
        d: int,
        generator: Generator,
        seed: int,
        step: int,
        point: int,
    ) -> None:
        """Overwrite v, which holds the spans (start, length) of the whole (d,), before it is normalised."""
        if self.value is not None:
            if self.value.numel() != d:
                raise ValueError(f"{self.name}: v has {self.value.numel()} numbers, the perturbed parameters have {d}")
            v.copy_(torch.cat([self.value[start : start + length] for start, length in spans]))
            return
        assert self.fill is not None
        at = 0
        for start, length in spans:
            for block in range(start // BLOCK, -(-(start + length) // BLOCK)):
                first, end = block * BLOCK, min(block * BLOCK + BLOCK, d)
                inside = slice(max(start, first), min(start + length, end))
                into = v[at : at + inside.stop - inside.start]
                whole = into.numel() == end - first
                numbers = into if whole else torch.empty(end - first, dtype=v.dtype, device=v.device)
                generator.manual_seed(key(seed, step, block, point) if block else key(seed, step, point))
                self.fill(numbers, generator)
                if not whole:
                    into.copy_(numbers[inside.start - first : inside.stop - first])
                at += into.numel()

    def _must_be_drawn(self, option: str) -> None:
        if self.of_gradient:
            raise ValueError(f"{option}: v is a function of the gradient, not a draw: there is nothing to pair")


def normalize_(v: Tensor, norm: Tensor) -> None:
    """v / norm; zero stays zero, and a v so small that the squares in its norm underflow becomes no unit vector."""
    v.div_(norm.clamp_min(torch.finfo(v.dtype).tiny ** 0.5))


def key(*parts: int) -> int:
    """A 64-bit seed from integers, e.g. (seed, step, point). Keys that differ in the last part only never collide.

    torch's CPU generator keeps the low 32 bits of a seed, so these must stay distinct within a step on their own:
    they are a bijection of the last part (Steele, Lea, Flood 2014, and MurmurHash3's finalizer).
    """
    *head, last = parts
    state = 0
    for part in head:
        state = _splitmix64(state ^ (part & _MASK_64))
    low = _murmur32((state ^ last) & _MASK_32)
    return (_splitmix64(state ^ (last & _MASK_64)) & ~_MASK_32) | low


def _splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def _murmur32(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK_32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK_32
    return h ^ (h >> 16)


def gaussian() -> Noise:
    """mu = N(0, I_d), Table 1 rows 2 and 4. E[v v^T] = I."""
    return Noise("gaussian", _fill_gaussian)


def sphere() -> Noise:
    """mu = Uniform(S^{d-1}), Table 1 row 1: ‖v‖ = 1 over ALL parameters together. E[v v^T] = I / d.

    S is divided by d, so that at d = 11 million and a usual rho almost nothing of the sharpness term is left. The
    paper's Trace-SAM numbers come from draws that are not normalised; `gaussian()` reproduces those.
    """
    return Noise("sphere", _fill_gaussian, unit=True)


def hypercube(half_width: float = 0.01) -> Noise:
    """mu = Uniform([-a, a]^d), a = half_width: Section 3's stand-in for the Lebesgue measure. E[v v^T] = a^2/3 I.

    Appendix O's cube has sides of length 0.02 (a = 0.01, the default here) with rho = 1.

    Raises:
        ValueError: half_width is not a positive finite number.
    """
    if not (math.isfinite(half_width) and half_width > 0):
        raise ValueError(f"hypercube: half_width must be a positive finite number, got {half_width!r}")
    return Noise("hypercube", partial(_fill_hypercube, half_width=float(half_width)))


def rademacher() -> Noise:
    """mu = Uniform({-1, 1}^d). E[v v^T] = I, and v^T D v = tr D exactly for a diagonal D."""
    return Noise("rademacher", _fill_rademacher)


def dirac(v: Tensor | Sequence[Tensor]) -> Noise:
    """mu = delta_v: every draw is v, a flat tensor (d,) or one tensor per parameter in the model's order.

    Theorem 7's measures are `dirac(e_i)` and `dirac(e_i + e_j)`.
    """
    return Noise("dirac", value=_flat(v))


def gradient_direction() -> Noise:
    """mu = Dirac at grad L(x) / ‖grad L(x)‖, the direction of SAM (Foret et al. 2021); v = 0 where grad L is 0.

    The gradient is that of the scope: of the global batch (one more all-reduce of d numbers), or of the data rank's own
    share.
    """
    return Noise("gradient", unit=True)


def fisher_mask(sparsity: float = 0.5, fisher_samples: int = 16, refresh_every: int = 391) -> FisherMask:
    """The mask of SSAM-F (Mi et al. 2022): 1 for the (1 - sparsity) d parameters with the largest Fisher information.

        F_jj = mean_k (d/dx_j L_k(x))^2,    L_k the loss of a single example, with its label (the empirical Fisher)

    of the first `fisher_samples` examples of the batch (counted round and round if it is smaller), the network in
    evaluation mode. Made in step 0, every `refresh_every` steps (391 are an epoch of CIFAR-10 in batches of 128; with
    `every` > 1 all steps count), and when other parameters are trained than before. The closure must take `part`.

    Raises:
        ValueError: sparsity is not in [0, 1), or a count is not an integer >= 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"fisher_mask: sparsity must be in [0, 1), got {sparsity!r}: it is the part that is not perturbed"
        )
    for name, count in (("fisher_samples", fisher_samples), ("refresh_every", refresh_every)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"fisher_mask: {name} must be an integer >= 1, got {count!r}")
    return FisherMask(sparsity, fisher_samples, refresh_every)


def _fill_gaussian(v: Tensor, generator: Generator) -> None:
    if v.device.type == "cpu" and v.dtype == torch.float32:
        # A third of a small network's evaluation goes to its noise: 16 random bits and a table cost half of normal_.
        bits = (
            torch.empty(-(-v.numel() // 4), dtype=torch.int64)
            .random_(_LOWEST, None, generator=generator)
            .view(torch.uint16)
        )
        torch.index_select(_normal_quantiles(), 0, bits[: v.numel()].int(), out=v)
    else:
        v.normal_(generator=generator)


@cache
def _normal_quantiles() -> Tensor:
    """65,536 equally likely values: the means of N(0, 1) between its quantiles k / 2^16, of variance 1 exactly.

    Odd moments are 0, the fourth is 2.9998, and the largest value is 4.39.
    """
    edges = torch.special.ndtri(torch.linspace(0, 1, 2**16 + 1, dtype=torch.float64))
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    means = (density[:-1] - density[1:]) * 2**16  # of x between a and b: (density(a) - density(b)) / probability
    means = (means - means.flip(0)) / 2
    return (means / means.square().mean().sqrt()).float()


def _fill_hypercube(v: Tensor, generator: Generator, half_width: float) -> None:
    v.uniform_(-half_width, half_width, generator=generator)


def _fill_rademacher(v: Tensor, generator: Generator) -> None:
    words = torch.empty(-(-v.numel() // 64), dtype=torch.int64, device=v.device).random_(
        _LOWEST, None, generator=generator
    )
    signs = torch.index_select(_signs_of_bytes(v.device, v.dtype), 0, words.view(torch.uint8).int())
    v.copy_(signs.reshape(-1)[: v.numel()])


@cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Row b: the eight bits of b as -1 and 1, (256, 8)."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


def _flat(v: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(v, Tensor) and not (
        isinstance(v, Sequence) and v and all(isinstance(part, Tensor) for part in v)
    ):
        raise ValueError(f"expected a flat tensor (d,), or one tensor per parameter in the model's order, got {v!r}")
    flat = v if isinstance(v, Tensor) else torch.cat([part.reshape(-1) for part in v])
    return flat.detach().reshape(-1).clone()
