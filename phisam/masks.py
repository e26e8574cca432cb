"""Which parameters are perturbed: masks that a noise brings along, and those of the Fisher information (SSAM-F)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phisam.evaluation import Evaluator
from phisam.noise import FisherMask, Noise
from phisam.sharding import SampleMesh


class Masks:
    """The masks of a measure's noises, kept up to date where they depend on the Fisher information."""

    def __init__(self, noises: Sequence[Noise]) -> None:
        self._noises = noises
        self._given: dict[Noise, Tensor] = {}
        self._fisher: dict[FisherMask, Tensor | None] = {
            noise.mask: None for noise in noises if isinstance(noise.mask, FisherMask)
        }

    @property
    def need_examples(self) -> bool:
        """Single examples of the batch are looked at."""
        return bool(self._fisher)

    def lay_out(self, d: int, device: torch.device, sharded: bool) -> None:
        """Raises ValueError where a mask does not fit the d trained parameters, or ranks hold pieces of them only."""
        for noise in self._noises:
            if noise.mask is not None and sharded:
                raise ValueError(f"{noise.name}: masks are not made for parameters that fully_shard spreads; use DDP")
            if isinstance(noise.mask, Tensor) and noise.mask.numel() != d:
                raise ValueError(
                    f"{noise.name}: the mask has {noise.mask.numel()} numbers, the trained parameters have {d}"
                )
            if isinstance(noise.mask, Tensor):
                self._given[noise] = noise.mask.to(device)

    def forget(self) -> None:
        """Other parameters are trained now: masks are made anew in the next step."""
        self._fisher = dict.fromkeys(self._fisher)

    def of(self, noise: Noise) -> Tensor | None:
        """The flat mask of a noise, (d,); None if all parameters are perturbed."""
        return self._fisher[noise.mask] if isinstance(noise.mask, FisherMask) else self._given.get(noise)

    def due(self, step: int) -> bool:
        """Whether a mask is made in this step; the same answer on all ranks."""
        return any(self._is_due(settings, step) for settings in self._fisher)

    def _is_due(self, settings: FisherMask, step: int) -> bool:
        return step % settings.refresh_every == 0 or self._fisher[settings] is None

    def refresh(self, step: int, evaluator: Evaluator, mesh: SampleMesh) -> None:
        """Makes the masks that are due. Collective. Example k is example k // D of data rank k mod D, for every D."""
        for settings in self._fisher:
            if not self._is_due(settings, step):
                continue
            mine = [
                k // mesh.data_size
                for k in range(settings.fisher_samples)
                if k % mesh.data_size == mesh.data_rank and k // mesh.data_size % mesh.sample_size == mesh.sample_rank
            ]
            fisher = mesh.sum(evaluator.squared_gradients(mine))
            mask, old = _largest(fisher, settings.sparsity), self._fisher[settings]
            # No example had a gradient that is finite: nothing was learned.
            self._fisher[settings] = mask if old is None else torch.where(fisher.any(), mask, old)

    def state(self) -> list[Tensor | None]:
        """What a resumed run needs."""
        return list(self._fisher.values())

    def load(self, state: Sequence[Tensor | None], device: torch.device) -> None:
        """Raises ValueError where it is the state of another measure."""
        if len(state) != len(self._fisher):
            raise ValueError(
                f"load_state_dict: the state has {len(state)} Fisher masks, but the measure has {len(self._fisher)}: "
                "build PhiSAM with the measure and noise that the state was saved with"
            )
        masks = [None if mask is None else mask.to(device) for mask in state]
        self._fisher = dict(zip(self._fisher, masks, strict=True))


def _largest(values: Tensor, sparsity: float) -> Tensor:
    """Bool mask (d,): True for the round((1 - sparsity) d) largest values, one at least."""
    keep = max(1, round((1 - sparsity) * values.numel()))
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[torch.topk(values, keep, sorted=False).indices] = True
    return mask
