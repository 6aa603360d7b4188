"""What the rewritten modules of one model share while a step runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lemo_fx.kernels.float8_linear.op import Float8Switch


@dataclass
class Step:
    """What all rewritten modules of a model share.

    Attributes:
        labels: of the running batch, which the causal model tells its layers.
        cache_asked: whether the running call asked for a cache.
        scores: [B, n] of the one choice that all sites share (`score="step"`), set by the first of them.
        led: whether such a first site was planned.
        drawn: whether the running layer's `scores` were seen to before its forward.
        dense: whether the layers run their original code for now (`lemo_fx.set_dense`, `generate`).
        switches: of the installed layers that compute in float8.
    """

    labels: torch.Tensor | None = None
    cache_asked: bool = False
    scores: torch.Tensor | None = None
    led: bool = False
    drawn: bool = False
    dense: bool = False
    switches: list[Float8Switch] = field(default_factory=list)
