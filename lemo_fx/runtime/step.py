"""What the rewritten modules of one model share while a step runs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lemo_fx.kernels.float8_linear.op import Float8Switch


@dataclass
class Step:
    """What all rewritten modules of a model share.

    Attributes:
        labels: of the running batch, which the model tells its layers, or `lemo_fx.labels`.
        unlabelled: whether the last step that trains came without.
        scores: [B, n] of the one choice that all sites share (`score="step"`), set by the first of them.
        drawn: True while a layer runs whose `scores` were drawn outside its compiled region.
        dense: whether the layers run their original code for now (`lemo_fx.set_dense`, `generate`).
        switches: of the installed layers that compute in float8.
        hooked: whether a layer has someone's hooks in it, see `look_for_hooks`.
        handles: how many handles of hooks torch had made by then.
        owner: the model whose layers share it.
    """

    labels: torch.Tensor | None = None
    unlabelled: bool | None = None
    scores: torch.Tensor | None = None
    drawn: bool = False
    dense: bool = False
    switches: list[Float8Switch] = field(default_factory=list)
    hooked: bool = False
    handles: int = -1
    owner: weakref.ref[nn.Module] | None = None

    def name_of(self, module: nn.Module) -> str:
        """A module's name in the model, or its class's where it is in none."""
        owner = None if self.owner is None else self.owner()
        names = () if owner is None else owner.named_modules()
        return next((name for name, m in names if m is module), "") or type(module).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """A copy of the whole model has a step of its own; the copy of a layer joins the model (PEFT replicates so)."""
        owner = memo.get(id(self.owner())) if self.owner is not None else None
        if owner is None:
            return self
        # Its layers add their switches as they are copied.
        memo[id(self)] = step = Step(dense=self.dense, owner=weakref.ref(owner))
        return step
