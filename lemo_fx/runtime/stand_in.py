"""The frozen map that stands in for a branch at eliminated tokens."""

from __future__ import annotations

import torch
from torch import nn


class StandIn(nn.Module):
    """A frozen low-rank affine map of a branch's normed input: x -> (x A) B + c.

    Args:
        down: A, [H, r]; up: B, [r, H]; bias: c, [H].
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def __init__(self, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, K, H] -> [B, K, H]."""
        return torch.addmm(self.bias.to(x.dtype), x.flatten(0, 1) @ self.down.to(x.dtype), self.up.to(x.dtype)).view_as(
            x
        )
