"""Which op runs as which kernel, and why it runs on its plain-torch reference where it does not.

The ops' dispatch and `lemo_fx.report` ask the same `obstacle`, so what is reported is what happens. The choice is made
when an op runs and not in a pass: one rewritten graph serves every device and mask, also after `model.to(...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lemo_fx.kernels.private import has_triton


@dataclass(frozen=True)
class Limit:
    """Something that a kernel does not take: an argument of the op, when it is beyond the kernel, and the reason."""

    argument: str
    exceeded: Callable[[Any], bool]
    reason: str


KERNELS: dict[str, tuple[str, tuple[Limit, ...]]] = {
    "eliminate": ("eliminate/triton.py", ()),
    "scatter_rows": ("eliminate/triton.py", ()),
    "restore": ("eliminate/triton.py", ()),
    "held_gradient": ("float8_linear/triton.py", ()),
    "segmented_cross_entropy": ("segmented_cross_entropy/triton.py", ()),
    "block_scores": (
        "block_scores/triton.py",
        (
            Limit("block_size", lambda size: size > 128, "a block of more than 128 tokens does not fit a tile"),
            # The mask is S x S already, so the reference costs no more memory.
            Limit("mask", lambda mask: mask is not None, "a mask of arbitrary form has no kernel"),
        ),
    ),
}
"""Kernel by op, and what it does not take. Ops that are not listed are plain torch everywhere."""


def obstacle(op: str, device: torch.device, **arguments: Any) -> str:
    """Why a call of this op runs on its reference; empty where it runs its kernel."""
    if op not in KERNELS:
        return "plain torch everywhere"
    if device.type != "cuda":
        return f"tensors on {device.type}, not cuda"
    if not has_triton():
        return "no Triton"
    limits = [limit for limit in KERNELS[op][1] if limit.argument in arguments]
    return next((limit.reason for limit in limits if limit.exceeded(arguments[limit.argument])), "")


def explain(op: str, device: torch.device, **arguments: Any) -> str:
    """What this op runs as, in words; for arguments that are not known yet, where it would run its reference."""
    reason = obstacle(op, device, **arguments)
    if reason:
        return f"plain torch, no kernel ({reason})"
    open_limits = [limit.reason for limit in KERNELS[op][1] if limit.argument not in arguments]
    return "; ".join([f"kernel {KERNELS[op][0]}", *(f"plain torch where {reason}" for reason in open_limits)])
