"""`float8_linear` on the GPU's float8 products, and the mode that puts it in the place of frozen linear layers.

Plain torch rather than a custom op: a compiler fuses the rounding of x into what comes before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lemo_fx.kernels.float8_linear import reference


def float8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N] in x's dtype; no gradient."""
    if not x.is_cuda:
        return reference.float8_linear(x, weight, bias)
    rows, row_scale = reference.quantise(x.flatten(0, -2))
    columns, column_scale = reference.quantise(weight)
    out = torch._scaled_mm(
        rows, columns.t(), row_scale, column_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    out = out.to(x.dtype).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


@torch.compiler.assume_constant_result
def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 (NVIDIA: compute capability 8.9 and up); the CPU rounds as if it did."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a linear layer is one of those: frozen, in half precision on a GPU, sides that float8 products take."""
    half = not x.is_cuda or torch.bfloat16 in (x.dtype, weight.dtype)
    return half and not weight.requires_grad and all(side % 16 == 0 for side in weight.shape) and has_float8(x.device)


class Float8Forward(TorchFunctionMode):
    """Within it, frozen linear layers compute in float8; adapters and everything else as always."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand linear layers over, and pass everything else through."""
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and fits(args[0], args[1]):
            return float8_linear(*args)
        return func(*args, **kwargs)
