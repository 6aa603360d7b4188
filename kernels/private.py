"""Every name of torch's that torch does not promise to keep, and what each is for here.

One place, so that a new torch is looked through in one place; tests/kernels/test_private.py says of each what breaks
without it. In this folder because it is the lowest: all others may import from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.fx._symbolic_trace import _patch_function as with_kwargs
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._triton import has_triton

__all__ = [
    "ATTENTION_OPS",
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "GROUPED_PRODUCT",
    "SCALED_PRODUCT",
    "CheckpointWrapper",
    "as_it_is",
    "assert_on_device",
    "cache_functions",
    "global_hooks",
    "guard_or_false",
    "has_triton",
    "in_backward",
    "in_transform",
    "is_op",
    "may_vary",
    "promise",
    "scaled_product",
    "storage_key",
    "tree_leaves",
    "tree_map",
    "uncompile",
    "with_kwargs",
    "without_data",
    "writable",
]

_aten = torch.ops.aten

ATTENTION_OPS = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""What `scaled_dot_product_attention` dispatches to; recompute policies keep the results of these."""

CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
GROUPED_PRODUCT = _aten._grouped_mm.default
SCALED_PRODUCT = _aten._scaled_mm.default

# `torch.nn.functional.scaled_mm` dispatches to an op that recompute policies and the FLOP counter do not know.
scaled_product = torch._scaled_mm

promise = torch._check
"""Tells a compiler what is true of a size."""

assert_on_device = torch._assert_async
"""Raises later, where the device is, instead of waiting for it."""


def in_backward() -> bool:
    """Whether autograd runs a backward now, as while a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def global_hooks() -> tuple[Callable, ...]:
    """Hooks of every module of the process, by `torch.nn.modules.module.register_module_forward_hook` and its like."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return tuple(hook for kind in kinds for hook in getattr(torch.nn.modules.module, f"_global_{kind}").values())


def in_transform() -> bool:
    """Whether a function transform of torch's runs now: `torch.func.grad`, `vmap`, `jvp`, or forward-mode gradients."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._functorch.peek_interpreter_stack() is not None


def is_op(target: Any) -> bool:
    """Whether a node's target is an overload of an op that was registered with torch."""
    return isinstance(target, torch._ops.OpOverload)


def may_vary(tensor: torch.Tensor, dimension: int) -> None:
    """Let a compiler leave a size open, unless it finds that it must not."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def storage_key(tensor: torch.Tensor) -> int:
    """Tells storages apart, those without memory (meta tensors) too."""
    return tensor.untyped_storage()._cdata


def cache_functions() -> None:
    """Let torch's caches on disk keep compiled graphs with an autograd.Function in them, which they leave out unless
    told so: another process would compile all layers again."""
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # Recomputed attention on a GPU is wrapped in this; torch caches it from 2.13 on.
    cacheable = torch._inductor.config.unsafe_marked_cacheable_functions
    cacheable.setdefault("torch.ops.higher_order.graphsafe_run_with_rng_state", "torch 2.13")


def uncompile(module: torch.nn.Module) -> None:
    """Undo `module.compile()`, for which torch has no method."""
    module._compiled_call_impl = None


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a tensor that may be written to, where autograd refuses that of a Function's view."""
    return _aten._unsafe_view.default(tensor, tensor.shape)


as_it_is = torch._C.DisableTorchFunctionSubclass
"""With block in which a tensor of a class of one's own is handled as a plain one."""


def without_data(kind: type[torch.Tensor], shape: Any, **like: Any) -> Any:
    """A tensor of a class of one's own that has a shape, a dtype and a device, and takes no memory."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, **like)
