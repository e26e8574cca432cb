"""Which fault, and when: by the seed alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST_STEPS, MOST_STEPS = 20, 120


@dataclass(frozen=True)
class Fault:
    """kind: an injector's name. after_steps: since the fault before was got over. draw: seed of its own choices."""

    kind: str
    after_steps: int
    draw: int


def drawn(weights: Mapping[str, int], count: int, seed: int) -> Sequence[Fault]:
    """So many faults; a kind comes in proportion to its weight, and all kinds before one comes again too often."""
    chance = random.Random(seed)
    deck: list[str] = []
    faults = []
    for _ in range(count):
        if not deck:  # so that a few faults are of different kinds, and many in proportion
            deck = [kind for kind, weight in weights.items() for _ in range(weight)]
            chance.shuffle(deck)
        faults.append(Fault(deck.pop(), chance.randint(LEAST_STEPS, MOST_STEPS), chance.randrange(2**32)))
    return faults
