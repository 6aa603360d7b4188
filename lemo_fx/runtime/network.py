"""The pattern predictors' arithmetic (LeMo section 4.2), shared by training and by the part that a layer carries.

A predictor is a dict of tensors. For attention T = 2 networks (for Q and for K), for an MLP T = 1:
    first [T, H, w] int8 (or floating, while training), first_bias [T, w], second [T, w, v], second_bias [T, v],
        third [T, v, d]: three low-rank matrices with ReLU between, which read every token;
    distance [len(DECAYS)] (attention): what a pair of blocks is worth by how far apart they are, whatever they hold;
    offset [1] (MLP; d = 1): logarithm of the score of an average token.

An attention's predictor gives the scores of blocks. An MLP's says which tokens of a block may hold its maximum; their
true scores follow from the MLP's own weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn import functional

from lemo_fx.config import SiteKind
from lemo_fx.kernels.select_blocks.reference import block_any

DECAYS = (0.0, 2.0, 0.5, 0.125, 1 / 32, 1 / 128, 1 / 512)
"""Rates per block of the exponentials that make up the distance bias: from the block itself to thousands of blocks, so
that a bias learned at one length reads sensibly at another."""

CANDIDATES = 16
"""Of so many tokens, one is a candidate for the largest MLP score of its block."""

QUANTUM = 1 / 128
"""What 1 means in an int8 matrix. A power of two: exact in half precision, and far from float16's limit."""


def network(weights: Mapping[str, torch.Tensor], stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, H] -> activations after the first and the second matrix, float32: [T, B, S, w], [T, B, S, v].

    Each token is scaled to unit mean square, as the branch's norm would; the scaling commutes with the first matrix, so
    the stream is read as it is.
    """
    first = weights["first"]
    matrix = first.to(stream.dtype)
    if first.dtype == torch.int8:
        matrix = matrix * QUANTUM
    projected = (stream @ matrix.transpose(0, 1).flatten(1)).unflatten(-1, (first.shape[0], -1)).float()
    precise = torch.promote_types(stream.dtype, torch.float32)
    size = torch.linalg.vector_norm(stream, dim=-1, keepdim=True, dtype=precise).float()
    scale = torch.rsqrt(size.square() / stream.shape[-1] + 1e-6)
    one = (projected.movedim(-2, 0) * scale + weights["first_bias"][:, None, None].float()).relu()
    two = (one @ weights["second"][:, None].float() + weights["second_bias"][:, None, None].float()).relu()
    return one, two


def pool(
    values: torch.Tensor, valid: torch.Tensor | None, block_size: int, how: Literal["mean", "max"]
) -> torch.Tensor:
    """[..., B, S, f] -> [..., B, ceil(S / b), f]: mean or maximum of each block's real tokens.

    Args:
        valid: [B, S] bool, False on padding, or None. A block without a real token gets zeros.
    """
    length = values.shape[-2]
    tail = -length % block_size
    if valid is None and not tail:
        blocks = values.unflatten(-2, (-1, block_size))
        return blocks.mean(-2) if how == "mean" else blocks.amax(-2)
    if valid is None:
        valid = torch.ones(values.shape[-3], length, dtype=torch.bool, device=values.device)
    counted = functional.pad(valid, (0, tail)).unflatten(-1, (-1, block_size))[..., None]
    blocks = functional.pad(values, (0, 0, 0, tail)).unflatten(-2, (-1, block_size))
    if how == "mean":
        return torch.where(counted, blocks, 0.0).sum(-2) / counted.sum(-2).clamp_min(1)
    return torch.where(counted.any(-2), torch.where(counted, blocks, -torch.inf).amax(-2), 0.0)


def attention_scores(
    weights: Mapping[str, torch.Tensor],
    outputs: torch.Tensor,
    real: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
) -> torch.Tensor:
    """I^(S) = I^(Q) I^(K)^T plus the distance bias; causal, its positive part, summed over query blocks.

    Args:
        outputs: [2, B, n, d], I^(Q) and I^(K); real: [B, n] bool, False for blocks of padding, or None.
        pairs: [1 or B, n, n] bool, False where no token of the query block may attend to the key block, or None.

    Returns:
        [B, n] float32.
    """
    blocks = outputs.shape[2]
    position = torch.arange(blocks, device=outputs.device)
    # Not a tensor of decays, whose copy to a GPU would wait for all that the GPU has queued.
    bias = torch.stack([torch.exp(-decay * position) for decay in DECAYS], 1) @ weights["distance"].float()
    distance = position[:, None] - position
    worth = outputs[0] @ outputs[1].transpose(1, 2) + bias[distance.clamp_min(0)]
    allowed = (distance >= 0)[None]
    if pairs is not None:
        allowed = allowed & pairs
    if real is not None:
        allowed = allowed & real[:, :, None]
    return torch.where(allowed, worth.relu(), 0.0).sum(1)


def token_scores(weights: Mapping[str, torch.Tensor], second: torch.Tensor) -> torch.Tensor:
    """An MLP's second activations [1, B, S, v] -> logarithm of each token's score, [B, S]."""
    return (second[0] @ weights["third"][0].float())[..., 0] + weights["offset"].float()


def candidate_count(block_size: int) -> int:
    """Candidates in a block; two at least, where it has as many tokens."""
    return min(block_size, max(2, block_size // CANDIDATES))


def candidates(
    weights: Mapping[str, torch.Tensor], stream: torch.Tensor, block_size: int, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The tokens that an MLP's predictor expects to score highest in their block.

    Args:
        stream: [B, S, H]; valid: [B, S] bool, False on padding, or None.

    Returns:
        [B, n c] int64, c = `candidate_count(block_size)` of each of the n blocks, ascending. A block with fewer real
        tokens repeats its best; one without any names tokens of padding.
    """
    scores = token_scores(weights, network(weights, stream)[1])
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    length = scores.shape[1]
    blocks = functional.pad(scores, (0, -length % block_size), value=-torch.inf).unflatten(1, (-1, block_size))
    best, token = blocks.topk(candidate_count(block_size), dim=2)
    token = torch.where(best == -torch.inf, token[..., :1], token).sort(2).values
    first = torch.arange(0, length, block_size, device=stream.device)
    return (token + first[:, None]).clamp_max(length - 1).flatten(1)


