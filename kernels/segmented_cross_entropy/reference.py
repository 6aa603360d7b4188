"""Plain torch for the head and the loss computed in segments (LeMo section 4.3, segment-based peak cutting)."""

from collections.abc import Callable

import torch
from torch.nn import functional


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float | None, ignore_index: int, gradient: bool
) -> torch.Tensor:
    """Sum of the losses [] float32 of raw logits [N, V]; with `gradient` the logits become d loss / d logits."""
    capped = logits.float() if softcap is None else torch.tanh(logits.float() / softcap) * softcap
    log_probs = torch.log_softmax(capped, dim=-1)
    counted = labels != ignore_index
    safe = torch.where(counted, labels, 0)[:, None]
    loss = -torch.where(counted, log_probs.gather(1, safe)[:, 0], 0.0).sum()
    if gradient:
        d_logits = log_probs.exp_()
        d_logits.scatter_add_(1, safe, torch.full_like(d_logits[:, :1], -1.0))
        d_logits *= counted[:, None]
        if softcap is not None:
            d_logits *= 1 - (capped / softcap).square()
        logits.copy_(d_logits)
    return loss


LossAndGradient = Callable[[torch.Tensor, torch.Tensor, float | None, int, bool], torch.Tensor]


def segmented_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    rows: int,
    needs: tuple[bool, bool, bool],
    loss_and_gradient: LossAndGradient = loss_and_gradient,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross entropy and its gradients, `rows` tokens at a time: full logits never exist.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None; labels: [N] int64.
        softcap: c of tanh(logits / c) * c, or None.
        needs: whether the gradient of hidden, weight and bias is wanted.
        loss_and_gradient: what runs on each segment's logits.

    Returns:
        (sum of the losses [] float32, d hidden [N, H], d weight [V, H], d bias [V]); an unwanted gradient is empty.
    """
    loss = hidden.new_zeros((), dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight) if needs[1] else weight.new_empty(0)
    d_bias = torch.zeros_like(bias) if needs[2] and bias is not None else weight.new_empty(0)
    for start in range(0, hidden.shape[0], rows):
        part, target = hidden[start : start + rows], labels[start : start + rows]
        logits = functional.linear(part, weight, bias)
        loss += loss_and_gradient(logits, target, softcap, ignore_index, any(needs))
        if needs[0]:
            torch.matmul(logits, weight, out=d_hidden[start : start + rows])
        if needs[1]:
            d_weight.addmm_(logits.T, part)
        if needs[2] and bias is not None:
            d_bias += logits.sum(0)
    return loss, d_hidden, d_weight, d_bias
