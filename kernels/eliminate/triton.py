"""Triton kernels that move rows between the residual stream and its kept part, each row read and written once."""

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_kernel(
    STREAM, TOKENS, OUT, stride_xb, stride_xs, stride_xh, kept, width, WIDTH: tl.constexpr
):  # fmt: skip
    """OUT[b, k] = STREAM[b, TOKENS[b, k]]; one program per row and piece of WIDTH columns."""
    k = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    b = tl.program_id(2).to(tl.int64)
    token = tl.load(TOKENS + b * kept + k)
    row = tl.load(
        STREAM + b * stride_xb + token * stride_xs + column.to(tl.int64) * stride_xh, mask=column < width
    )  # fmt: skip
    tl.store(OUT + (b * kept + k) * width + column, row, mask=column < width)


@triton.jit
def _scatter_kernel(
    STREAM, ROWS, TOKENS, OUT,
    stride_xb, stride_xs, stride_xh, stride_rb, stride_rk, stride_rh,
    kept, length, width, STEPS: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """OUT[b, s] = (STREAM[b, s] if ADDS else 0) + (ROWS[b, k] if TOKENS[b, k] == s for some k else 0).

    TOKENS[b] ascends: k is found by halving, STEPS times, while the stream's row is on its way.
    """
    s = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    b = tl.program_id(2).to(tl.int64)
    inside = column < width
    wide = column.to(tl.int64)
    if ADDS:
        held = tl.load(STREAM + b * stride_xb + s * stride_xs + wide * stride_xh, mask=inside)
    # The first k whose token is not before s: of the tokens before s at most s are kept, of those from s on at most
    # length - s.
    start = TOKENS + b * kept
    low = tl.maximum(kept - (length - s), 0)
    high = tl.minimum(s, kept)
    for _ in range(STEPS):
        middle = (low + high) // 2
        before = (middle < high) & (tl.load(start + tl.minimum(middle, kept - 1)) < s)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    # low may be `kept`: the last token is then before s.
    place = tl.where(tl.load(start + tl.minimum(low, kept - 1)) == s, low, -1) + tl.zeros([WIDTH], tl.int64)
    row = tl.load(ROWS + b * stride_rb + place * stride_rk + wide * stride_rh, mask=inside & (place >= 0), other=0.0)
    if ADDS:
        if OUT.dtype.element_ty == tl.float64:
            row = held.to(tl.float64) + row.to(tl.float64)
        else:
            row = held.to(SUM) + row.to(SUM)
    tl.store(OUT + (b * length + s) * width + column, row.to(OUT.dtype.element_ty), mask=inside)


def _pieces(width: int) -> tuple[int, int]:
    piece = min(4096, triton.next_power_of_2(width))
    return piece, triton.cdiv(width, piece)


def eliminate(stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As `reference.eliminate`, for any strides."""
    batch, kept = tokens.shape
    width = stream.shape[2]
    out = torch.empty(batch, kept, width, dtype=stream.dtype, device=stream.device)
    piece, pieces = _pieces(width)
    if out.numel():
        _gather_kernel[(kept, pieces, batch)](
            stream, tokens.contiguous(), out, *stream.stride(), kept, width, WIDTH=piece, num_warps=4
        )
    return out


def scatter(
    stream: torch.Tensor | None, rows: torch.Tensor, tokens: torch.Tensor, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """stream (zeros if None) with rows added at tokens, in one pass over the stream; for any strides."""
    batch, kept = tokens.shape
    width = rows.shape[2]
    out = torch.empty(batch, length, width, dtype=dtype, device=rows.device)
    if not kept:
        return out.zero_() if stream is None else out.copy_(stream)
    piece, pieces = _pieces(width)
    held = rows if stream is None else stream
    _scatter_kernel[(length, pieces, batch)](
        held, rows, tokens.contiguous(), out, *held.stride(), *rows.stride(),
        kept, length, width, STEPS=kept.bit_length(), WIDTH=piece,
        ADDS=stream is not None, SUM=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=4,
    )  # fmt: skip
    return out
