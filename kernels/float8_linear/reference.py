"""Plain torch for `float8_linear`: both operands rounded to float8, one scale a row, multiplied in float32."""

import torch

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(rows: torch.Tensor, again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (float8 [N, K], float32 scales [N, 1]); the largest magnitude of a row becomes float8's largest.

    Args:
        again: the same numbers from other operations (a factor of two is exact). A compiler that meets equal operations
            in forward and recompute does them once and keeps the result, here a copy of the weights, between them.
    """
    largest = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-30)
    scale = largest / (2 * LARGEST) * 2 if again else largest / LARGEST
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def float8_linear(x: torch.Tensor, weight: torch.Tensor, again: bool = False) -> torch.Tensor:
    """x [..., K], weight [N, K] -> [..., N] in x's dtype.

    Args:
        again: as in `quantise`, of the weight.
    """
    rows, row_scale = quantise(x.flatten(0, -2))
    columns, column_scale = quantise(weight, again)
    out = (rows.float() @ columns.float().T) * row_scale * column_scale.T
    return out.to(x.dtype).unflatten(0, x.shape[:-1])
