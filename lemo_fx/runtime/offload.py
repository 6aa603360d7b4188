"""What a checkpointed layer saves waits in pinned host memory for its backward (LeMo's sparsity-sensitive offload).

forward:   while layer l + 1 computes, what layer l saved is copied to the host; layer l + 2 drops it from the GPU
backward:  while layer l computes, what layer l - 1 saved comes back
A layer saves its kept rows, so what crosses the bus follows the kept share. GPU memory no longer grows with the number
of layers. The hooks are set outside a layer's compiled code, which is neither cut nor compiled again.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lemo_fx.errors import LemoError
from lemo_fx.kernels.private import tree_leaves

DEVICES = {"cuda"}
"""Device types with a memory of their own. On others there is nothing to gain, and nothing is done."""

LEAST_BYTES = 1 << 20
"""Smaller tensors (indices, statistics) stay where they are."""

IN_FLIGHT = 2
"""Layers whose tensors are on both sides: the one that just ran and the one that is being copied."""


class Lane:
    """One device's side stream, its free pinned buffers, and the layers whose tensors have not left it yet.

    Both directions share the stream, so a buffer is never overwritten before its last reader is through.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.stream = self.module.Stream(device)
        self.free: list[torch.Tensor] = []
        self.leaving: deque[LayerCall] = deque()

    def current(self) -> Any:
        """The stream that computes."""
        return self.module.current_stream(self.device)

    def buffer(self, size: int) -> torch.Tensor:
        """[>= size] uint8 of pinned memory: the smallest free one that holds it, else a new one in place of one."""
        fitting = [i for i, b in enumerate(self.free) if b.numel() >= size]
        if fitting:
            return self.free.pop(min(fitting, key=lambda i: self.free[i].numel()))
        if self.free:
            self.stream.synchronize()  # What is unpinned must not be read any more.
            self.free.pop(max(range(len(self.free)), key=lambda i: self.free[i].numel()))
        try:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise _too_little(size) from error
        if self.device.type == "cuda":
            pin(buffer)
        return buffer


def pin(buffer: torch.Tensor) -> None:
    """Lock a tensor's memory into the host's for as long as the tensor lives.

    torch's own pinned memory comes in powers of two: up to twice as much as a layer's rows need.
    """
    status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(status) == 0:
        weakref.finalize(buffer, torch.cuda.cudart().cudaHostUnregister, buffer.data_ptr()).atexit = False
        return
    with suppress(RuntimeError):
        # The runtime remembers its last error, and the next launch would raise it.
        torch.zeros(1, device="cuda")
    raise _too_little(buffer.numel())


def _too_little(size: int) -> LemoError:
    return LemoError(
        f"the host has no {size / 2**20:.0f} MiB of pinned memory left for a layer's saved rows: keep fewer "
        "blocks, shorten the sequences, or transform with LemoConfig(offload=False)"
    )


class Saved:
    """One saved tensor: on the device until it has left, then on the host, on the device again when it is wanted."""

    def __init__(self, tensor: torch.Tensor, call: LayerCall) -> None:
        lane = call.lane
        self.call, self.dtype, self.shape = call, tensor.dtype, tensor.shape
        # Compiled code expects the strides it was compiled for.
        self.stride = torch.empty_like(tensor, device="meta").stride()
        self.buffer = lane.buffer(tensor.numel() * tensor.element_size())
        self.here: torch.Tensor | None = tensor
        lane.stream.wait_stream(lane.current())
        with lane.module.stream(lane.stream):
            self.host().copy_(tensor, non_blocking=True)
        self.copied = lane.stream.record_event()

    def host(self) -> torch.Tensor:
        """The buffer as a tensor of the saved one's shape and strides."""
        size = self.shape.numel() * self.dtype.itemsize
        return self.buffer[:size].view(self.dtype).as_strided(self.shape, self.stride)

    def leave(self) -> torch.Tensor | None:
        """Give up the device's copy, and return it; what the computing stream runs from now on may overwrite it."""
        here, self.here = self.here, None
        if here is not None:
            self.call.lane.current().wait_event(self.copied)
        return here

    def bring(self) -> None:
        """Begin to copy the tensor to the device."""
        lane = self.call.lane
        # From the computing stream's memory, so that it can be used again without asking whether a copy has ended.
        self.here = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=lane.device)
        lane.stream.wait_stream(lane.current())
        with lane.module.stream(lane.stream):
            self.here.copy_(self.host(), non_blocking=True)
        self.copied = lane.stream.record_event()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.leave()
            self.call.lane.free.append(self.buffer)


