"""mine(**options) -> phisam.Measure: any phi and psi that torch can differentiate, with a noise mu."""

from __future__ import annotations

import torch

import phisam


def mine(temperature: float = 1.0) -> phisam.Measure:
    """A soft trace: phi(t) = T log(1 + t / T), psi(t) = softplus(t), which grow slower than t where it is large."""
    return phisam.Measure(
        phi=lambda t: temperature * torch.log1p(t / temperature),
        psi=torch.nn.functional.softplus,
        noise=phisam.gaussian(),
        name="soft_trace",
        elementwise=True,  # psi may get a vector of deltas
    )
