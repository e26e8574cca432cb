"""mu: the perturbations v_i, each a function of (seed, step, point) and of nothing else.

Because a draw does not depend on the rank, on the number of processes, or on what was drawn before it, any
sharding of the points gives the same step, a resumed run needs no generator state, and no noise is ever sent.
(Draws on CPU and on CUDA come from different generators and differ.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1


@dataclass(frozen=True)
class Noise:
    """A distribution mu on R^d: `fill(v, generator)` overwrites the flat vector v, shape (d,), with one draw."""

    name: str
    fill: Callable[[Tensor, Generator], None]

    def draw_(self, v: Tensor, generator: Generator, seed: int, step: int, point: int) -> None:
        """Overwrite v with the draw of (seed, step, point); `generator` lives on v's device and is re-seeded."""
        generator.manual_seed(key(seed, step, point))
        self.fill(v, generator)


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

    Entries are near 1 / sqrt(d): at rho = 0.01 and d = 11 million below the float32 resolution of a weight near 1.
    The paper's Trace-SAM numbers come from draws that are not normalised; `gaussian()` reproduces those.
    """
    return Noise("sphere", _fill_sphere)


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
    flat = v if isinstance(v, Tensor) else torch.cat([part.reshape(-1) for part in v])
    return Noise("dirac", partial(_fill_dirac, value=flat.detach().reshape(-1).clone()))


def _fill_gaussian(v: Tensor, generator: Generator) -> None:
    v.normal_(generator=generator)


def _fill_sphere(v: Tensor, generator: Generator) -> None:
    v.normal_(generator=generator)
    v.div_(torch.linalg.vector_norm(v))


def _fill_hypercube(v: Tensor, generator: Generator, half_width: float) -> None:
    v.uniform_(-half_width, half_width, generator=generator)


def _fill_rademacher(v: Tensor, generator: Generator) -> None:
    v.random_(0, 2, generator=generator).mul_(2).sub_(1)


def _fill_dirac(v: Tensor, _: Generator, value: Tensor) -> None:
    if value.shape != v.shape:
        raise ValueError(f"dirac: v has {value.numel()} numbers, the perturbed parameters have {v.numel()}")
    v.copy_(value)
