"""Plain torch for the head and the loss computed in segments (LeMo section 4.3, segment-based peak cutting)."""

import torch
from torch.nn import functional


def logits_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """[N, H] -> [N, V]: the head, with Gemma's tanh soft cap where the model has one."""
    logits = functional.linear(hidden, weight, bias)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def segmented_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    rows: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross entropy and its gradients, `rows` tokens at a time: full logits never exist.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None; labels: [N] int64.
        needs: whether the gradient of hidden, weight and bias is wanted.

    Returns:
        (sum of the losses [] float32, d hidden [N, H], d weight [V, H], d bias [V]); an unwanted gradient is empty.
    """
    loss = hidden.new_zeros((), dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight) if needs[1] else weight.new_empty(0)
    d_bias = torch.zeros_like(bias) if needs[2] and bias is not None else weight.new_empty(0)
    for start in range(0, hidden.shape[0], rows):
        part, target = hidden[start : start + rows], labels[start : start + rows]
        logits = logits_of(part, weight, bias, softcap)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        counted = target != ignore_index
        safe = torch.where(counted, target, 0)
        loss -= torch.where(counted, log_probs.gather(1, safe[:, None])[:, 0], 0.0).sum()
        if not any(needs):
            continue
        d_logits = log_probs.exp_()
        d_logits.scatter_add_(1, safe[:, None], torch.full_like(d_logits[:, :1], -1.0))
        d_logits *= counted[:, None]
        if softcap is not None:
            d_logits *= 1 - (logits.float() / softcap).square()
        d_logits = d_logits.to(hidden.dtype)
        if needs[0]:
            torch.matmul(d_logits, weight, out=d_hidden[start : start + rows])
        if needs[1]:
            d_weight.addmm_(d_logits.T, part)
        if needs[2] and bias is not None:
            d_bias += d_logits.sum(0)
    return loss, d_hidden, d_weight, d_bias
