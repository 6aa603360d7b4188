"""The matmul of float8 rows and columns that every float8 linear layer ends in."""

import torch

from lemo_fx.kernels.private import scaled_product


def scaled_matmul(
    rows: torch.Tensor, row_scale: torch.Tensor, columns: torch.Tensor, column_scale: torch.Tensor
) -> torch.Tensor:
    """Float8 [M, K] @ float8 [N, K].T, times scales [M, 1] and [N, 1] -> [M, N], bfloat16; float32 on the CPU.

    The GPU takes rows and columns that lie one after the other. Those of a transposed weight do not, nor those of a
    transposed input or gradient (a convolution over tokens hands one back): they are copied, in float8.
    """
    if not rows.is_cuda:
        return (rows.float() @ columns.float().T) * row_scale * column_scale.T
    sides = rows.contiguous(), columns.contiguous().t(), row_scale, column_scale.t()
    return scaled_product(*sides, out_dtype=torch.bfloat16, use_fast_accum=True)
