"""Plain torch for `float8_linear`: what x's rows have in common is multiplied as it is, the rest in float8.

float8 has 3 bits after the leading one, so the error of a product grows with what is rounded. The inputs of a language
model's linear layers are large in a few channels, in all tokens alike. That part, once rounded, would err alike in
every token too, which adds up where independent errors cancel.
"""

import torch
import torch.nn.functional as F

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SAMPLE = 4
"""One row of so many is asked for what rows have in common."""


def quantise(rows: torch.Tensor, again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (float8 [N, K], float32 scales [N, 1]); the largest magnitude of a row becomes float8's largest.

    Args:
        again: the same numbers from other operations (a factor of two is exact). A compiler that meets equal operations
            in forward and recompute does them once and keeps the result, here a copy of the weights, between them.
    """
    largest = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-30)
    scale = largest / (2 * LARGEST) * 2 if again else largest / LARGEST
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def common_row(rows: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [K] in the same dtype: the mean row, where each counts by the inverse of its largest magnitude.

    In pretrained models the first token of a text is some thousand times as large as the others: it alone would decide
    a plain mean. Rows of zeros do not count, nor do those that are not finite, so that others do not become like them.
    """
    sample = rows[::SAMPLE].float()
    size = sample.abs().amax(1, keepdim=True)
    counts = (size > 1e-30) & size.isfinite()
    share = torch.where(counts, 1 / size, 0.0)
    common = torch.where(counts, sample * share, 0.0).sum(0) / share.sum().clamp_min(1e-30)
    return common.to(rows.dtype)


def rounded_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K], weight [N, K], both rounded -> [..., N] in x's dtype."""
    rows, row_scale = quantise(x.flatten(0, -2))
    columns, column_scale = quantise(weight)
    out = (rows.float() @ columns.float().T) * row_scale * column_scale.T
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def float8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K], weight [N, K] -> [..., N] in x's dtype."""
    common = common_row(x.flatten(0, -2))
    return rounded_product(x - common, weight) + F.linear(common, weight)
