"""The ops `lemo_fx::eliminate` and `lemo_fx::scatter_rows`: schema, fake and autograd.

Each is the other's backward. Neither saves more than the token indices; `torch.gather` would save its whole input.
"""

import torch

from lemo_fx.kernels.eliminate import reference
from lemo_fx.kernels.lowering import obstacle


@torch.library.custom_op("lemo_fx::eliminate", mutates_args=())
def eliminate(stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The kept rows of the stream (LeMo section 4.1, token elimination).

    Args:
        stream: [B, S, H], any float dtype, any strides.
        tokens: [B, K] int64, ascending and unique per sample.

    Returns:
        [B, K, H], contiguous.
    """
    if not obstacle("eliminate", stream.device):
        from lemo_fx.kernels.eliminate import triton

        return triton.eliminate(stream, tokens)
    return reference.eliminate(stream, tokens)


@eliminate.register_fake
def _(stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return stream.new_empty(tokens.shape[0], tokens.shape[1], stream.shape[2])


@torch.library.custom_op("lemo_fx::scatter_rows", mutates_args=())
def scatter_rows(rows: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Rows [B, K, H] put back at `tokens` [B, K], which ascend, of a zero stream [B, length, H]."""
    if not obstacle("scatter_rows", rows.device):
        from lemo_fx.kernels.eliminate import triton

        return triton.scatter(None, rows, tokens, length, rows.dtype)
    return reference.scatter_rows(rows, tokens, length)


@scatter_rows.register_fake
def _(rows: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], length, rows.shape[2])


def _save_tokens(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.length = inputs[0].shape[1]


def _eliminate_backward(ctx, grad):
    (tokens,) = ctx.saved_tensors
    return scatter_rows(grad, tokens, ctx.length), None


def _scatter_backward(ctx, grad):
    (tokens,) = ctx.saved_tensors
    return eliminate(grad, tokens), None, None


eliminate.register_autograd(_eliminate_backward, setup_context=_save_tokens)
scatter_rows.register_autograd(_scatter_backward, setup_context=_save_tokens)


class _GradientAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stream, tokens):
        ctx.save_for_backward(tokens)
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        return scatter_rows(eliminate(grad, tokens), tokens, grad.shape[1]), None


def gradient_at(stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, H] as it is, its gradient that of the rows at tokens [B, K] and zero elsewhere."""
    return _GradientAt.apply(stream, tokens)


eliminate_op = torch.ops.lemo_fx.eliminate.default