def block_scores(
    weights: Mapping[str, torch.Tensor],
    second: torch.Tensor,
    valid: torch.Tensor | None,
    block_size: int,
    pairs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Second activations [T, B, S, v] -> predicted informativeness [B, n] float32 in the measured score's units.

    An MLP's measured score is the maximum over its tokens; only training asks for it. An attention's is a sum of maxima
    that different tokens win, and a mean of the tokens' outputs predicts it best (docs/predictors.md).

    Args:
        valid: [B, S] bool, False on padding, or None.
        pairs: see `attention_scores`.
    """
    if "distance" not in weights:
        tokens = token_scores(weights, second)
        return pool(tokens[..., None], valid, block_size, "max")[..., 0].exp()
    real = None if valid is None else block_any(valid, block_size)
    # A mean commutes with the third matrix, which then runs on blocks.
    outputs = pool(second, valid, block_size, "mean") @ weights["third"][:, None].float()
    return attention_scores(weights, outputs, real, pairs)


def default_width(kind: SiteKind, hidden: int) -> int:
    """H / 32 for each of an attention's two networks and H / 16 for an MLP's.

    That is H^2 / 8 bytes a layer, and about 1 % of the arithmetic of a layer's step.
    """
    return max(4, hidden // (32 if kind == "attention" else 16))


def random_weights(
    kind: SiteKind, hidden: int, width: int, generator: torch.Generator, compress: bool = True
) -> dict[str, torch.Tensor]:
    """Weights of a predictor's final size, as training would start from them."""
    weights = initial_weights(kind, hidden, width, width, generator)
    return compressed(weights) if compress else weights


def initial_weights(
    kind: SiteKind, inputs: int, hidden: int, outputs: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Floating weights from which training starts; `outputs` counts for an attention only."""
    networks, outputs = (2, outputs) if kind == "attention" else (1, 1)

    def matrix(rows: int, columns: int, gain: float = 2.0) -> torch.Tensor:
        return torch.randn(networks, rows, columns, generator=generator, device="cpu") * math.sqrt(gain / rows)

    weights = {
        "first": matrix(inputs, hidden),
        "first_bias": torch.zeros(networks, hidden, device="cpu"),
        "second": matrix(hidden, hidden),
        "second_bias": torch.zeros(networks, hidden, device="cpu"),
        # Small, so that training starts from the distance bias or the offset alone.
        "third": matrix(hidden, outputs, gain=0.02),
    }
    name, size = ("distance", len(DECAYS)) if kind == "attention" else ("offset", 1)
    weights[name] = torch.zeros(size, device="cpu")
    return weights


def compressed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The form in which weights are kept: `first` in int8, everything else in bfloat16.

    Each column of `first` has a scale of its own, which moves through the ReLU into the rows of `second`.
    """
    largest = weights["first"].abs().amax(1).clamp_min(1e-12)
    scale = largest / (127 * QUANTUM)
    small = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    small["first"] = (weights["first"] / (scale[:, None] * QUANTUM)).round().to(torch.int8)
    small["first_bias"] = (weights["first_bias"] / scale).to(torch.bfloat16)
    small["second"] = (weights["second"] * scale[:, :, None]).to(torch.bfloat16)
    return small
