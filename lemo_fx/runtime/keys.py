"""Attention of the kept queries to every key, for the gradient of `exact` sites with `keys="every"`.

The layer's attention runs as two twins. One sees every token and yields its keys and values; the other sees the kept
tokens, and its queries attend to those keys. In compiled code what neither uses (the first one's queries, the second
one's keys, their projections) is never computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo_fx.errors import LemoError
from lemo_fx.graph.anatomy import implementation_of
from lemo_fx.graph.capture import argument_names, by_name
from lemo_fx.runtime import kept
from lemo_fx.runtime.twin import function_of, twin_of

KEYS, QUERIES = "lemo_fx_keys", "lemo_fx_queries"
BLOCK = 128
"""Tokens of a block of flex_attention's masks."""
LISTS = tuple(
    f"{whole}{axis}_{what}" for axis in ("kv", "q") for whole in ("", "full_") for what in ("num_blocks", "indices")
)
"""What `causal_blocks` returns, by its name in a `BlockMask`."""


def _keys(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """An attention function in transformers' registry that returns keys and values where the weights would be."""
    batch, heads, length, _ = query.shape
    return value.new_zeros(()).expand(batch, length, heads, value.shape[-1]), (key, value)


def _queries(module: Any, query, key, value, attention_mask, *, lemo_keys, lemo_tokens, **kwargs):
    """An attention function in transformers' registry whose queries are the kept ones, and whose keys are all.

    Args:
        query: [B, N, K, D] of the kept tokens; key, value: theirs, which are not used.
        attention_mask: of every token, as the layer has it.
        lemo_keys: keys and values [B, M, S, D]; lemo_tokens: [B, K].
    """
    key, value = lemo_keys
    if not module.lemo_attention.training:
        kwargs["dropout"] = 0.0
    if attention_mask is None and _flexible(module, query, kwargs):
        mask = causal_block_mask(lemo_tokens, key.shape[2])
        out = flex_attention(
            query, key, value, block_mask=mask, scale=kwargs.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None
    mask = query_rows(attention_mask, lemo_tokens, key.shape[2], module.lemo_implementation, query.dtype)
    return module.lemo_function(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(KEYS, _keys)
ALL_ATTENTION_FUNCTIONS.register(QUERIES, _queries)


def _flexible(module: Any, query: torch.Tensor, settings: dict[str, Any]) -> bool:
    """Whether flex_attention, which has a backward on GPUs alone and is slow uncompiled, can stand for sdpa.

    Those kernels of sdpa that take a mask are two to three times slower than those for causal order.
    """
    sdpa = module.lemo_implementation == "sdpa" and not settings.get("dropout") and not settings.get("position_bias")
    return sdpa and query.is_cuda and torch.compiler.is_compiling()


def query_rows(mask: Any, tokens: torch.Tensor, length: int, implementation: str, dtype: torch.dtype) -> Any:
    """The rows of a mask that belong to the kept queries: [B, 1 or N, K, S], or a BlockMask of K by S.

    Args:
        mask: None (causal order), [B, S] (padding), [1 or B, 1 or N, S, S] or a BlockMask.
        tokens: [B, K], ascending.
        dtype: of the additive mask that an eager attention takes.
    """
    if isinstance(mask, BlockMask) or implementation == "flex_attention":
        return _block_rows(mask, tokens, length)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        kept.check_mask(mask, length)
        return kept.take(mask.transpose(1, 2), tokens).transpose(1, 2)
    seen = torch.arange(length, device=tokens.device) <= tokens[:, None, :, None]
    if mask is not None:
        kept.check_mask(mask, length)
        seen = seen & mask.bool()[:, None, None, :]
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return seen


def _block_rows(mask: Any, tokens: torch.Tensor, length: int) -> BlockMask:
    if mask is None:
        return causal_block_mask(tokens, length)
    if not isinstance(mask, BlockMask):
        raise LemoError(f"a mask of type {type(mask).__name__} beside flex_attention is not known: use keys='kept'")
    original = mask.mask_mod

    def rows(b, h, q, kv):
        return original(b, h, tokens[b, q], kv)

    batch, count = tokens.shape
    return create_block_mask(rows, batch, None, count, length, device=str(tokens.device), BLOCK_SIZE=mask.BLOCK_SIZE)


def causal_block_mask(tokens: torch.Tensor, length: int) -> BlockMask:
    """What the kept queries [B, K] may see of all keys, in causal order."""

    def sees(b, h, q, kv):
        return kv <= tokens[b, q]

    blocks: Any = dict(zip(LISTS, causal_blocks(tokens, length), strict=True))
    size = (tokens.shape[1], length)
    return BlockMask(seq_lengths=size, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees, **blocks)


_T = torch.Tensor
_Blocks = tuple[_T, _T, _T, _T, _T, _T, _T, _T]


# A custom op, so that these tensors are contiguous in compiled code too: flex_attention's kernels take them to be,
# while a compiler gives what it computes itself any layout.


@torch.library.custom_op("lemo_fx::causal_blocks", mutates_args=())
def causal_blocks(tokens: torch.Tensor, length: int) -> _Blocks:
    """The blocks of a mask of kept queries [B, K] by all keys, by rows and by columns, as `BlockMask` takes them.

    Read off at the ends of blocks of queries; `create_block_mask` would look at every pair of tokens.

    Returns:
        Of Q blocks of queries and N of keys: how many blocks a row has that are seen in part [B, 1, Q], and which
        [B, 1, Q, N]; those seen whole; then the same by columns.
    """
    count = tokens.shape[1]
    ends = torch.arange(-(-count // BLOCK), device=tokens.device) * BLOCK
    first, last = tokens[:, ends], tokens[:, (ends + BLOCK - 1).clamp_max(count - 1)]
    keys = torch.arange(-(-length // BLOCK), device=tokens.device) * BLOCK
    full = keys + (BLOCK - 1) <= first[..., None]
    some = (keys <= last[..., None]) & ~full
    return (*_listed(some), *_listed(full), *_listed(some.mT), *_listed(full.mT))


@causal_blocks.register_fake
def _(tokens: torch.Tensor, length: int) -> _Blocks:
    batch, rows, columns = tokens.shape[0], -(-tokens.shape[1] // BLOCK), -(-length // BLOCK)

    def listed(rows: Any, columns: Any) -> tuple[torch.Tensor, torch.Tensor]:
        counts = tokens.new_empty(batch, 1, rows, dtype=torch.int32)
        return counts, tokens.new_empty(batch, 1, rows, columns, dtype=torch.int32)

    return (*listed(rows, columns), *listed(rows, columns), *listed(columns, rows), *listed(columns, rows))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, Q, N] bool -> (how many are True [B, 1, Q], their indices first [B, 1, Q, N]), contiguous int32."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None].contiguous(), order.to(torch.int32)[:, None].contiguous()


class Keys(nn.Module):
    """Keys and values of every token, of one layer's attention. Called exactly as the attention module is."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the twin is not registered and its weights are not listed twice.
        self.twin = (twin_of(attention, KEYS, training=False),)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments of the attention module, of every token -> keys and values [B, M, S, D]."""
        found = self.twin[0](*args, **kwargs)[1]
        if not isinstance(found, tuple):
            raise LemoError(
                f"{type(self.twin[0]).__name__} does not dispatch to transformers' attention interface with its "
                "present settings, so that its keys are not known; use keys='kept'"
            )
        return found


class Queries(nn.Module):
    """The attention of kept queries to every key."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        # The twin always trains, since a compiler lets no checkpointed function switch it; whether there is dropout the
        # attention says.
        known = {"lemo_implementation": implementation_of(attention), "lemo_function": function_of(attention)}
        self.twin = (twin_of(attention, QUERIES, lemo_attention=attention, training=True, **known),)
        self.names = argument_names(attention)

    def forward(
        self, keys: tuple[torch.Tensor, torch.Tensor], tokens: torch.Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """What the attention module returns, for the kept tokens.

        Args:
            keys: of every token, from `Keys`.
            tokens: [B, K].
            mask: the layer's, of every token.
            args, kwargs: arguments of the attention module, of the kept tokens; the mask among them is not used.
        """
        given = {**by_name(self.names, args, kwargs), "attention_mask": mask, "lemo_keys": keys, "lemo_tokens": tokens}
        return self.twin[0](**given)
