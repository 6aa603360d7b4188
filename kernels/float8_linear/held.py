"""A frozen weight held in float8: one tensor of bytes, and products with it.

The bytes are those of the rounded weight [N, K], then of its float32 scales, one an output channel: what
`reference.quantise` makes of the weight in every step, made once. One copy serves both directions: the gradient's
product takes its scales on its other operand.

Bytes in one column, so that a cast of the model leaves them alone, and whoever takes them for a matrix finds the shape
to be wrong instead of wrong numbers (adapters that read the weight, merging, `load_state_dict` into a plain layer).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from lemo_fx.kernels.float8_linear import reference
from lemo_fx.kernels.float8_linear.matmul import scaled_matmul
from lemo_fx.kernels.lowering import obstacle

SCALE_BYTES = 4


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K], both of them multiples of 16 -> uint8 [N * (K + 4), 1]."""
    rounded, scale = reference.quantise(weight.detach())
    return torch.cat([rounded.view(torch.uint8).flatten(), scale.view(torch.uint8).flatten()]).unsqueeze(1)


def unpack(packed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 [N, K] and float32 scales [N, 1] of what `pack` made of a weight of width K, without a copy."""
    count = packed.numel() // (width + SCALE_BYTES)
    rounded, scale = packed.flatten().split([count * width, count * SCALE_BYTES])
    return rounded.view(torch.float8_e4m3fn).view(count, width), scale.view(torch.float32).view(count, 1)


# Custom ops, so that a compiler sees one operation that reads the parameter: what lies between (the bytes seen as
# float8, a transposed copy) it would keep from the forward to the backward.


@torch.library.custom_op("lemo_fx::held_product", mutates_args=())
def held_product(rows: torch.Tensor, row_scale: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
    """Rows in float8 [M, K], with float32 scales [M, 1], @ weight [N, K].T -> [M, N], bfloat16; float32 on the CPU.

    Args:
        packed: the weight, from `pack`; width: its K.
    """
    columns, column_scale = unpack(packed, width)
    return scaled_matmul(rows, row_scale, columns, column_scale)


@torch.library.custom_op("lemo_fx::held_gradient", mutates_args=())
def held_gradient(rows: torch.Tensor, row_scale: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
    """As `held_product` with the other side of the weight, without its scales: [M, N] @ float8 [N, K] -> [M, K]."""
    columns, _ = unpack(packed, width)
    if not obstacle("held_gradient", packed.device):
        from lemo_fx.kernels.float8_linear import triton

        columns = triton.transposed(columns.view(torch.uint8)).view(columns.dtype)
    else:
        columns = columns.t()
    return scaled_matmul(rows, row_scale, columns, row_scale.new_ones(width, 1))


def _like(rows: torch.Tensor, width: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], width, dtype=torch.bfloat16 if rows.device.type == "cuda" else torch.float32)


@held_product.register_fake
def _(rows: torch.Tensor, row_scale: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
    return _like(rows, packed.shape[0] // (width + SCALE_BYTES))


@held_gradient.register_fake
def _(rows: torch.Tensor, row_scale: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
    return _like(rows, width)


@register_flop_formula([torch.ops.lemo_fx.held_product, torch.ops.lemo_fx.held_gradient])
def _flops(rows: torch.Size, row_scale: torch.Size, packed: torch.Size, width: int, **named) -> int:
    return 2 * rows[0] * packed[0] // (width + SCALE_BYTES) * width


@torch.library.custom_op("lemo_fx::held_scales", mutates_args=())
def held_scales(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The scales [N] of what `pack` made."""
    return unpack(packed, width)[1].flatten().clone()


@held_scales.register_fake
def _(packed: torch.Tensor, width: int) -> torch.Tensor:
    return packed.new_empty(packed.shape[0] // (width + SCALE_BYTES), dtype=torch.float32)


@torch.library.custom_op("lemo_fx::dequantise", mutates_args=())
def dequantise(packed: torch.Tensor, width: int, dtype: torch.dtype, backward: bool = False) -> torch.Tensor:
    """The weight [N, K] as its rounding left it; packed again, it gives the same bytes.

    Args:
        backward: nothing but another name: equal operations a compiler would do once, and keep the result.
    """
    rounded, scale = unpack(packed, width)
    return (rounded.float() * scale).to(dtype)


@dequantise.register_fake
def _(packed: torch.Tensor, width: int, dtype: torch.dtype, backward: bool = False) -> torch.Tensor:
    return packed.new_empty(packed.shape[0] // (width + SCALE_BYTES), width, dtype=dtype)


class Float8Product(torch.autograd.Function):
    """x @ weight.T in float8, and its gradient too; the packed weight is all that is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        ctx.save_for_backward(packed)
        ctx.width = width
        out = held_product(*reference.quantise(x.flatten(0, -2)), packed, width)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient [..., N] times the weight's scales, rounded, @ float8 [N, K] -> [..., K]."""
        (packed,) = ctx.saved_tensors
        scaled = grad.flatten(0, -2).float() * held_scales(packed, ctx.width)
        out = held_gradient(*reference.quantise(scaled), packed, ctx.width)
        return out.to(grad.dtype).unflatten(0, grad.shape[:-1]), None, None


class DequantisedProduct(torch.autograd.Function):
    """x @ weight.T with the weight de-quantised for as long as it takes, in the backward once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[..., K] -> [..., N]; autocast decides as for a plain layer."""
        ctx.save_for_backward(packed)
        ctx.width, ctx.dtype, ctx.x_dtype = width, dtype, x.dtype
        return F.linear(x, dequantise(packed, width, dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient [..., N] @ weight [N, K] -> [..., K]."""
        (packed,) = ctx.saved_tensors
        weight = dequantise(packed, ctx.width, ctx.dtype, backward=True).to(grad.dtype)
        return (grad @ weight).to(ctx.x_dtype), None, None, None
