"""Triton kernel for one segment's cross entropy: the loss, and the gradient written over the logits."""

import torch
import triton
import triton.language as tl


@triton.jit
def _capped(x, cap, CAPS: tl.constexpr):
    if CAPS:
        # tanh through exp of a non-positive number, which cannot overflow.
        z = x / cap
        e = tl.exp(-2.0 * tl.abs(z))
        t = (1.0 - e) / (1.0 + e)
        x = tl.where(z < 0, -t, t) * cap
    return x


@triton.jit
def _loss_kernel(
    LOGITS, LABELS, LOSSES, vocabulary, cap, ignore_index,
    CAPS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: an online maximum and sum, then (softmax - one hot) over the logits in place."""
    row = tl.program_id(0).to(tl.int64)
    start = LOGITS + row * vocabulary
    label = tl.load(LABELS + row)
    counted = label != ignore_index
    top = -float("inf")
    total = 0.0
    for at in range(0, vocabulary, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(start + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        x = tl.where(column < vocabulary, _capped(x, cap, CAPS), -float("inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    safe = tl.where(counted, label, 0)
    target = _capped(tl.load(start + safe).to(tl.float32), cap, CAPS)
    log_total = top + tl.log(total)
    tl.store(LOSSES + row, tl.where(counted, log_total - target, 0.0))
    if GRADIENT:
        # Every thread has read its target before the first gradient is written over it.
        tl.debug_barrier()
        for at in range(0, vocabulary, BLOCK):
            column = at + tl.arange(0, BLOCK)
            raw = tl.load(start + column, mask=column < vocabulary, other=0.0).to(tl.float32)
            x = _capped(raw, cap, CAPS)
            gradient = tl.exp(x - log_total) - tl.where(column == safe, 1.0, 0.0)
            if CAPS:
                gradient *= 1.0 - (x / cap) * (x / cap)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(start + column, gradient.to(LOGITS.dtype.element_ty), mask=column < vocabulary)


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float | None, ignore_index: int, gradient: bool
) -> torch.Tensor:
    """Sum of the losses [] float32 of contiguous logits [N, V]; with `gradient` the logits become d loss / d logits."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _loss_kernel[(logits.shape[0],)](
            logits, labels.contiguous(), losses, logits.shape[1], softcap or 1.0, ignore_index,
            CAPS=softcap is not None, GRADIENT=gradient,
            BLOCK=min(8192, triton.next_power_of_2(logits.shape[1])), num_warps=16,
        )  # fmt: skip
    return losses.sum()
