"""The op `lemo_fx::restore` with its schema, fake and autograd, and `restore_exact`; both save indices only."""

import torch

from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.kernels.lowering import obstacle
from lemo_fx.kernels.restore import reference


@torch.library.custom_op("lemo_fx::restore", mutates_args=())
def restore(stream: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The residual add of a branch that ran on the kept rows only (LeMo section 4.3, permutation-free).

    Args:
        stream: [B, S, H] residual stream.
        rows: [B, K, H] output of the branch; its dtype may differ from the stream's (autocast).
        tokens: [B, K] int64, ascending and unique per sample.

    Returns:
        [B, S, H] in the promoted dtype.
    """
    if not obstacle("restore", stream.device):
        from lemo_fx.kernels.eliminate import triton

        dtype = torch.promote_types(stream.dtype, rows.dtype)
        return triton.scatter(stream, rows, tokens, stream.shape[1], dtype)
    return reference.restore(stream, rows, tokens)


@restore.register_fake
def _(stream: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(stream.dtype, rows.dtype)
    return torch.empty(stream.shape, dtype=dtype, device=stream.device)


def _save(ctx, inputs, output) -> None:
    stream, rows, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.stream_dtype, ctx.rows_dtype = stream.dtype, rows.dtype


def _backward(ctx, grad):
    (tokens,) = ctx.saved_tensors
    # Only what is asked for: a stream that needs no gradient must not cost a cast of its length.
    stream_grad = grad.to(ctx.stream_dtype) if ctx.needs_input_grad[0] else None
    rows_grad = eliminate(grad, tokens).to(ctx.rows_dtype) if ctx.needs_input_grad[-2] else None
    return stream_grad, rows_grad, None


restore.register_autograd(_backward, setup_context=_save)

restore_op = torch.ops.lemo_fx.restore.default


class _ValuesAndGradient(torch.autograd.Function):
    """Open to a compiler, unlike a custom op: it sees that the forward reads no rows, and leaves them out of it."""

    @staticmethod
    def forward(ctx, stream, values, rows, tokens):
        _save(ctx, (stream, rows, tokens), None)
        return reference.restore_exact(stream, values, rows, tokens)

    @staticmethod
    def backward(ctx, grad):
        stream_grad, rows_grad, _ = _backward(ctx, grad)
        return stream_grad, None, rows_grad, None


def restore_exact(
    stream: torch.Tensor,
    rest: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """The residual add of the `exact` treatment: every token's forward, the kept tokens' gradient.

    Args:
        stream: [B, S, H] residual stream.
        rest: the branch's output without gradient, of every token [B, S, H], or of the dropped ones [B, S - K, H].
        rows: [B, K, H] the branch run on the kept rows with gradient; its values count where `rest` lacks them.
        tokens: [B, K] int64, ascending and unique per sample.
        dropped: [B, S - K] the other tokens, needed where `rest` may be of these alone.

    Returns:
        [B, S, H] in the promoted dtype.
    """
    if dropped is None or rest.shape[1] == stream.shape[1]:
        if torch.compiler.is_compiling():
            # Adds zero, and makes the forward depend on `tokens`: otherwise the partitioner moves the selection into
            # the backward, where selections are only looked up.
            rest = rest + tokens[:, :1, None].clamp(max=0).to(rest.dtype)
        return _ValuesAndGradient.apply(stream, rest, rows, tokens)
    return restore(restore(stream, rest, dropped), rows, tokens)
