"""Which parameters are trained now, and where they lie. Looked at in each step: users freeze, move and add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from phisam.checks import check_rho_scale, trained_parameters
from phisam.wrapping import Wrapping


class Layout:
    """What a step must know of model and base optimizer. `follow` looks again.

    of_model: all parameters.  parameters: x, those of the base optimizer that require a gradient, in the model's order.
    others: the rest.  rho_scales: of x, by its groups.
    """

    def __init__(self, model: nn.Module, base_optimizer: Optimizer, wrapping: Wrapping) -> None:
        self._model, self._base_optimizer, self._wrapping = model, base_optimizer, wrapping
        self._rho_scale_of: dict[nn.Parameter, float] = {}
        self._members: object = None
        self._memory: object = None
        self.of_model: list[nn.Parameter] = []
        self.parameters: list[nn.Parameter] = []
        self.others: list[nn.Parameter] = []
        self.rho_scales: list[float] = []

    def follow(self, take_up: Callable[[list[nn.Parameter], bool], None]) -> None:
        """Looks again. Where x is new or lies elsewhere, `take_up` hears of it: x, and whether it is other parameters.

        What `take_up` raises leaves the layout as it was, so that the next step hears of it again.
        """
        groups = self._base_optimizer.param_groups
        for group in groups:
            if "rho_scale" not in group:  # a state of the bare base optimizer was loaded into it
                group["rho_scale"] = self._rho_scale_before(group)
            check_rho_scale(group["rho_scale"])
        of_model = _parameters(self._model)
        members = (
            [(id(p), p.requires_grad) for p in of_model],  # of_model is kept, so that no id is given away
            [(group["rho_scale"], [id(p) for p in group["params"]]) for group in groups],
        )
        known = members == self._members
        parameters = self.parameters if known else trained_parameters(of_model, self._base_optimizer)
        held = self._wrapping.held(parameters)
        memory = [(id(p), p.shape, x.data_ptr(), x.dtype, x.device) for p, x in zip(parameters, held, strict=True)]
        if memory != self._memory:
            take_up(parameters, [id(p) for p in parameters] != [id(p) for p in self.parameters])
            self._memory = memory
        if not known:
            self._rho_scale_of = {p: group["rho_scale"] for group in groups for p in group["params"]}
            trained = set(parameters)
            self.of_model, self.parameters = of_model, parameters
            self.others = [p for p in of_model if p not in trained]
            self.rho_scales = [self._rho_scale_of[p] for p in parameters]
            self._members = members

    def forget(self) -> None:
        """`take_up` is to hear of x again, as if it had moved."""
        self._memory = None

    def _rho_scale_before(self, group: dict[str, Any]) -> float:
        return next((self._rho_scale_of[p] for p in group["params"] if p in self._rho_scale_of), 1.0)


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """model.parameters(), without the names that it makes on the way."""
    found = {id(p): p for module in model.modules() for p in module._parameters.values() if p is not None}
    return list(found.values())
