"""The ops `lemo_fx::restore` and `lemo_fx::restore_exact`: schema, fake and autograd; both save indices only."""

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
        tokens: [B, K] int64, unique per sample.

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


@torch.library.custom_op("lemo_fx::restore_exact", mutates_args=())
def restore_exact(stream: torch.Tensor, full: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The residual add of the `exact` treatment: every token's forward, the kept tokens' gradient.

    Args:
        stream: [B, S, H] residual stream.
        full: [B, S, H] the branch's output for every token, computed without gradient.
        rows: [B, K, H] the branch run on the kept rows with gradient; its values are not used.
        tokens: [B, K] int64, unique per sample.
    """
    return reference.restore_exact(stream, full, rows, tokens)


@restore_exact.register_fake
def _(stream: torch.Tensor, full: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(stream.dtype, full.dtype)
    return torch.empty(stream.shape, dtype=dtype, device=stream.device)


def _save(ctx, inputs, output) -> None:
    *streams, rows, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.stream_dtype, ctx.rows_dtype = streams[0].dtype, rows.dtype
    ctx.others = len(streams) - 1


def _backward(ctx, grad):
    (tokens,) = ctx.saved_tensors
    # Only what is asked for: a stream that needs no gradient must not cost a cast of its length.
    stream_grad = grad.to(ctx.stream_dtype) if ctx.needs_input_grad[0] else None
    rows_grad = eliminate(grad, tokens).to(ctx.rows_dtype) if ctx.needs_input_grad[-2] else None
    return stream_grad, *[None] * ctx.others, rows_grad, None


restore.register_autograd(_backward, setup_context=_save)
restore_exact.register_autograd(_backward, setup_context=_save)

restore_op = torch.ops.lemo_fx.restore.default
restore_exact_op = torch.ops.lemo_fx.restore_exact.default
