"""The ops `lemo_fx::block_scores` and `lemo_fx::random_scores`: schema and fake. Neither has a gradient."""

import torch
from torch.utils.flop_counter import register_flop_formula

from lemo_fx.kernels.block_scores import reference
from lemo_fx.kernels.lowering import obstacle


@torch.library.custom_op("lemo_fx::block_scores", mutates_args=())
def block_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    scaling: float,
    block_size: int,
) -> torch.Tensor:
    """Block informativeness from Q and K; arguments and result as `reference.block_scores`."""
    if not obstacle("block_scores", query.device, mask=mask, block_size=block_size):
        from lemo_fx.kernels.block_scores import triton

        return triton.block_scores(query, key, documents, scaling, block_size)
    return reference.block_scores(query, key, mask, documents, scaling, block_size)


@block_scores.register_fake
def _(query, key, mask, documents, scaling, block_size):
    blocks = (query.shape[2] + block_size - 1) // block_size
    return query.new_empty(query.shape[0], blocks, dtype=torch.float32)


@register_flop_formula(torch.ops.lemo_fx.block_scores)
def _flops(query: torch.Size, key: torch.Size, *rest, **named) -> int:
    """Every query block against every key block; the causal half is not halved, as torch does for attention."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * length * width


@torch.library.custom_op("lemo_fx::random_scores", mutates_args=())
def random_scores(
    stream: torch.Tensor, salt: torch.Tensor, block_size: int, parts: int = 1, first: int = 0
) -> torch.Tensor:
    """Stateless random block scores; arguments and result as `reference.random_scores`."""
    return reference.random_scores(stream, salt, block_size, parts, first)


@random_scores.register_fake
def _(stream, salt, block_size, parts=1, first=0):
    blocks = (stream.shape[1] + block_size - 1) // block_size
    return stream.new_empty(stream.shape[0], blocks, dtype=torch.float32)
