"""A rank that is slower than the others is named, whatever it evaluates; one that only evaluates more is not."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from ray_jobs import config, stragglers
from ray_jobs.stragglers import laggards
from tests.phisam import gloo
from tests.ray_jobs import loop


def test_paces_are_compared_by_the_example() -> None:
    assert laggards([(2.0, 100), (6.0, 100), (2.2, 100)]) == {1: pytest.approx(6.0 / 2.1)}
    assert laggards([(6.0, 300), (2.0, 100), (2.0, 100)]) == {}, "three points where the others have one"
    assert laggards([(6.0, 100), (2.0, 100)]) == {0: pytest.approx(3.0)}
    assert laggards([(2.9, 100), (2.0, 100), (2.0, 100)]) == {}, "less than half as long again"
    assert laggards([(0.9, 100), (0.1, 100)]) == {}, "nobody misses less than a second"
    assert laggards([(3.0, 100)]) == {}
    assert laggards([(3.0, 100), (0.0, 0)]) == {}, "a rank without a forward pass has no pace"


class Clock:
    """In place of a process's own, which goes on while others have its core."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


def sleepy(input_shape: tuple[int, int, int], num_classes: int, seconds: float) -> nn.Module:
    """A network of one's own that is slow on rank 1."""

    class Sleepy(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            CLOCK.now += 1e-4 * len(images) + (seconds if dist.get_rank() == 1 else 0.0)
            return super().forward(images.flatten(1))

    return Sleepy(math.prod(input_shape), num_classes)


def trained(folder: str, seconds: float, rank: int) -> list[str]:
    """Two epochs of twelve steps of three points: rank 0 evaluates two of them, rank 1 one, and rank 1 may sleep."""
    run = config.load(
        "digits-sgd",
        [
            f"model={{name: tests.ray_jobs.test_stragglers:sleepy, options: {{seconds: {seconds}}}}}",
            "optimizer.measure=trace",
            "training.epochs=2",
            "training.batch_size=100",
        ],
    )
    with mock.patch.object(stragglers, "time", CLOCK):
        _, told = loop.trained(run, Path(folder))
    return [line for line in told if "straggler" in line]


def test_a_rank_that_sleeps_is_named_once_by_rank_0_and_one_that_evaluates_more_is_not(tmp_path: Path) -> None:
    slow, equal = (
        gloo.run(2, partial(trained, str(tmp_path / "slow"), 0.12)),
        gloo.run(2, partial(trained, str(tmp_path / "equal"), 0.0)),
    )
    assert [len(lines) for lines in slow] == [1, 0]
    assert slow[0][0].startswith("warning: worker 1 on node ")
    assert equal == [[], []]
