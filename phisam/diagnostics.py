"""What is wrong with a measure's settings, told from the n + 1 losses that each step has anyway.

    sums = torch.zeros(SUMS, dtype=torch.float64, device=device)
    for ...: opt.step(...); sums += numbers(opt.last_step)          # nothing waits for the device
    for finding in findings(sums): print(finding.text)              # once an epoch

Three questions, over the steps that `sums` were taken over.

**signal**  t = |mean R| / (s / sqrt(T)), with R the R_rho of each of T steps and s its standard deviation over them. If
t < 2, R over all these steps together cannot be told from 0, and neither can the sign of what its gradient did. Assumes
that S moves little over the steps, so that s is noise, of the draws and of the batches; a slow change counts as noise.
What is reported is one step's share, |mean R| / s.

**first_order**  delta = a + b with a = g^T v / rho, odd in v, and b = v^T H v / 2, even up to O(rho). For a pair v, -v
the halves of difference and sum are a and b exactly, so the share is mean a^2 / (mean a^2 + Var b), with Var b over the
pairs of a step. Above 1/2 a measure that is not linear in delta penalises the gradient more than the curvature. Only
`antithetic` draws tell it: `symmetric` has no a, and plain draws do not say which part is which.

**resolution**  a float32 loss is rounded by up to u = 2^-24 |L|. The two of delta make an error of variance at most
2 (u / rho^2)^2 / 3, if roundings are independent and uniform. Its share of the mean square of delta is reported, and
told above 1 %: then a tenth of delta's size may be rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phisam.record import StepRecord

UNIT_ROUNDOFF = 2.0**-24
SIGNAL, FIRST_ORDER, RESOLUTION = 2.0, 0.5, 0.01
LEAST_STEPS = 20
"""Fewer say nothing about a signal: too few even for one that is there."""
SUMS = 9
"""Of `numbers`: steps; R; R^2; steps with pairs; a^2; Var b; delta^2; rounding^2; w_0 < 0."""


@dataclass(frozen=True)
class Finding:
    """name: of a metric. value: its number. text: what is wrong and what to change; None: nothing is."""

    name: str
    value: float
    text: str | None


def numbers(record: StepRecord, float32: bool = True) -> Tensor:
    """What a step adds to the sums, (SUMS,), on its device; zeros for a step without the term or with inf or NaN.

    float32: losses were computed so.
    """
    losses = record.losses
    if len(losses) < 2:
        return losses.new_zeros(SUMS)
    delta, R = record.delta, record.sharpness.double()
    zero, one = losses.new_zeros(()), losses.new_ones(())
    pairs = _pairs(record)
    a2 = spread = paired = zero
    if pairs is not None:
        plus, minus = pairs
        a2 = ((plus - minus) / 2).square().mean()
        b = (plus + minus) / 2
        spread = b.var() if len(b) > 1 else zero
        paired = one
    unit = UNIT_ROUNDOFF if float32 else 2.0**-53
    rounding = 2 / 3 * (unit * losses.abs().max() / record.rho**2).square()
    negative = (record.weights[0] < 0).to(losses.dtype)
    row = torch.stack([one, R, R.square(), paired, a2, spread, delta.square().mean(), rounding, negative])
    return torch.where(torch.isfinite(row).all(), row, torch.zeros_like(row))


def findings(sums: Tensor) -> list[Finding]:
    """Of a sum of `numbers`. Waits for the device. Empty before the first step."""
    steps, R, R2, paired, a2, spread, delta2, rounding, negative = sums.tolist()
    if steps == 0:
        return []
    found = [_signal(steps, R / steps, R2 / steps)] if steps > 1 else []
    if paired and a2 + spread > 0:
        found.append(_first_order(a2 / (a2 + spread)))
    if delta2 > 0:
        found.append(_resolution(rounding / delta2))
    share = negative / steps
    text = (
        f"w_0 was negative in {share:.0%} of the steps: L(x) is pushed up there, and for trace the objective has no "
        "lower bound; lower lam (trace: to 1 or less)"
    )
    return [*found, Finding("w0_negative", share, text if share > 0 else None)]


def _signal(steps: float, mean: float, mean_square: float) -> Finding:
    variance = max(0.0, mean_square - mean**2) * steps / (steps - 1)
    one_step = abs(mean) / math.sqrt(variance) if variance > 0 else math.inf
    t = one_step * math.sqrt(steps)
    text = (
        f"the sharpness term is drowned by its own noise: R_rho is {mean:.3g} on average and {math.sqrt(variance):.3g} "
        f"from step to step, so {steps:.0f} steps together do not tell it from 0 (t = {t:.1f}, below {SIGNAL:g}); "
        "raise n_samples, use symmetric pairs, or a larger rho"
    )
    return Finding("signal", one_step, text if t < SIGNAL and steps >= LEAST_STEPS else None)


def _first_order(share: float) -> Finding:
    text = (
        f"{share:.0%} of delta's variance is the gradient's, (g^T v / rho)^2, and not the Hessian's: the measure is "
        "mostly a penalty on the gradient norm; use symmetric noise, or a larger rho"
    )
    return Finding("first_order", share, text if share > FIRST_ORDER else None)


def _resolution(share: float) -> Finding:
    text = (
        f"rounding of the losses is {math.sqrt(share):.0%} of delta's size: rho is too small for the precision that "
        f"losses are computed in; raise rho about {(share / RESOLUTION) ** 0.25:.1f}-fold, or use precision float64"
    )
    return Finding("resolution", share, text if share > RESOLUTION else None)


def _pairs(record: StepRecord) -> tuple[Tensor, Tensor] | None:
    """delta at v and at -v of each pair; None where draws are not paired."""
    noises = record.measure.noises
    if len(noises) != 1 or not noises[0].paired:
        return None
    return record.delta[0::2], record.delta[1::2]
