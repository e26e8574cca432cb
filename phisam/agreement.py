"""Before its first step: do the ranks agree on what they are about to do together? Collective, once, on the host.

Ranks that do not agree would go on in silence, each with other noise or another batch, or wait for each other for ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phisam.sharding import SampleMesh


def check_settings_agree(mesh: SampleMesh, settings: dict[str, float], device: torch.device) -> None:
    """Raises ValueError on all ranks if a setting is not the same everywhere; integers up to 64 bits."""
    # A float64 holds 53 bits: integers travel as two halves.
    pairs = [divmod(value, 2**32) if _whole(value) else (value, 0) for value in settings.values()]
    everyone = mesh.gather(torch.tensor(pairs, dtype=torch.float64, device=device).flatten())  # (D, S, 2 settings)
    for i, (name, own) in enumerate(settings.items()):
        rows = everyone.flatten(0, 1)[:, 2 * i : 2 * i + 2].tolist()
        values = [int(high) * 2**32 + int(low) if _whole(own) else high for high, low in rows]
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} differs between the ranks: {values} on ranks 0 to {len(values) - 1}; it must be the same on "
                "all of them, and a state_dict must be loaded on all of them, since any rank may evaluate any point"
            )


def check_batches_agree(mesh: SampleMesh, loss_at_x: Tensor) -> None:
    """Raises ValueError on all ranks if sample ranks of one data rank have other losses at the same x."""
    losses = mesh.gather(loss_at_x[None])[..., 0]  # (D, S)
    for data_rank, row in enumerate(losses.tolist()):
        if max(row) - min(row) > 1e-3 * max(abs(loss) for loss in row):
            raise ValueError(
                f"L(x) differs between the sample ranks of data rank {data_rank}: {row}. They must see the same batch, "
                "as they share the points of one step: give the data loader mesh.data_rank of mesh.data_size, not the "
                "rank and the number of processes (or use sample_parallel=1)"
            )


def _whole(value: float) -> bool:
    return isinstance(value, int)
