"""Plain torch for block selection: which tokens stay, given a score per block."""

import torch
from torch.nn import functional

THRESHOLD_BUCKETS = 8
"""A threshold's count is rounded up to one of this many sizes, so that shapes stay few."""

WINDOWS = 8
"""A balanced choice gives each of this many windows of the sequence the same share of its blocks."""

PINNED = torch.finfo(torch.float32).max / 2
"""What pinned blocks rank as: more than any score, so that they reach every threshold up to this."""


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
    """[B, n] bool: first block (attention sink) and last block of each sample's real tokens."""
    if valid is None:
        pinned = torch.zeros(batch, blocks, dtype=torch.bool, device=device)
        pinned[:, 0] = pinned[:, -1] = True
        return pinned
    real = block_any(valid, block_size)
    position = torch.arange(blocks, device=device)
    first = torch.where(real, position, blocks - 1).amin(1, keepdim=True)
    last = torch.where(real, position, 0).amax(1, keepdim=True)
    return (position == first) | (position == last)


def block_any(tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """[B, S] bool -> [B, n] bool: whether a block holds any such token."""
    tail = -tokens.shape[1] % block_size
    return functional.pad(tokens, (0, tail)).unflatten(1, (-1, block_size)).any(-1)


def rank(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    length: int,
    block_size: int,
    count: int,
) -> torch.Tensor:
    """Scores [B, n] with the rules that outrank them.

    A ragged tail > labels > pinned ends > NaN (to be safe) > scored > all padding. The tail comes first because it must
    be taken in every sample, even where more blocks are pinned than the budget holds: what it lacks is then cut off the
    end. Labels come before the ends because without any of their blocks a site has no gradient at all: all of their
    blocks where these are few, else the two that rank highest without them.
    """
    top = torch.finfo(torch.float32).max
    ranked = torch.nan_to_num(scores.float(), nan=top / 4, neginf=-top).clamp_max(top / 4)
    real = None if valid is None else block_any(valid, block_size)
    if real is not None:
        ranked = ranked.masked_fill(~real, -torch.inf)
    pinned = pinned_blocks(scores.shape[1], valid, block_size, scores.shape[0], scores.device)
    ranked = ranked.masked_fill(pinned, PINNED)
    if labelled is not None:
        labels = block_any(labelled, block_size)
        labels = labels if real is None else labels & real
        # A single label may mark two blocks: the token that predicts it, and its own.
        few = labels.sum(1, keepdim=True) <= max(2, count // 2)
        best = ranked.masked_fill(~labels, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :2]
        two = torch.zeros_like(labels).scatter_(1, best, True)
        ranked = ranked.masked_fill(labels & (few | two), top)
    # No branch on the length, which would compile ragged lengths apart.
    ends = torch.arange(1, scores.shape[1] + 1, device=scores.device) * block_size
    return ranked.masked_fill(ends > length, torch.inf)


def take(ranked: torch.Tensor, count: int, block_size: int, length: int) -> torch.Tensor:
    """[B, n] -> [B, K]: the tokens of the `count` best blocks, ascending; ties go to the earlier block."""
    blocks = ranked.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values
    missing = ranked.shape[1] * block_size - length
    kept = torch.arange(count * block_size - missing, device=ranked.device)
    # Spelled out rather than cut off the end, since a compiler would tell a cut result from an uncut one.
    return blocks.index_select(1, kept // block_size) * block_size + kept % block_size


def by_part(values: torch.Tensor, parts: int) -> torch.Tensor:
    """[B, S] -> [B parts, S / parts]: the parts of a sequence as samples of their own."""
    return values.unflatten(1, (parts, -1)).flatten(0, 1)


def select_blocks(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    length: int,
    block_size: int,
    keep: tuple[int, int],
    parts: int = 1,
) -> torch.Tensor:
    """Tokens of the best blocks under a fixed budget.

    Args:
        scores: [B, n].
        valid: [B, S] bool, False on padding; None where every token is real.
        labelled: [B, S] bool, tokens that carry a label; their blocks survive when they are few.
        length: S.
        keep: share of the blocks as a fraction.
        parts: how many equal parts of whole blocks to choose from one by one, each as a sequence of its own.

    Returns:
        [B, K] int64, ascending and unique; K depends on S alone.
    """
    if parts > 1:
        valid, labelled = (None if values is None else by_part(values, parts) for values in (valid, labelled))
        tokens = select_blocks(by_part(scores, parts), valid, labelled, length // parts, block_size, keep)
        first = torch.arange(parts, device=tokens.device) * (length // parts)
        return (tokens.unflatten(0, (-1, parts)) + first[:, None]).flatten(1)
    count = budget(scores.shape[1], keep)
    ranked = rank(scores, valid, labelled, length, block_size, count)
    return take(ranked, count, block_size, length)


def select_by_threshold(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    labelled: torch.Tensor | None,
    length: int,
    block_size: int,
    threshold: torch.Tensor | float,
) -> torch.Tensor:
    """Tokens of every block that reaches the threshold (LeMo section 4.1), and of the next best up to a bucket.

    The largest count in the batch decides for all samples; reading it is the one host synchronisation.
    """
    blocks = scores.shape[1]
    ranked = rank(scores, valid, labelled, length, block_size, blocks)
    bucket = -(-blocks // THRESHOLD_BUCKETS)
    wanted = int((ranked >= threshold).sum(1).max())
    count = min(max(-(-wanted // bucket) * bucket, 2), blocks)
    return take(ranked, count, block_size, length)


def dropped_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """[B, K] -> [B, S - K]: the tokens that are not kept, ascending."""
    kept = torch.zeros(tokens.shape[0], length, dtype=torch.int8, device=tokens.device).scatter_(1, tokens, 1)
    return kept.sort(dim=1, stable=True).indices[:, : length - tokens.shape[1]].contiguous()
