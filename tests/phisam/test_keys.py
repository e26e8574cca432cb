"""The low 32 bits of a key are a bijection of its last part: shown by inverting them, not by looking for collisions."""

from __future__ import annotations

import pytest
import torch

from phisam.noise import key

MASK_32 = (1 << 32) - 1


def inverse_murmur32(h: int) -> int:
    """Undoes MurmurHash3's finalizer h ^= h >> 16; h *= a; h ^= h >> 13; h *= b; h ^= h >> 16 in 32 bits."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 1 << 32) & MASK_32
    h ^= h >> 13 ^ h >> 26
    h = h * pow(0x85EBCA6B, -1, 1 << 32) & MASK_32
    return h ^ h >> 16


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (-1, 10**9)])
def test_two_keys_of_a_step_give_away_which_points_they_belong_to(seed: int, step: int) -> None:
    """low = murmur32(state ^ point), so inverting two of them leaves point ^ other, for points anywhere in 32 bits."""
    points = torch.randint(0, 1 << 32, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    first = inverse_murmur32(key(seed, step, 0) & MASK_32)
    for point in [1, 2, MASK_32, *points]:
        assert inverse_murmur32(key(seed, step, point) & MASK_32) ^ first == point


def test_dropout_keys_never_meet_the_keys_of_points() -> None:
    """-1 - data_rank fills the 32 bits from the top, points from the bottom."""
    points = {key(3, 4, point) & MASK_32 for point in range(5000)}
    assert not points & {key(3, 4, -1 - rank) & MASK_32 for rank in range(5000)}
