"""The pattern predictors' arithmetic (LeMo section 4.2), shared by training and by the part that a layer carries.

A predictor is a dict of tensors. For attention T = 2 networks (for Q and for K), for an MLP T = 1:
    first [T, H, w], first_bias [T, w], second [T, w, v], second_bias [T, v], third [T, v, d]: low-rank, ReLU between;
    distance [len(DECAYS)] (attention): what a pair of blocks is worth by how far apart they are, whatever they hold;
    offset [1] (MLP; d = 1): logarithm of the score of an average block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

DECAYS = (0.0, 2.0, 0.5, 0.125, 1 / 32, 1 / 128, 1 / 512)
"""Rates per block of the exponentials that make up the distance bias: from the block itself to thousands of blocks, so
that a bias learned at one length reads sensibly at another."""


def represent(stream: torch.Tensor, valid: torch.Tensor | None, block_size: int) -> torch.Tensor:
    """The representative embedding of each block: the mean of its tokens, scaled to unit mean square.

    Reading the stream instead of the branch's normed input saves a norm over all tokens; the scaling does for a block
    what the norm does for a token.

    Args:
        stream: [B, S, H]; valid: [B, S] bool, False on padding, or None.

    Returns:
        [B, ceil(S / b), H] float32; zeros for a block of padding.
    """
    length = stream.shape[1]
    tail = -length % block_size
    if valid is not None:
        stream = torch.where(valid[:, :, None], stream, 0)
    # The scaling makes the divisor of a mean redundant, and with it the count of real tokens.
    total = functional.pad(stream, (0, 0, 0, tail)).unflatten(1, (-1, block_size)).sum(2, dtype=torch.float32)
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)


def network(weights: Mapping[str, torch.Tensor], blocks: torch.Tensor) -> list[torch.Tensor]:
    """[B, n, H] -> activations after each of the three matrices: [T, B, n, w], [T, B, n, v], [T, B, n, d]."""

    def apply(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name][:, None].float()

    first = (apply(blocks[None], "first") + weights["first_bias"][:, None, None].float()).relu()
    second = (apply(first, "second") + weights["second_bias"][:, None, None].float()).relu()
    return [first, second, apply(second, "third")]


def attention_scores(
    weights: Mapping[str, torch.Tensor], outputs: torch.Tensor, real: torch.Tensor | None
) -> torch.Tensor:
    """I^(S) = I^(Q) I^(K)^T plus the distance bias; causal, its positive part, summed over query blocks.

    Args:
        outputs: [2, B, n, d], I^(Q) and I^(K); real: [B, n] bool, False for blocks of padding, or None.

    Returns:
        [B, n] float32.
    """
    blocks = outputs.shape[2]
    position = torch.arange(blocks, device=outputs.device)
    decays = torch.tensor(DECAYS, device=outputs.device)
    bias = torch.exp(-decays * position[:, None]) @ weights["distance"].float()
    distance = position[:, None] - position
    pairs = outputs[0].float() @ outputs[1].float().transpose(1, 2) + bias[distance.clamp_min(0)]
    pairs = torch.where(distance >= 0, pairs.relu(), 0.0)
    if real is not None:
        pairs = torch.where(real[:, :, None], pairs, 0.0)
    return pairs.sum(1)


def mlp_scores(weights: Mapping[str, torch.Tensor], outputs: torch.Tensor) -> torch.Tensor:
    """[1, B, n, 1] -> [B, n] float32, positive."""
    return (outputs[0, :, :, 0].float() + weights["offset"].float()).exp()


def scores(weights: Mapping[str, torch.Tensor], blocks: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Representative embeddings [B, n, H] -> predicted informativeness [B, n] in the measured score's units."""
    outputs = network(weights, blocks)[-1]
    return attention_scores(weights, outputs, real) if "distance" in weights else mlp_scores(weights, outputs)
