"""The logits of a call whose loss was computed in segments: a tensor that computes itself once something uses it."""

from __future__ import annotations

from collections.abc import Callable
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lemo_fx.errors import InputError
from lemo_fx.kernels.private import as_it_is, tree_map, without_data
from lemo_fx.runtime.loss import rows_of

INSTEAD = "call the model with return_logits=True where its logits are needed"

_Tensor = torch.Tensor

MAKES_TENSORS = {"data", "T", "mT", "H", "mH", "real", "imag"}

LOOKS = frozenset(
    {
        attribute.__get__
        for name, attribute in vars(_Tensor.__base__).items()
        if isinstance(attribute, GetSetDescriptorType) and name not in MAKES_TENSORS
    }
    | {_Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.is_floating_point, _Tensor.register_hook, torch.is_tensor}
)
"""What can be asked of logits that are not computed: methods, and every attribute but those that are tensors."""

PUT_OFF = {_Tensor.float: torch.float32, _Tensor.clone: None, _Tensor.detach: None}
"""What wrappers do to every output of a model, whether someone uses it or not (accelerate, DDP, the Trainer's
evaluation), and the dtype of the result: put off until then, too."""


class LateLogits(torch.Tensor):
    """[B, T, V], computed when first used; it takes no memory before.

    Args:
        compute: makes the tensor, with the gradient mode of the use.
        like: the result's shape, dtype and device, and whether it has a gradient.
    """

    compute: Callable[[], torch.Tensor]
    done: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, compute: Callable[[], torch.Tensor], shape: Any, dtype: torch.dtype, device: Any, requires_grad: bool
    ) -> LateLogits:
        """A tensor without data."""
        late = without_data(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)
        late.compute, late.done = compute, None
        if requires_grad:
            late.register_hook(_no_gradient)
        return late

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Compute, unless it is only looked at."""
        kwargs = kwargs or {}
        if func in LOOKS:
            with as_it_is():
                return func(*args, **kwargs)
        if func in PUT_OFF and len(args) == 1 and not kwargs and isinstance(args[0], LateLogits):
            (late,) = args
            with as_it_is():
                gradient = late.requires_grad and func is not _Tensor.detach
                place = late.shape, PUT_OFF[func] or late.dtype, late.device, gradient
            return LateLogits(lambda: func(late.computed()), *place)
        args, kwargs = tree_map(lambda x: x.computed() if isinstance(x, LateLogits) else x, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached only past `__torch_function__`, from compiled code."""
        raise InputError(f"logits that are not computed yet reached {func}: {INSTEAD}")

    def computed(self) -> torch.Tensor:
        """The logits as a plain tensor."""
        done = self.done
        if done is None:
            done = self.compute()
            with as_it_is():
                # Without a gradient they are no use to a loss that comes later.
                self.done = done if torch.is_grad_enabled() or not self.requires_grad else None
        return done


def _no_gradient(gradient: torch.Tensor | None) -> None:
    if gradient is None:  # They passed through a function that torch does not see into and were not used (DDP).
        return
    raise InputError(
        "a gradient reached the logits of a call that computed its loss in segments, by a function that torch does not "
        f"see into (torch.autograd.Function): {INSTEAD}"
    )


class _NoLogits:
    """Stands for logits in the output of compiled code, which cannot return such a tensor."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise InputError(_NONE)

    def __getitem__(self, item: Any) -> Any:
        raise InputError(_NONE)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        raise InputError(_NONE)


_NONE = f"a compiled model computes its loss in segments and has no logits: {INSTEAD}"
NO_LOGITS = _NoLogits()


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    """How often each was written to; what inference mode made is not counted, and nothing there trains."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def late_logits(logits_of: Callable, head: nn.Module, hidden: torch.Tensor, upcast: bool) -> Any:
    """`logits_of(hidden)`, put off until it is used.

    Args:
        logits_of: [..., H] -> [..., V], the model's own head and what follows it.
        head: the output projection; hidden: [B, T, H], what it is given.
        upcast: whether float32 comes out of it.
    """
    if torch.compiler.is_compiling():
        return NO_LOGITS
    kind = hidden.device.type
    enabled, half = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    used = [hidden, *(p for p in head.parameters() if not isinstance(p, DTensor))]
    versions = _versions(used)

    def compute() -> torch.Tensor:
        if versions != _versions(used):
            raise InputError(
                "the model's weights have changed since the call whose logits are used now; use them before the "
                f"optimizer's step, or {INSTEAD}"
            )
        with torch.autocast(kind, half, enabled):
            return logits_of(hidden)

    dtype = torch.float32 if upcast else half if enabled else hidden.dtype
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used)
    return LateLogits(compute, (*hidden.shape[:-1], rows_of(head)), dtype, hidden.device, gradient)
