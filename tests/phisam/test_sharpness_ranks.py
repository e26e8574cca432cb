"""phisam.sharpness on two gloo processes: the numbers of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phisam
from phisam import sharpness
from phisam.sharpness.curvature import Share
from tests.phisam import gloo
from tests.phisam.sharpness_cases import batches, network


def estimators() -> dict[str, Callable[[sharpness.Hessian], Any]]:
    def numbers(*estimates: sharpness.Estimate) -> list[float]:
        return [number for e in estimates for number in (e.value, e.standard_error)]

    return {
        "norms": lambda h: numbers(*sharpness.trace_and_frobenius(h, 7)),
        "measure": lambda h: numbers(sharpness.measure(h, phisam.frobenius(), 7)),
        "fewer probes than ranks can use": lambda h: numbers(sharpness.measure(h, phisam.sam())),
        "top": lambda h: sharpness.top_eigenvalues(h, 2).values.tolist(),
        "density": lambda h: sharpness.spectral_density(h, 3, steps=8).nodes.flatten().tolist(),
        "log_determinant": lambda h: numbers(*sharpness.log_determinant(h, [1e-2], 3)),
    }


def measured(group: dist.ProcessGroup | None, share: Share, wrapped: bool = False) -> dict[str, Tensor]:
    model: nn.Module = network("batchnorm")
    model = DistributedDataParallel(model) if wrapped else model
    settings: dict[str, Any] = {"group": group, "share": share, "chunk": 3}
    h = sharpness.Hessian(model, nn.CrossEntropyLoss(), batches(), **settings)
    values = {name: torch.tensor(f(h), dtype=torch.float64) for name, f in estimators().items()}
    ggn = sharpness.GGN(model, nn.CrossEntropyLoss(), batches(), **settings)
    values["ggn"] = sharpness.ggn_spectrum(ggn).eigenvalues
    return values


def of_a_rank(rank: int) -> dict[str, Any]:
    products: list[int] = []
    product = sharpness.Hessian._product

    def counted(self: sharpness.Hessian, operator: Any, V: Tensor) -> Tensor:
        products.append(V.shape[1])
        return product(self, operator, V)

    results: dict[str, Any] = {}
    for share in ("auto", "probes", "data"):
        results[share] = measured(dist.group.WORLD, share)
    results["wrapped"] = measured(dist.group.WORLD, "auto", wrapped=True)
    sharpness.Hessian._product = counted  # type: ignore[method-assign]
    sharpness.trace(sharpness.Hessian(network("tanh"), nn.CrossEntropyLoss(), batches(), group=dist.group.WORLD), 10)
    results["columns"] = sum(products)
    own = batches()[rank : rank + 1]
    try:
        sharpness.Hessian(network("tanh"), nn.CrossEntropyLoss(), own, group=dist.group.WORLD)
    except sharpness.Unmeasurable as error:
        results["refused"] = str(error)
    return results


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return gloo.run(2, of_a_rank)


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    return measured(None, "auto")


@pytest.mark.parametrize("share", ["auto", "probes", "data", "wrapped"])
def test_two_processes_are_one(two: list[dict[str, Any]], one: dict[str, Tensor], share: str) -> None:
    """Every sharding, and a model that is wrapped in DDP, on both ranks."""
    for rank in two:
        torch.testing.assert_close(rank[share], one, rtol=1e-10, atol=1e-10)


def test_probes_are_divided(two: list[dict[str, Any]]) -> None:
    assert [rank["columns"] for rank in two] == [5, 5]


def test_a_shard_of_the_data_on_each_rank_is_refused(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "different models or different batches" in rank["refused"]