class LayerCall:
    """One forward of one layer: what it saved, and the call before it.

    Its saved tensors hold it; it holds them weakly, so that they are freed with the graph.
    """

    def __init__(self, lane: Lane, layer: nn.Module, inputs: list[torch.Tensor]) -> None:
        self.lane = lane
        self.layer: nn.Module | None = layer
        self.inputs = inputs
        self.saved: list[weakref.ref[Saved]] = []
        self.stays: set[int] | None = None
        self.before = weakref.ref(lane.leaving[-1]) if lane.leaving else None
        lane.leaving.append(self)
        while len(lane.leaving) > IN_FLIGHT:
            lane.leaving.popleft().leave()

    def tensors(self) -> list[Saved]:
        """What was saved and is still wanted."""
        return [saved for ref in self.saved if (saved := ref()) is not None]

    def leave(self) -> None:
        """Drop the device's copies."""
        for saved in self.tensors():
            saved.leave()

    def bring(self) -> None:
        """Begin to copy to the device what is not there."""
        for saved in self.tensors():
            if saved.here is None:
                saved.bring()

    @torch.no_grad()
    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Saved:
        """Hook: what autograd is to hold in place of a tensor."""
        # A compiler traces with tensors of other types.
        plain = type(tensor) is torch.Tensor and tensor.device == self.lane.device
        if not plain or tensor.numel() * tensor.element_size() < LEAST_BYTES:
            return tensor
        if self.stays is None:
            # Asked for now, since FSDP gathers the parameters after a layer is called.
            assert self.layer is not None
            held = [*self.layer.parameters(), *self.layer.buffers(), *self.inputs]
            self.stays = {t.untyped_storage().data_ptr() for t in held}
        if tensor.untyped_storage().data_ptr() in self.stays:
            return tensor
        for saved in self.tensors():
            here = saved.here
            if here is not None and _same(here, tensor):
                return saved
        saved = Saved(tensor, self)
        self.saved.append(weakref.ref(saved))
        return saved


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(), other.shape, other.stride(), other.dtype,
    )  # fmt: skip


@torch.no_grad()
def unpack(held: torch.Tensor | Saved) -> torch.Tensor:
    """Hook: the tensor back, on the device; begins to bring what the layer before will want."""
    if isinstance(held, torch.Tensor):
        return held
    held.call.bring()
    before = held.call.before() if held.call.before is not None else None
    if before is not None:
        before.bring()
    tensor = held.leave()
    assert tensor is not None
    return tensor


_lanes: dict[torch.device, Lane] = {}


@contextmanager
def offloading(layer: nn.Module, stream: torch.Tensor, others: Iterable[Any]) -> Iterator[None]:
    """Context for one forward of a layer, in which what it saves goes to the host.

    Does nothing unless the layer is recomputed in the backward and its device has a memory of its own. Not for code
    under a compiler: a whole-model torch.compile keeps what it saves on the device.

    Args:
        stream: the layer's input.
        others: its other arguments, which all layers share (masks, position embeddings): they stay on the device.
    """
    recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    recomputed = layer.training and getattr(layer, "gradient_checkpointing", False)
    if not (recorded and recomputed and stream.device.type in DEVICES):
        yield
        return
    lane = _lanes.get(stream.device) or _lanes.setdefault(stream.device, Lane(stream.device))
    shared = [t for t in tree_leaves(list(others)) if isinstance(t, torch.Tensor) and t is not stream]
    call = LayerCall(lane, layer, shared)
    try:
        with saved_tensors_hooks(call.pack, unpack):
            yield
    finally:
        # The forward is over: nothing more is saved.
        call.layer, call.inputs, call.stays = None, [], None
