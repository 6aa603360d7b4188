"""Plain torch for `eliminate`: the rows of the residual stream that stay, and its transpose."""

import torch


def eliminate(stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, H] and [B, K] -> [B, K, H]: the kept rows of each sample, in the order of `tokens`."""
    if stream.shape[0] == 1:
        return stream[0].index_select(0, tokens[0]).unsqueeze(0)
    return stream[torch.arange(stream.shape[0], device=stream.device)[:, None], tokens]


def scatter_rows(rows: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """[B, K, H] and [B, K] -> [B, length, H]: rows at their place, zeros elsewhere; tokens are unique per sample."""
    out = rows.new_zeros(rows.shape[0], length, rows.shape[2])
    return out.scatter_(1, tokens[:, :, None].expand_as(rows), rows)
