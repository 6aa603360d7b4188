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
def _place_kernel(TOKENS, PLACE, kept, length, BLOCK: tl.constexpr):
    """PLACE[b, TOKENS[b, k]] = k."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    token = tl.load(TOKENS + b * kept + k, mask=k < kept)
    tl.store(PLACE + b * length + token, k, mask=k < kept)


@triton.jit
def _scatter_kernel(
    STREAM, ROWS, PLACE, OUT,
    stride_xb, stride_xs, stride_xh, stride_rb, stride_rk, stride_rh,
    length, width, WIDTH: tl.constexpr, ADDS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """OUT[b, s] = (STREAM[b, s] if ADDS else 0) + (ROWS[b, PLACE[b, s]] if s is kept else 0)."""
    s = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    b = tl.program_id(2).to(tl.int64)
    inside = column < width
    wide = column.to(tl.int64)
    place = tl.load(PLACE + b * length + s).to(tl.int64) + tl.zeros([WIDTH], tl.int64)
    row = tl.load(
        ROWS + b * stride_rb + place * stride_rk + wide * stride_rh, mask=inside & (place >= 0), other=0.0
    )  # fmt: skip
    if ADDS:
        held = tl.load(STREAM + b * stride_xb + s * stride_xs + wide * stride_xh, mask=inside)
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
    place = torch.full((batch, length), -1, dtype=torch.int32, device=rows.device)
    if kept:
        _place_kernel[(triton.cdiv(kept, 1024), batch)](tokens.contiguous(), place, kept, length, BLOCK=1024)
    out = torch.empty(batch, length, width, dtype=dtype, device=rows.device)
    piece, pieces = _pieces(width)
    held = rows if stream is None else stream
    _scatter_kernel[(length, pieces, batch)](
        held, rows, place, out, *held.stride(), *rows.stride(), length, width,
        WIDTH=piece, ADDS=stream is not None, SUM=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=4,
    )  # fmt: skip
    return out
