"""Plain torch for block selection: which tokens stay, given a score per block."""

import torch
from torch.nn import functional

THRESHOLD_BUCKETS = 8
"""A threshold's count is rounded up to one of this many sizes, so that shapes stay few."""


WINDOWS = 8
"""A balanced choice gives each of this many windows of the sequence the same share of its blocks."""


def balanced(scores: torch.Tensor) -> torch.Tensor:
    """[B, n] -> [B, n]: minus each block's rank within its window of the sequence, as a share of the window.

    A sum over query blocks grows with the number of rows that see a block, so its best blocks are mostly the first
    ones; ranked within windows, every part of the sequence keeps the same share. NaN stays NaN.
    """
    blocks = scores.shape[1]
    position = torch.arange(blocks, device=scores.device)
    window = position * WINDOWS // blocks
    first = (window * blocks + WINDOWS - 1) // WINDOWS
    after = ((window + 1) * blocks + WINDOWS - 1) // WINDOWS
    best_first = scores.sort(dim=1, descending=True, stable=True).indices
    by_window = best_first.gather(1, window[best_first].sort(dim=1, stable=True).indices)
    share = (position - first + 0.5) / (after - first)
    ranks = torch.empty_like(scores, dtype=torch.float32).scatter_(1, by_window, share.expand_as(scores))
    return torch.where(scores.isnan(), scores, -ranks)


def budget(blocks: int, keep: tuple[int, int]) -> int:
    """Number of kept blocks for `keep` as a fraction (numerator, denominator): rounded up, at least the pinned ones."""
    count = (blocks * keep[0] + keep[1] - 1) // keep[1]
    return min(max(count, 2), blocks)


def pinned_blocks(blocks: int, valid: torch.Tensor | None, block_size: int, batch: int, device) -> torch.Tensor:
    """[B, n] bool: first block (attention sink) and last block of each sample's real tokens, and a ragged tail."""
    pinned = torch.zeros(batch, blocks, dtype=torch.bool, device=device)
    if valid is None:
        pinned[:, 0] = pinned[:, -1] = True
        return pinned
    pinned[:, -1] = valid.shape[1] % block_size != 0
    real = block_any(valid, block_size)
    position = torch.arange(blocks, device=device)
    first = torch.where(real, position, blocks - 1).amin(1)
    last = torch.where(real, position, 0).amax(1)
    return pinned | (position == first[:, None]) | (position == last[:, None])


def block_any(tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """[B, S] bool -> [B, n] bool: whether a block holds any such token."""
    tail = -tokens.shape[1] % block_size
    return functional.pad(tokens, (0, tail)).unflatten(1, (-1, block_size)).any(-1)


def rank(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    block_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with the rules that outrank them: pinned ends > few labels, NaN (to be safe) > scored > all padding.

    Returns:
        (scores [B, n], pinned [B, n]).
    """
    top = torch.finfo(torch.float32).max
    ranked = torch.nan_to_num(scores.float(), nan=top, posinf=top, neginf=-top)
    if labelled is not None:
        labels = block_any(labelled, block_size)
        few = labels.sum(1, keepdim=True) <= count // 2
        ranked = ranked.masked_fill(labels & few, top)
    if valid is not None:
        ranked = ranked.masked_fill(~block_any(valid, block_size), -torch.inf)
    pinned = pinned_blocks(scores.shape[1], valid, block_size, scores.shape[0], scores.device)
    return ranked.masked_fill(pinned, torch.inf), pinned


def take(ranked: torch.Tensor, count: int, block_size: int, length: int) -> torch.Tensor:
    """[B, n] -> [B, K]: the tokens of the `count` best blocks, ascending; ties go to the earlier block."""
    missing = ranked.shape[1] * block_size - length
    if missing:
        # A ragged tail is taken in every sample, even where more blocks are pinned than the budget holds: what it
        # lacks is then cut off the end.
        best = ranked[:, :-1].sort(dim=1, descending=True, stable=True).indices[:, : count - 1]
        tail = best.new_full((best.shape[0], 1), ranked.shape[1] - 1)
        blocks = torch.cat([best.sort(1).values, tail], dim=1)
    else:
        blocks = ranked.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values
    tokens = (blocks[:, :, None] * block_size + torch.arange(block_size, device=ranked.device)).flatten(1)
    return tokens[:, : count * block_size - missing].contiguous()


def select_blocks(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    length: int,
    block_size: int,
    keep: tuple[int, int],
) -> torch.Tensor:
    """Tokens of the best blocks under a fixed budget.

    Args:
        scores: [B, n].
        valid: [B, S] bool, False on padding; None where every token is real.
        labelled: [B, S] bool, tokens that carry a label; their blocks survive when they are few.
        length: S.
        keep: share of the blocks as a fraction.

    Returns:
        [B, K] int64, ascending and unique; K depends on S alone.
    """
    count = budget(scores.shape[1], keep)
    ranked, _ = rank(scores, valid, labelled, block_size, count)
    return take(ranked, count, block_size, length)


def select_by_threshold(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    length: int,
    block_size: int,
    threshold: float,
) -> torch.Tensor:
    """Tokens of every block that reaches the threshold (LeMo section 4.1), and of the next best up to a bucket.

    The largest count in the batch decides for all samples; reading it is the one host synchronisation.
    """
    blocks = scores.shape[1]
    ranked, _ = rank(scores, valid, labelled, block_size, blocks)
    bucket = -(-blocks // THRESHOLD_BUCKETS)
    wanted = int((ranked >= threshold).sum(1).max())
    count = min(max(-(-wanted // bucket) * bucket, 2), blocks)
    return take(ranked, count, block_size, length)


def dropped_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """[B, K] -> [B, S - K]: the tokens that are not kept, ascending."""
    kept = torch.zeros(tokens.shape[0], length, dtype=torch.int8, device=tokens.device).scatter_(1, tokens, 1)
    return kept.sort(dim=1, stable=True).indices[:, : length - tokens.shape[1]].contiguous()
