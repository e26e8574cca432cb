"""What two ranks must agree on, and what each must know: told before the first step, on every rank, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phisam
from tests.phisam import gloo


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def examples(seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 4, dtype=torch.float64, generator=generator), torch.randint(0, 3, (12,), generator=generator)


def optimizer(measure: phisam.Measure, S: int | None, **settings: Any) -> phisam.PhiSAM:
    """On one process where S is None."""
    model = make_model()
    mesh = None if S is None else phisam.sample_mesh(2, S)
    wrapped = model if S is None else DistributedDataParallel(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return phisam.PhiSAM(wrapped, base, measure, **{"n_samples": 2, "rho": 0.1, "lam": 0.3, "mesh": mesh, **settings})


def step(opt: phisam.PhiSAM, seed: int = 2) -> None:
    x, y = examples(seed)
    opt.step(lambda part: nn.functional.cross_entropy(opt.model(part(x)), part(y)))


def told(opt: phisam.PhiSAM, seed: int = 2) -> str:
    try:
        step(opt, seed)
    except ValueError as error:
        return str(error)
    return "nothing"


def trained(opt: phisam.PhiSAM, steps: int = 4) -> dict[str, Tensor]:
    for _ in range(steps):
        step(opt)
    opt.sync_buffers()
    return {name.removeprefix("module."): value.clone() for name, value in opt.model.state_dict().items()}


def masked() -> phisam.Measure:
    mask = phisam.fisher_mask(fisher_samples=12, refresh_every=2)
    return phisam.trace().with_noise(phisam.gaussian().masked(mask))


CASES: dict[str, Any] = {
    "perturb_fraction": lambda S: optimizer(phisam.frobenius(), S, perturb_fraction=0.5),
    "perturb_fraction, every": lambda S: optimizer(phisam.trace(), S, perturb_fraction=0.5, every=2),
    "fisher mask": lambda S: optimizer(masked(), S),
}


def on_rank(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {name: trained(make(2)) for name, make in CASES.items()}
    results["seed"] = told(optimizer(phisam.frobenius(), 1, seed=rank))
    results["large seed"] = told(optimizer(phisam.frobenius(), 1, seed=2**62 + rank))
    results["batch"] = told(optimizer(phisam.frobenius(), 2), seed=rank)
    results["batch, S = 1"] = told(optimizer(phisam.frobenius(), 1), seed=rank)

    saved = optimizer(phisam.frobenius(), 2, every=2)
    step(saved)
    resumed = optimizer(phisam.frobenius(), 2, every=2)
    if rank == 0:
        resumed.load_state_dict(saved.state_dict())
    results["resumed on rank 0 alone"] = told(resumed)

    moved = optimizer(phisam.ssam(refresh_every=10), 1)
    step(moved)
    if rank == 0:  # as an evaluation with averaged weights does
        for p in moved.model.parameters():
            p.data = p.data.clone()
    results["memory moved on rank 0 alone"] = told(moved)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return gloo.run(2, on_rank)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_buffers_are_those_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """x on the whole batch is sample rank 0's, whose buffers are sent; a mask is made from current buffers."""
    alone = trained(CASES[case](None))
    for rank in ranks:
        assert int(rank[case]["1.num_batches_tracked"]) == 4
        for name, value in alone.items():
            torch.testing.assert_close(rank[case][name], value, rtol=0, atol=1e-10)


def test_settings_that_differ_are_told_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "seed differs between the ranks: [0, 1] on ranks 0 to 1" in rank["seed"]
        assert f"seed differs between the ranks: [{2**62}, {2**62 + 1}]" in rank["large seed"]
        assert "the step counter differs between the ranks: [1, 0]" in rank["resumed on rank 0 alone"]


def test_sample_ranks_with_other_batches_are_told_what_to_shard_by(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "give the data loader mesh.data_rank of mesh.data_size" in rank["batch"]
        assert rank["batch, S = 1"] == "nothing"


def test_a_mask_is_not_made_anew_because_memory_moved_on_one_rank(ranks: list[dict[str, Any]]) -> None:
    """Making it is collective: the rank would wait for the other."""
    assert [rank["memory moved on rank 0 alone"] for rank in ranks] == ["nothing", "nothing"]
