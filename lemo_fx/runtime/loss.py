"""The head and the causal language-model loss in segments: what `passes/segment_loss.py` puts into a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from typing_extensions import TypeIs

from lemo_fx import distributed
from lemo_fx.errors import InputError
from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.kernels.segmented_cross_entropy.op import segmented_cross_entropy

MOST_ROWS = 512
MOST_LOGITS = 2**26


def segment_rows(tokens: int, vocabulary: int, segments: int | str) -> int:
    """Tokens per segment. "auto": at most 512 and at most 2^26 logits, and at least two segments."""
    if segments == "auto":
        return max(1, min(MOST_ROWS, MOST_LOGITS // vocabulary, (tokens + 1) // 2))
    return max(1, -(-tokens // int(segments)))


def rows_of(head: nn.Module) -> int:
    """V of an output projection, under an adapter too."""
    return getattr(head, "out_features", None) or head.get_parameter("weight").shape[0]


def saves_memory(tokens: int, vocabulary: int, segments: int | str | None) -> bool:
    """Whether an evaluation in segments holds less than one with full logits, whose last bit may differ."""
    return segments != "auto" or tokens * vocabulary > MOST_LOGITS


def segmented_loss(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | str | None = None,
    segments: int | str = "auto",
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss without full logits (LeMo section 4.3).

    Args:
        logits_of: [N, H] -> [N, V], the model's own head and what follows it.
        head: the output projection; where it is a plain linear, the gradient is computed along with the loss.
        hidden: [B, T, H] or [N, H], after `logits_to_keep`.
        labels: [B, T], shifted here unless `shift_labels` [B, T] is given.
        softcap: tanh soft cap after the head; "other" for any other operation there.
        segments: number of segments, or "auto".
        num_items_in_batch: divisor instead of the number of counted labels.

    Raises:
        InputError: hidden states and labels differ in number, or these are no labels.
    """
    given = labels if shift_labels is None else shift_labels
    if not isinstance(given, torch.Tensor) or given.is_floating_point() or given.dtype == torch.bool:
        kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise InputError(f"labels must be a tensor [B, S] of token ids, -100 where none is, not {kind}")
    if shift_labels is None:
        labels = functional.pad(labels, (0, 1), value=ignore_index)
        shift_labels = labels[..., 1:]
    rows = hidden.reshape(-1, hidden.shape[-1])
    shifted = shift_labels.reshape(-1).to(rows.device)
    if shifted.shape[0] != rows.shape[0]:
        raise InputError(
            f"{rows.shape[0]} hidden states meet {shifted.shape[0]} labels: with logits_to_keep, pass shift_labels "
            "for the positions that are kept"
        )

    few = _few_labels(head, shifted, given, ignore_index)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        rows, targets = _labelled(rows, shifted, ignore_index) if few else (rows, shifted)
        if not isinstance(softcap, str) and _is_plain_linear(head):
            total = _fused(head, rows, targets, softcap, segments, ignore_index)
        else:
            total = _recomputed(logits_of, rows, targets, segments, ignore_index)
        count = (shifted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=total.device)
        # Without labels the loss is NaN, as the original's, and its gradient zero: an infinite one would reach weights.
        return torch.where(count > 0, total / count.clamp(min=1), torch.nan)

    return distributed.call_once(head, loss, rows) if isinstance(head, FSDPModule) else loss(rows)


FEW = 0.5
"""Share of rows with labels up to which the head runs for these alone. Finding them waits for the device once."""

_counted: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()
"""Share of the rows of a head's last call that had labels, [1] in pinned memory; no part of the model."""

DECIDED = "_lemo_fx_few_labels"


def _few_labels(head: nn.Module, targets: torch.Tensor, given: torch.Tensor, ignore_index: int) -> bool:
    """True if the head is to run only for rows with labels; kept with the labels, so that a recompute decides alike.

    Args:
        targets: [N], on the head's device.
        given: the labels of the call, which an outer checkpoint hands to its recompute: that must do the same.

    The count of an accelerator's labels is on its way for as long as the step before runs, so the decision is by those
    of the call before, without waiting.
    """
    if torch.compiler.is_compiling() or targets.device.type == "meta" or not targets.numel():
        return False
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if DECIDED not in vars(given):
        counted = (targets != ignore_index).float().mean(0, keepdim=True)
        before = _counted.get(head)
        if not targets.is_cuda:
            before = counted
        elif before is None:
            _counted[head] = torch.zeros(1, pin_memory=True, device="cpu")
        # A list of one number, since asking a tensor for its only number counts as waiting for a device.
        vars(given)[DECIDED] = before is None or before.tolist()[0] <= FEW
        if targets.is_cuda:
            _counted[head].copy_(counted, non_blocking=True)
    return vars(given)[DECIDED]


def _labelled(rows: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [n, H] that have a label, and these labels [n]."""
    places = (targets != ignore_index).nonzero()[:, 0]
    if not places.numel():
        # One row without a label, since kernels are not launched for none.
        places = places.new_zeros(1)
    return eliminate(rows[None], places[None])[0], targets[places]


def segmentable(head: nn.Module) -> bool:
    """Whether the loss may be computed in segments: not if each of them would gather a sharded head's weights anew.

    A plain linear gathers them once for all segments. Ranks with batches of different length must call a sharded
    module equally often.
    """
    if not (hasattr(head, "out_features") or hasattr(head, "weight")):
        return (
            False  # A head of several modules, put in the place of a projection: how many logits it makes is not known.
        )
    return _is_linear(head) or not any(
        isinstance(module, FSDPModule | FullyShardedDataParallel) for module in head.modules()
    )


def _is_linear(module: nn.Module) -> TypeIs[nn.Linear]:
    """A linear layer and no subclass of it but FSDP2's."""
    kind = type(module)
    return (kind.__bases__[-1] if issubclass(kind, FSDPModule) else kind) is nn.Linear


def _is_plain_linear(head: nn.Module) -> TypeIs[nn.Linear]:
    """Whether calling the head is F.linear and nothing else: no adapter, quantisation, sharding or hook."""
    if not _is_linear(head) or type(head.weight.data) is not torch.Tensor:
        return False
    # Inside FSDP2's hooks the gathered weight is the whole of it.
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head)
    return isinstance(head, FSDPModule) or not hooks


def _fused(
    head: nn.Linear,
    rows: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    segments: int | str,
    ignore_index: int,
) -> torch.Tensor:
    weight: torch.Tensor = head.weight
    bias: torch.Tensor | None = head.bias
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    train = torch.is_grad_enabled()
    total, *_ = segmented_cross_entropy(
        rows,
        weight,
        bias,
        targets,
        softcap,
        ignore_index,
        segment_rows(rows.shape[0], weight.shape[0], segments),
        train and rows.requires_grad,
        train and weight.requires_grad,
        train and bias is not None and bias.requires_grad,
    )
    return total


def _recomputed(
    logits_of: Callable, rows: torch.Tensor, targets: torch.Tensor, segments: int | str, ignore_index: int
) -> torch.Tensor:
    """Any head: each segment's logits are dropped after its loss and computed again in the backward."""

    def part(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden).float()
        return functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")

    size = segment_rows(rows.shape[0], MOST_LOGITS // MOST_ROWS, segments)
    losses = [
        checkpoint(part, hidden, target, use_reentrant=False)
        for hidden, target in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(losses).sum()
