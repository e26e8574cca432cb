"""What cannot be measured, in words."""

from __future__ import annotations

import re


class Unmeasurable(ValueError):  # noqa: N818 (it is what the message explains)
    """What was asked for has no value, or none that could be trusted: the message says why, and what to change."""


# What torch says where a Hessian-vector product meets an operation without the second derivative that it needs.
_NO_FORWARD_MODE = re.compile(r"forward AD with (\S+)")
_NO_DERIVATIVE = re.compile(r"derivative for (?:aten::)?(\S+) is not implemented")


def explained(error: Exception) -> Exception:
    """The refusal behind an error of a matrix product with a curvature; the error itself if it is none of these."""
    message = str(error)
    found = _NO_FORWARD_MODE.search(message) or _NO_DERIVATIVE.search(message)
    if found and found[1].startswith("_scaled_dot_product"):
        return Unmeasurable(
            f"the model calls {found[1]}, the fused attention of torch, which has no second derivative: measure inside "
            "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`"
        )
    if found:
        return Unmeasurable(
            f"the model or its criterion calls {found[1]}, which has no second derivative in torch: write that part "
            "with other operations for the measurement"
        )
    if "autograd.Function" in message:
        return Unmeasurable(
            "the model or its criterion has a torch.autograd.Function without `setup_context` and `jvp`, so it has no "
            "second derivative: add them, or write it with torch's own operations; reentrant activation checkpointing "
            "is such a function too: switch it off for the measurement"
        )
    if "saved tensor hooks" in message:
        return Unmeasurable(
            "the model saves tensors through hooks (activation checkpointing or offloading), which a second derivative "
            "cannot pass: switch that off for the measurement"
        )
    return error
