"""A Triton kernel that turns a matrix of bytes: torch's own copy of a transposed one reads a byte at a time."""

import torch
import triton
import triton.language as tl

SIDE = 64


@triton.jit
def _transpose_kernel(MATRIX, OUT, rows, columns, SIDE: tl.constexpr):
    """OUT[c, r] = MATRIX[r, c]; one program per square of SIDE."""
    row = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    column = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    square = tl.load(MATRIX + row[:, None] * columns + column[None, :], mask=inside)
    tl.store(OUT + column[:, None] * rows + row[None, :], tl.trans(square), mask=tl.trans(inside))


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K], contiguous -> [K, N], contiguous."""
    rows, columns = matrix.shape
    out = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    _transpose_kernel[(triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE))](matrix, out, rows, columns, SIDE=SIDE)
    return out
