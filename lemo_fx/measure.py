"""What a training step costs: bytes kept for the backward, floating-point operations and peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lemo_fx.kernels.private import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, storage_key


class _Saved:
    """A tensor that autograd keeps; autograd drops this object when it no longer needs the tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(run: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Most bytes that autograd keeps for the backward at one time while `run` runs.

    Counted: every tensor that passes `torch.autograd.graph.saved_tensors_hooks`, that is all that autograd nodes save,
    custom ones included. Views of one storage count once, with the size of the whole storage, since that is what
    stays allocated.

    Activation checkpointing (non-reentrant): the tensors among a checkpoint's positional arguments are counted, what it
    discards is not, and neither is what it recomputes during the backward. Tensors inside tuples or keyword arguments
    of a checkpoint, or captured by its closure, are not seen. Reentrant checkpoints are seen with the tensors among
    their arguments too.

    Not counted: parameters and buffers of `model`, gradients, optimizer states, and temporaries of a kernel. A count of
    the activations, hence, and not the peak of the device's memory. The result is the same on every run.

    Args:
        run: a forward, or a forward with its backward. Of a forward alone, return the loss: what it holds on to counts.
        model: its parameters and buffers are left out.
    """
    held = [] if model is None else [*model.parameters(), *model.buffers()]
    ignored = {storage_key(tensor) for tensor in held}
    holders: Counter[int] = Counter()
    now = most = 0

    def release(storage: int, size: int) -> None:
        nonlocal now
        holders[storage] -= 1
        if not holders[storage]:
            now -= size

    def pack(tensor: torch.Tensor) -> _Saved | torch.Tensor:
        nonlocal now, most
        if tensor.layout != torch.strided:
            return tensor
        storage = storage_key(tensor)
        if storage in ignored:
            return tensor
        saved, size = _Saved(tensor), tensor.untyped_storage().nbytes()
        if not holders[storage]:
            now += size
        holders[storage] += 1
        most = max(most, now)
        weakref.finalize(saved, release, storage, size).atexit = False
        return saved

    def unpack(saved: _Saved | torch.Tensor) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return most


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **named: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest, **named):
    batch, heads, length, width = query
    # The scores anew, then the gradients of query, key, value and of the weights.
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


ON_THE_CPU = {CPU_ATTENTION: _attention_flops, CPU_ATTENTION_BACKWARD: _attention_backward_flops}
"""FLOPs of attention on the CPU, which torch's counter does not know; our ops register theirs with it."""


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products while `run` runs, a multiply-add counting as two.

    As `torch.utils.flop_counter` counts: attention in full, without a discount for causal order; the measuring of block
    scores from Q and K is counted in the same way. Elementwise work is not counted. The same on every run.
    """
    with FlopCounterMode(display=False, custom_mapping=ON_THE_CPU) as counter:
        run()
    return counter.get_total_flops()


def counts(run: Callable[[], Any], model: nn.Module | None = None) -> tuple[int, int]:
    """`saved_bytes` and `flops` of one and the same run."""
    kept = 0

    def counted() -> None:
        nonlocal kept
        kept = saved_bytes(run, model)

    operations = flops(counted)
    return kept, operations


def peak_memory(device: torch.device) -> int:
    """Most bytes that tensors took on an accelerator since `reset_peak`; on the CPU, that the process had resident."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.accelerator.max_memory_allocated(device)


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return
    # Linux forgets a process's peak on demand; elsewhere it stays that of the whole run.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
