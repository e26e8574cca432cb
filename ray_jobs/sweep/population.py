"""Population-based training over rho and lam: at the end of a generation the worst members go on from the best.

A member of the population is a trial. A generation ends for all at the same level of the resource; members wait there
for each other, and then the last `quantile` of them go on from the checkpoint of one of the first, with its rho and lam
multiplied by 0.8 or 1.25. Everything that is drawn depends on (seed, generation, member) alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_jobs.sweep.trajectory import Axis, Stopping, Trajectory, sort_key

FACTORS = (0.8, 1.25)


@dataclass(frozen=True)
class Exploit:
    """A member goes on from the donor's checkpoint. values: all of the space, not only those that changed."""

    donor: int
    values: dict[str, Any]
    reason: str


class Population(Stopping):
    """Truncation selection.

    Args:
        members: trials 0, 1, ..., members - 1.
        boundaries: levels of the resource at which generations end, ascending.
        quantile: part of the members that goes on from others; at least one does, at most half.
        bounds: dotted key -> (least, greatest) of the values that are perturbed, and clipped.
        seed: of donors and factors.
    """

    def __init__(
        self,
        axis: Axis,
        members: int,
        boundaries: Sequence[float],
        quantile: float,
        bounds: Mapping[str, tuple[float, float]],
        seed: int,
    ) -> None:
        super().__init__(axis)
        self.members, self.boundaries = members, tuple(boundaries)
        self.quantile, self.bounds, self.seed = quantile, dict(bounds), seed

    def exploits(
        self, generation: int, trials: Mapping[int, Trajectory], values: Mapping[int, Mapping[str, Any]]
    ) -> dict[int, Exploit] | None:
        """Who goes on from whom after a generation; None while a member is on its way.

        values: of each member, as they were in this generation. Members that failed before its end have no part.
        """
        ranked: list[tuple[float, int]] = []
        for member in range(self.members):
            trajectory = trials.get(member, Trajectory(()))
            if trajectory.state == "failed":  # after the generation's last epoch too: it left no checkpoint of it
                continue
            point = trajectory.at(self.boundaries[generation])
            if point is not None:
                ranked.append((sort_key(point.value, self.axis.mode), member))
            elif trajectory.state == "running":
                return None
        ranked.sort()
        if len(ranked) < 2:
            return {}
        share = min(len(ranked) // 2, max(1, math.floor(self.quantile * len(ranked))))
        best, worst = ranked[:share], ranked[-share:]
        return {member: self._exploit(generation, member, best, values) for _, member in worst}

    def _exploit(
        self,
        generation: int,
        member: int,
        best: Sequence[tuple[float, int]],
        values: Mapping[int, Mapping[str, Any]],
    ) -> Exploit:
        _, donor = best[int(self._uniform(generation, member, "donor") * len(best))]
        changed = dict(values[donor])
        told = []
        for key, (least, greatest) in self.bounds.items():
            factor = FACTORS[int(self._uniform(generation, member, key) * len(FACTORS))]
            changed[key] = min(max(changed[key] * factor, least), greatest)
            told.append(f"{key.removeprefix('optimizer.')} {changed[key]:.4g}")
        reason = f"pbt: after generation {generation + 1} on from trial {donor}, {', '.join(told)}"
        return Exploit(donor, changed, reason)

    def _uniform(self, generation: int, member: int, what: str) -> float:
        return random.Random(f"pbt/{self.seed}/{generation}/{member}/{what}").random()
