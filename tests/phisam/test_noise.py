"""mu: moments, keys, and independence of everything but (seed, step, point)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

import phisam
from phisam.noise import _normal_quantiles, key

D = 200_000


def draw(noise: phisam.Noise, seed: int = 0, step: int = 0, point: int = 1, d: int = D) -> Tensor:
    v = torch.empty(d, dtype=torch.float64)
    noise.draw_(v, Generator(), seed, step, point)
    return v


@pytest.mark.parametrize(
    ("noise", "second", "fourth"),
    [
        (phisam.gaussian(), 1.0, 3.0),
        (phisam.rademacher(), 1.0, 1.0),
        (phisam.hypercube(0.5), 0.25 / 3, 0.5**4 / 5),
        (phisam.sphere(), 1 / D, 3 / D**2),
    ],
    ids=["gaussian", "rademacher", "hypercube", "sphere"],
)
def test_moments(noise: phisam.Noise, second: float, fourth: float) -> None:
    v = draw(noise)
    assert abs(float(v.mean())) < 4 * math.sqrt(second / D)
    assert abs(float((v**2).mean()) - second) <= 4 * math.sqrt(abs(fourth - second**2) / D) + 1e-12
    assert float((v**4).mean()) == pytest.approx(fourth, rel=0.05)


def test_ranges() -> None:
    assert draw(phisam.rademacher()).abs().unique().tolist() == [1.0]
    cube = draw(phisam.hypercube(0.5))
    assert -0.5 <= float(cube.min()) < -0.49 < 0.49 < float(cube.max()) <= 0.5
    assert float(torch.linalg.vector_norm(draw(phisam.sphere(), d=7))) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("noise", [phisam.gaussian(), phisam.sphere(), phisam.rademacher(), phisam.hypercube()])
def test_a_draw_depends_on_seed_step_and_point_alone(noise: phisam.Noise) -> None:
    first = draw(noise, 3, 5, 2, d=50)
    generator = Generator()
    v = torch.empty(50, dtype=torch.float64)
    for point in (9, 1):
        noise.draw_(v, generator, 3, 5, point)
    noise.draw_(v, generator, 3, 5, 2)
    assert torch.equal(v, first)
    for other in ((4, 5, 2), (3, 6, 2), (3, 5, 3), (5, 3, 2), (2, 5, 3)):
        assert not torch.equal(draw(noise, *other, d=50), first), other


def test_draws_of_different_points_and_steps_are_uncorrelated() -> None:
    draws = torch.stack([draw(phisam.gaussian(), 0, step, point, d=20_000) for step in range(4) for point in range(5)])
    correlation = torch.corrcoef(draws) - torch.eye(20, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 10**6), (-7, 123)])
def test_keys_of_a_step_differ_in_the_32_bits_that_the_cpu_generator_keeps(seed: int, step: int) -> None:
    low = {key(seed, step, point) & 0xFFFFFFFF for point in range(100_000)}
    assert len(low) == 100_000
    assert all(0 <= key(seed, step, point) < 1 << 64 for point in (-3, 0, 7))


def test_the_cpu_generator_keeps_32_bits() -> None:
    """Why `key` takes care of them: if this fails, it needs to no longer."""
    left, right = Generator().manual_seed(5), Generator().manual_seed(5 + (1 << 40))
    assert torch.equal(torch.randn(8, generator=left), torch.randn(8, generator=right))


def test_dirac_is_its_vector_flat_or_in_parts() -> None:
    parts = [torch.ones(2, 2), torch.zeros(3)]
    expected = [1.0] * 4 + [0.0] * 3
    assert draw(phisam.dirac(parts), d=7).tolist() == expected
    assert draw(phisam.dirac(torch.tensor(expected)), d=7).tolist() == expected
    with pytest.raises(ValueError, match="dirac: v has 7 numbers, the perturbed parameters have 8"):
        draw(phisam.dirac(parts), d=8)


def test_the_table_of_gaussian_quantiles_is_the_normal_distribution() -> None:
    """float32 draws on a CPU come from 2^16 equally likely values: moments, order, and the distance of the two CDFs."""
    table = _normal_quantiles().double()
    assert torch.all(table[1:] > table[:-1])
    assert torch.equal(table, -table.flip(0))
    assert float(table.square().mean()) == pytest.approx(1, abs=1e-7)
    assert float(table.pow(4).mean()) == pytest.approx(3, abs=3e-4)
    assert float(table.pow(6).mean()) == pytest.approx(15, abs=2e-2)
    step = torch.arange(1, 2**16 + 1, dtype=torch.float64) / 2**16
    assert float((torch.special.ndtr(table) - step).abs().max()) < 1.01 / 2**16


@pytest.mark.parametrize("make", [phisam.gaussian, phisam.rademacher])
def test_draws_made_of_bits_use_all_of_them(make: Callable[[], phisam.Noise]) -> None:
    """Each of the numbers that one 64-bit word makes has mean 0: a bit that is never set would show in one of them."""
    v = torch.empty(64 * 4000)
    make().fill(v, torch.Generator().manual_seed(3))
    assert float(v.view(-1, 64).mean(0).abs().max()) < 5 / 4000**0.5
    assert float((v[:-1] * v[1:]).mean().abs()) < 5 / v.numel() ** 0.5
