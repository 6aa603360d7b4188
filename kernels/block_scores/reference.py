"""Plain torch for block informativeness (LeMo section 4.1), one row of score blocks at a time."""

import torch
from torch.nn import functional


def per_block(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., S] -> [..., ceil(S / b)]: the maximum of each block of positions; a ragged tail is a block of its own."""
    values = functional.pad(values, (0, -values.shape[-1] % block_size), value=float("-inf"))
    return values.unflatten(-1, (-1, block_size)).amax(-1)


def block_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    scaling: float,
    block_size: int,
) -> torch.Tensor:
    """Informativeness of each token block as a key: `sum over m of I(B_mn)`.

    `I(B_mn)` is the maximum over query block m and key block n of the mean over heads of max(S_ij, 0). Memory is
    linear in S: one block of query rows is scored at a time.

    Args:
        query: [B, N, S, D] after position embedding.
        key: [B, N or N / group, S, D].
        mask: None for plain causal order, [B or 1, 1 or N, S, S] bool (True attends) or additive float. A query that
            may not attend to itself is padding: what it looks at does not count.
        documents: [1 or B, S] int, instead of a mask: causal order within equal numbers; -1 marks padding.
        scaling: the attention's own factor.

    Returns:
        [B, ceil(S / b)] float32; a block that nothing attends to scores 0.
    """
    batch, _, length, _ = query.shape
    kv_heads = key.shape[1]
    columns = torch.arange(length, device=query.device)
    total = torch.zeros(batch, -(-length // block_size), device=query.device)
    real = None if mask is None else allows(mask.diagonal(dim1=-2, dim2=-1))
    across = key.transpose(2, 3)
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        reach = stop if mask is None else length
        # The query heads of one key head as rows of one matrix: the keys are not repeated.
        rows = query[:, :, start:stop].unflatten(1, (kv_heads, -1)).flatten(2, 3)
        scores = (rows @ across[..., :reach]).float().relu_()
        scores = scores.unflatten(2, (-1, stop - start)).flatten(1, 2)
        if mask is None or real is None:
            # One condition for all heads, so it may follow the mean, and then costs a head's share.
            positive = scores.mean(1)
            allowed = columns[None, None, :reach] <= columns[start:stop, None]
            if documents is not None:
                own, seen = documents[:, start:stop, None], documents[:, None, :reach]
                allowed = allowed & (own == seen) & (seen >= 0)
            positive = torch.where(allowed, positive, 0.0)
        else:
            allowed = allows(mask[:, :, start:stop]) & real[:, :, start:stop, None]
            positive = torch.where(allowed, scores, 0.0).mean(1)
        # A positive factor commutes with both maxima.
        best = per_block(positive.amax(1), block_size) * scaling
        total[:, : best.shape[1]] += best
    return total


def allows(mask: torch.Tensor) -> torch.Tensor:
    """A bool or additive mask as bool: True attends."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def activation_scores(activation: torch.Tensor, block_size: int) -> torch.Tensor:
    """Informativeness for an MLP: the largest mean |activation| among a block's tokens. [B, S, F] -> [B, ceil(S / b)].

    For a ReLU network this is the paper's rule on the activations after ReLU; for a gated one they are
    act(gate) * up, which have both signs, hence the magnitude.
    """
    return per_block(activation.abs().mean(-1, dtype=torch.float32), block_size)


def mix(value: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser (splitmix64's constants as signed integers): every input bit moves every output bit."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def random_scores(
    stream: torch.Tensor, salt: torch.Tensor, block_size: int, parts: int = 1, first: int = 0
) -> torch.Tensor:
    """Uniform scores in [0, 1) hashed from the layer's input and a salt: no random state is read or advanced.

    The same input gives the same choice, so a recompute, a resumed run and a second process agree.

    Args:
        stream: [B, S, H] the layer's input.
        salt: [1] int64, different for every site.
        parts: how many equal parts of whole blocks the stream is taken for, each with a hash of its own.
        first: number of the first of them in the sequence.

    Returns:
        [B, ceil(S / b)] float32.
    """
    blocks = -(-stream.shape[1] // block_size)
    bits = stream.detach()[:, ::block_size, :16].float().contiguous().view(torch.int32).long()
    position = torch.arange(blocks, device=stream.device) + blocks // parts * first
    content = mix(bits.sum(-1) + mix(position + 1))
    # All of a part enters every block's hash, so that a block's luck changes with its neighbours.
    whole = content.unflatten(1, (parts, -1)).sum(-1, keepdim=True).expand(-1, -1, blocks // parts).flatten(1)
    mixed = mix(content + whole * 31 + mix(salt))
    return (mixed & 0xFFFFFF).float() / 0x1000000
