"""The functions that rewritten graphs call at run time, besides the ops under kernels/."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lemo_fx.errors import InputError
from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.kernels.float8_linear.op import Float8Switch
from lemo_fx.kernels.select_blocks import reference as selection

MASKED_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Attention implementations that are told what may attend to what by a mask. Others (flash attention) read cu_seqlens
or restarting position_ids instead, which therefore must count kept tokens."""


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


ATTENTION_OPS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Checkpoint policy that keeps what scaled dot product attention computed and recomputes the rest."""
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten._grouped_mm.default: 0,
    torch.ops.aten._scaled_mm.default: 0,
}
"""Matrix products, and which argument is the left matrix."""
WIDENING = 8


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Checkpoint policy that recomputes what is cheap: norms, casts, activation functions, an adapter's way back up.

    A product whose result is `WIDENING` times as wide as its input is a low-rank adapter's second one: its input is
    kept in its place.
    """
    if operation in PRODUCTS:
        left, right = args[PRODUCTS[operation] :][:2]
        if right.shape[-1] < WIDENING * left.shape[-1]:
            return CheckpointPolicy.MUST_SAVE
    return keep_attention(context, operation)


def keep_sums(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """`keep_products` for a compiler, which saves no more of what may be kept than the backward reads.

    It may keep sums in the model's precision too: rotated queries and keys and the stream between two branches, in the
    place of the products that they come from, which their adapters' part would have to be added to again.
    """
    if operation is torch.ops.aten.add.Tensor and all(isinstance(term, torch.Tensor) for term in args[:2]):
        first, second = args[:2]
        if first.shape == second.shape and first.dtype == second.dtype:
            return CheckpointPolicy.MUST_SAVE
    return keep_products(context, operation, *args, **kwargs)


def keep_nothing(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Checkpoint policy that recomputes everything, for a compiler: see `_checkpoint`."""
    return CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTE_ALL = functools.partial(create_selective_checkpoint_contexts, keep_nothing)
SELECTIVE = {
    "projections": functools.partial(create_selective_checkpoint_contexts, keep_attention),
    "elementwise": functools.partial(create_selective_checkpoint_contexts, keep_products),
}
"""`LemoConfig.recompute` -> what a checkpointed branch keeps besides its arguments."""
SELECTIVE_COMPILED = {**SELECTIVE, "elementwise": functools.partial(create_selective_checkpoint_contexts, keep_sums)}


def branch(
    function: Callable, checkpointing: bool, recompute: str, *args: Any, float8: Float8Switch | None = None
) -> torch.Tensor:
    """Run a branch; where its layer checkpoints activations, keep only its arguments and recompute it in the backward.

    The rows that reach a branch are the kept ones, so a checkpointed layer keeps less than its full input.

    Args:
        checkpointing: the layer's own switch (`model.gradient_checkpointing_enable()`).
        recompute: as in `LemoConfig`.
        float8: runs the branch with the frozen linear layers' products in float8, forward and backward.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return function(*args) if float8 is None else float8.run(function, *args)
    contexts = SELECTIVE_COMPILED if torch.compiler.is_compiling() else SELECTIVE
    selective: dict[str, Any] = {"context_fn": contexts[recompute]} if recompute in contexts else {}
    return _checkpoint(function, *args, float8=float8, **selective)


def _checkpoint(function: Callable, *args: Any, float8: Float8Switch | None, **selective: Any) -> torch.Tensor:
    selective["use_reentrant"] = False
    if float8 is None:
        return checkpoint(function, *args, **selective)
    if torch.compiler.is_compiling():
        # A compiler does not see that what a function with a gradient of its own computes within a checkpoint is to be
        # recomputed, unless a policy says so operation by operation; it would keep every product.
        selective.setdefault("context_fn", RECOMPUTE_ALL)
        # Traced once, and a compiler lets a checkpointed function change nothing outside of it.
        return float8.run(checkpoint, function, *args, **selective)
    return checkpoint(float8.run, function, *args, **selective)


SEGMENT = 8192
MOST_SEGMENTS = 8
"""Tokens of a token-wise branch that are recomputed at a time, and how many pieces there are at most (a compiler writes
each of them out). The MLP's inner activations are several times as wide as the stream; without segments, one long
layer's recompute would set the peak of the whole step."""


def token_wise_branch(
    function: Callable,
    checkpointing: bool,
    recompute: str,
    length: int,
    share: float,
    rows: torch.Tensor,
    *args: Any,
    float8: Float8Switch | None = None,
) -> torch.Tensor:
    """`branch` for a function that treats each token of rows [B, K, H] alone: recomputed in segments of tokens.

    Args:
        length: S, of the stream that the rows are from.
        share: as in `segments`.
    """
    checkpointing = checkpointing and torch.is_grad_enabled()
    # Where nothing is recomputed, or the wide products are kept, segments save nothing.
    parts = (rows,) if not checkpointing or recompute == "elementwise" else segments(rows, length, share)
    if len(parts) == 1:
        return branch(function, checkpointing, recompute, rows, *args, float8=float8)
    return torch.cat([_checkpoint(function, part, *args, float8=float8) for part in parts], dim=1)


def segments(rows: torch.Tensor, length: int, share: float) -> Sequence[torch.Tensor]:
    """[B, K, H] in pieces of the tokens.

    Args:
        length: S, of the stream that the rows are from.
        share: of the stream's tokens that the rows are at most, in any layer. While a compiler traces, it counts in the
            place of K, so that layers of other budgets, and what a threshold keeps, need no other program.
    """
    count, pieces = rows.shape[1], 1
    most = -(-length * math.ceil(64 * share) // 64) if torch.compiler.is_compiling() else count
    while pieces < MOST_SEGMENTS and not guard_or_false(most <= pieces * SEGMENT):
        pieces += 1
    if pieces == 1:
        return (rows,)
    size = count // pieces
    return rows.split([size] * (pieces - 1) + [count - size * (pieces - 1)], dim=1)


def without_gradient(function: Callable, *args: Any, float8: Float8Switch | None = None) -> torch.Tensor:
    """Run a function for its values only: nothing is saved for the backward.

    Args:
        float8: runs it with the frozen linear layers' products in float8.
    """
    with torch.no_grad():
        return function(*args) if float8 is None else float8.run(function, *args)


def token_wise_without_gradient(
    function: Callable, length: int, rows: torch.Tensor, *args: Any, float8: Float8Switch | None = None
) -> torch.Tensor:
    """`without_gradient` for a function that treats each token of rows [B, K, H] alone, in segments of tokens.

    Args:
        length: S, of the stream that the rows are from.
    """
    parts = [without_gradient(function, part, *args, float8=float8) for part in segments(rows, length, 1.0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def rows_for_values(stream: torch.Tensor, dropped: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """The rows of the stream [B, S, H] that a token-wise branch must also run on for its values.

    Those at the dropped tokens [B, S - K]. Where the kept ones' branch is recomputed in the backward, a compiler leaves
    it out of the forward if its values come from elsewhere; every row without gradient is then as much work, and no row
    moves.
    """
    stream = stream.detach()
    if checkpointing and torch.compiler.is_compiling():
        return stream
    return eliminate(stream, dropped)


def take(sequence: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[1 or B, S, ...] -> [B, K, ...]: entries at tokens [B, K]; for tensors that carry no gradient."""
    batch = tokens.shape[0]
    if batch == 1 and sequence.shape[0] == 1:
        return sequence[0].index_select(0, tokens[0]).unsqueeze(0)
    return sequence.expand(batch, *sequence.shape[1:])[torch.arange(batch, device=tokens.device)[:, None], tokens]


def dropped_tokens(tokens: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """[B, K] -> [B, S - K]: the tokens that the selection leaves out."""
    return selection.dropped_tokens(tokens, stream.shape[1])


def compact_rows(value: Any, tokens: torch.Tensor, length: int) -> Any:
    """Position embeddings at the kept tokens' original positions: [1 or B, S, D], or a tuple of such."""
    if isinstance(value, tuple | list):
        return tuple(compact_rows(item, tokens, length) for item in value)
    return take(value, tokens) if isinstance(value, torch.Tensor) else value


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
    batch, length = stream.shape[:2]
    position = torch.arange(length, device=stream.device)
    sample = torch.arange(batch, device=stream.device)[:, None, None]
    allowed = mask.mask_mod(sample, torch.zeros_like(sample), position[:, None], position[None, :])
    return allowed.expand(batch, length, length)[:, None]


def numbers_documents(mixer: fx.Node, graph: fx.Graph) -> bool:
    """Whether the attention behind this node learns of documents from position_ids instead of from a mask."""
    module = graph.owning_module.get_submodule(str(mixer.target))  # type: ignore[union-attr]
    return getattr(module.config, "_attn_implementation", None) not in MASKED_IMPLEMENTATIONS


def compact_positions(position_ids: Any, tokens: torch.Tensor, length: int, renumber: bool) -> Any:
    """position_ids [1 or B, S] at the kept tokens.

    With `renumber`, counted anew within each document: an attention that finds documents where position_ids restart
    would take every gap for a new document.
    """
    if not isinstance(position_ids, torch.Tensor):
        return position_ids
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
    """[B, S] -> [B, S]: a new document starts wherever a position is not its predecessor plus one."""
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
        sample = torch.arange(stream.shape[0], device=stream.device)[:, None, None]
        allowed = mask.mask_mod(sample, torch.zeros_like(sample), first[:, None], last)
        allowed = allowed.expand(stream.shape[0], len(first), len(first))
    elif isinstance(mask, torch.Tensor) and mask.dim() == 4:
        entries = mask[:, 0, first[:, None], last]
        allowed = entries if entries.dtype == torch.bool else entries > torch.finfo(entries.dtype).min / 2
    elif documents is not None:
        allowed = documents[:, first, None] == documents[:, None, last]
    else:
        return None
    return allowed | torch.eye(len(first), dtype=torch.bool, device=stream.device)


def compact_kwargs(kwargs: Mapping[str, Any], tokens: torch.Tensor, length: int, renumber: bool) -> dict[str, Any]:
    """The layer's remaining keyword arguments for the kept tokens.

    `cu_seq_lens_*` count kept tokens per document, position_ids as in `compact_positions`; any other tensor of shape
    [1 or B, S, ...] is indexed; everything else passes through.
    """
    compact: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_ids":
            compact[name] = compact_positions(value, tokens, length, renumber)
        elif name.startswith("cu_seq_lens") and isinstance(value, torch.Tensor):
            compact[name] = torch.searchsorted(tokens[0].contiguous(), value.long().contiguous()).to(value.dtype)
        elif _runs_along(value, tokens.shape[0], length):
            compact[name] = take(value, tokens)
        else:
            compact[name] = value
    return compact


def _runs_along(value: Any, batch: int, length: int) -> bool:
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
        sample = torch.arange(batch, device=stream.device)[:, None]
        return mask.mask_mod(sample, torch.zeros_like(sample), position, position).expand(batch, length)
    check_mask(mask, length)
    if mask.dim() == 2:
        return mask.bool().expand(batch, length)
    diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    real = diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2
    return real.expand(batch, length)


def labelled_tokens(labels: torch.Tensor | None, stream: torch.Tensor) -> torch.Tensor | None:
    """[B, S] bool: tokens that are a target or predict one; None where the step has no labels of this shape."""
    if labels is None or labels.shape != stream.shape[:2]:
        return None
    target = (labels != -100).to(stream.device)
    predicts = torch.zeros_like(target)
    predicts[:, :-1] = target[:, 1:]
    return target | predicts
