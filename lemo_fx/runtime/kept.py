"""What follows the kept tokens: position embeddings, masks, documents, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lemo_fx.errors import InputError
from lemo_fx.graph.anatomy import MASKED_IMPLEMENTATIONS, implementation_of
from lemo_fx.graph.capture import module_of
from lemo_fx.kernels.block_scores.reference import allows
from lemo_fx.kernels.eliminate.reference import eliminate
from lemo_fx.kernels.select_blocks import reference as selection


def take(sequence: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[1 or B, S, ...] -> [B, K, ...]: entries at tokens [B, K]; for tensors that carry no gradient."""
    return eliminate(sequence.expand(tokens.shape[0], *sequence.shape[1:]), tokens)


def dropped_tokens(tokens: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """[B, K] -> [B, S - K]: the tokens that the selection leaves out."""
    return selection.dropped_tokens(tokens, stream.shape[1])


def compact_rows(value: Any, tokens: torch.Tensor, length: int) -> Any:
    """What runs along the sequence, [1 or B, S, ...], or a tuple of such (position embeddings), at the kept tokens."""
    if isinstance(value, tuple | list):
        return tuple(compact_rows(item, tokens, length) for item in value)
    return take(value, tokens) if runs_along(value, tokens.shape[0], length) else value


def compact_mask(mask: Any, tokens: torch.Tensor, length: int) -> Any:
    """The attention mask between kept tokens. Padding, documents and sliding windows stay as they were.

    None (plain causal order) stays None: kept tokens are in their original order. [B, S] padding masks, [1 or B,
    1 or N, S, S] masks and BlockMasks are indexed by the tokens' original positions.
    """
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        return _compact_block_mask(mask, tokens)
    check_mask(mask, length)
    if mask.dim() == 2:
        return take(mask, tokens)
    batch = tokens.shape[0]
    if mask.shape[1] == 1:
        rows = take(mask[:, 0], tokens)
        columns = tokens[:, None, :].expand(batch, tokens.shape[1], -1)
        return torch.gather(rows, 2, columns).unsqueeze(1)
    rows = take(mask.transpose(1, 2), tokens)
    return torch.gather(rows, 3, tokens[:, None, None, :].expand(*rows.shape[:3], -1)).transpose(1, 2)


def check_mask(mask: torch.Tensor, length: int) -> None:
    """Raise InputError unless a mask tensor is [B, S] or [B, heads, S, S]."""
    square = mask.dim() == 4 and mask.shape[2] == length
    if not (square or mask.dim() == 2) or mask.shape[-1] != length:
        raise InputError(
            f"attention_mask of shape {list(mask.shape)} does not fit {length} tokens: a rewritten layer takes "
            "None, [B, S], [B, heads, S, S] or a BlockMask"
        )


def _compact_block_mask(mask: BlockMask, tokens: torch.Tensor) -> BlockMask:
    original = mask.mask_mod

    def kept(b, h, q, kv):
        return original(b, h, tokens[b, q], tokens[b, kv])

    batch, length = tokens.shape
    return create_block_mask(kept, batch, None, length, length, device=str(tokens.device), BLOCK_SIZE=mask.BLOCK_SIZE)


def square_mask(mask: BlockMask, stream: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S] bool: what a BlockMask allows, spelled out."""
    position = torch.arange(stream.shape[1], device=stream.device)
    return _allowed(mask, stream, position[:, None], position)[:, None]


def _allowed(mask: BlockMask, stream: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B, ...] bool: whether tokens of the first head's queries may attend to keys, places that broadcast to [...]."""
    shape = torch.broadcast_shapes(queries.shape, keys.shape)
    sample = torch.arange(stream.shape[0], device=stream.device).view(-1, *(1 for _ in shape))
    return mask.mask_mod(sample, torch.zeros_like(sample), queries, keys).expand(stream.shape[0], *shape)


def numbers_documents(mixer: fx.Node, graph: fx.Graph) -> bool:
    """Whether the attention behind this node learns of documents from position_ids instead of from a mask."""
    return implementation_of(module_of(graph, mixer)) not in MASKED_IMPLEMENTATIONS


def compact_positions(position_ids: Any, tokens: torch.Tensor, length: int, renumber: bool) -> Any:
    """position_ids [1 or B, S], or [A, 1 or B, S] with A axes (GLM-4.5V), at the kept tokens.

    With `renumber`, counted anew within each document: an attention that finds documents where position_ids restart
    would take every gap for a new document.
    """
    if not isinstance(position_ids, torch.Tensor):
        return position_ids
    if position_ids.dim() == 3:
        return torch.stack([compact_positions(axis, tokens, length, renumber) for axis in position_ids])
    if not renumber:
        return take(position_ids, tokens)
    return _count_within(take(document_ids(position_ids), tokens))


def _count_within(documents: torch.Tensor) -> torch.Tensor:
    """[B, K] ascending document numbers -> position of each token within its document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, S], or [A, B, S] of which the first axis counts, -> [B, S]: a new document starts wherever a position is not
    its predecessor plus one."""
    position_ids = position_ids[0] if position_ids.dim() == 3 else position_ids
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


def told_documents(
    stream: torch.Tensor, position_ids: torch.Tensor | None, cu_seq_lens: torch.Tensor | None
) -> torch.Tensor | None:
    """[1 or B, S] ascending document numbers, as an attention finds them that is not told by a mask."""
    if isinstance(cu_seq_lens, torch.Tensor):
        ends = cu_seq_lens[1:].long().contiguous()
        return torch.searchsorted(ends, torch.arange(stream.shape[1], device=stream.device), right=True)[None]
    return document_ids(position_ids) if isinstance(position_ids, torch.Tensor) else None


def block_pairs(
    mask: Any, documents: torch.Tensor | None, stream: torch.Tensor, block_size: int
) -> torch.Tensor | None:
    """[1 or B, n, n] bool: whether some token of query block m may attend to some token of key block n < m.

    Read off at each pair's two closest tokens, the first query and the last key: documents are contiguous and windows
    reach back from the query, so no other pair of tokens is allowed where these are not. The diagonal is all True. None
    where everything earlier is allowed.

    Args:
        mask: the layer's; documents: [1 or B, S] numbers, where it has documents that the mask does not show.
    """
    length = stream.shape[1]
    first = torch.arange(0, length, block_size, device=stream.device)
    last = (first + block_size - 1).clamp_max(length - 1)
    if isinstance(mask, BlockMask):
        allowed = _allowed(mask, stream, first[:, None], last)
    elif isinstance(mask, torch.Tensor) and mask.dim() == 4:
        allowed = allows(mask[:, 0, first[:, None], last])
    elif documents is not None:
        allowed = documents[:, first, None] == documents[:, None, last]
    else:
        return None
    return allowed | torch.eye(len(first), dtype=torch.bool, device=stream.device)


def compact_kwargs(kwargs: Mapping[str, Any], tokens: torch.Tensor, length: int, renumber: bool) -> dict[str, Any]:
    """The layer's remaining keyword arguments for the kept tokens.

    What may as well be an argument of its own is treated as that: the mask, position_ids. `cu_seq_lens_*` count kept
    tokens per document; anything else that does not run along the sequence passes through.
    """
    compact: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_ids":
            compact[name] = compact_positions(value, tokens, length, renumber)
        elif name == "attention_mask":
            compact[name] = compact_mask(value, tokens, length)
        elif name.startswith("cu_seq_lens") and isinstance(value, torch.Tensor):
            compact[name] = torch.searchsorted(tokens[0].contiguous(), value.long().contiguous()).to(value.dtype)
        else:
            compact[name] = compact_rows(value, tokens, length)
    return compact


def runs_along(value: Any, batch: int, length: int) -> bool:
    """Whether a value is a tensor of one entry a token: [1 or B, S, ...]."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 2
        and value.shape[1] == length
        and value.shape[0] in (1, batch)
    )


def valid_tokens(mask: Any, stream: torch.Tensor) -> torch.Tensor | None:
    """[B, S] bool, False on padding, from the layer's mask; None where every token is real.

    In a square mask a token is real if it may attend to itself.
    """
    batch, length = stream.shape[:2]
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        position = torch.arange(length, device=stream.device)
        return _allowed(mask, stream, position, position)
    check_mask(mask, length)
    if mask.dim() == 2:
        return mask.bool().expand(batch, length)
    return allows(mask[:, 0].diagonal(dim1=-2, dim2=-1)).expand(batch, length)


def labelled_tokens(labels: torch.Tensor | None, stream: torch.Tensor) -> torch.Tensor | None:
    """[B, S] bool: tokens that are a target or predict one; None where the step has no labels of this shape.

    Args:
        labels: [B, S], or [B, S + 1] where more of the sequence follows elsewhere.
    """
    batch, length = stream.shape[:2]
    if (
        not isinstance(labels, torch.Tensor)
        or labels.dim() != 2
        or labels.shape[0] != batch
        or labels.shape[1] - length not in (0, 1)
    ):
        return None
    target = (labels != -100).to(stream.device)
    predicts = torch.zeros_like(target)
    predicts[:, :-1] = target[:, 1:]
    return (target | predicts)[:, :length]
