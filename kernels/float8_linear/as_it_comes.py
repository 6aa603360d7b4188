"""Frozen weights that come quantised, used as they are: torchao's tensors and transformers' `FP8Linear`.

Nothing of them is cast, packed or kept: the bytes and scales that the layer has are read in every product. In float8,
scales of whole rows go into the product; where a row has several (blocks of 128 x 128) no product of whole rows takes
them, and the row is rounded to one of them for as long as the product takes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lemo_fx.kernels.float8_linear import reference
from lemo_fx.kernels.float8_linear.matmul import scaled_matmul

Came = tuple[torch.Tensor, torch.Tensor, tuple[int, int]]
"""float8 [N, K]; its scales, one a block; the block's sides."""


FINEGRAINED = "FP8Linear"
"""Transformers' class of linear layers with weights in float8, known by name."""


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's tensors, with which products are computed and nothing else."""
    return type(weight) is not nn.Parameter and type(weight).__module__.startswith("torchao.")


def is_quantised(module: nn.Module) -> bool:
    """Whether the module itself holds a weight in integers (bitsandbytes, GPTQ), in float8, or as torchao's tensor."""
    return any(
        t.dim() > 0 and (not t.is_floating_point() or t.itemsize == 1 or is_packed(t))
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    )


def unpacks(weight: torch.Tensor) -> bool:
    """Whether a packed weight can be de-quantised."""
    return is_packed(weight) and type(weight).dequantize is not torch.Tensor.dequantize


def read(layer: nn.Linear) -> Came | None:
    """A layer's float8 weight as it came; None where it did not."""
    # Of other classes the weight may be made anew when it is asked for. A switched layer bears its class's name.
    if type(layer).__name__ not in ("Linear", FINEGRAINED):
        return None
    weight: Any = layer.weight
    scale: Any = None
    sides = tuple(weight.shape)
    if is_packed(weight):
        scale = getattr(weight, "scale", None)
        weight = getattr(weight, "qdata", None)
        if scale is not None and scale.dim() == 2:
            sides = (sides[0] // scale.shape[0], sides[1] // scale.shape[1])
    elif type(layer).__name__ == FINEGRAINED:
        scale = getattr(layer, "weight_scale_inv", None)
        sides = tuple(getattr(layer, "block_size", None) or sides)
    if weight is None or scale is None or weight.dtype is not torch.float8_e4m3fn or weight.dim() != 2:
        return None
    return weight, scale.reshape(1, 1) if scale.dim() < 2 else scale, sides


def _along(scale: torch.Tensor, axis: int, side: int, size: int) -> torch.Tensor:
    """Scales, one for each row or column of the weight."""
    return scale if scale.shape[axis] == size else scale.repeat_interleave(side, axis).narrow(axis, 0, size)


def by_rows(
    rounded: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], turn: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight with one scale a row: float8 [N, K] and float32 scales [N, 1].

    Where a row has several scales, its values are rounded to the largest of them, under which none is too large.

    Args:
        turn: the same numbers from other operations (factors of two are exact), as `again` in `reference.quantise`.
    """
    scale, factor = scale.float(), 2.0**turn
    if scale.shape[1] > 1:
        largest = scale.amax(1, keepdim=True).clamp_min(1e-30)
        share = _along(_along(scale / (largest * factor), 0, block[0], len(rounded)), 1, block[1], rounded.shape[1])
        rounded, scale = (rounded.float() * factor * share).to(rounded.dtype), largest
    return rounded, _along(scale, 0, block[0], len(rounded))


def float8_product(x: torch.Tensor, came: Came) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N] in x's dtype, in float8, and its gradient too."""
    return Float8Product.apply(x, *came) if torch.is_grad_enabled() else _forward(x, *by_rows(*came))


def _forward(x: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    out = scaled_matmul(*reference.quantise(x.flatten(0, -2)), columns, scale)
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Product(torch.autograd.Function):
    """`float8_product` with its gradient; what came is all that is saved."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
    ) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        ctx.save_for_backward(rounded, scale)
        ctx.block = block
        return _forward(x, *by_rows(rounded, scale, block, turn=1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient [..., N] times the weight's scales, rounded, @ float8 [N, K] -> [..., K]."""
        rounded, scale = ctx.saved_tensors
        columns, scale = by_rows(rounded, scale, ctx.block, turn=2)
        rows = reference.quantise(grad.flatten(0, -2).float() * scale.T)
        out = scaled_matmul(*rows, columns.t(), scale.new_ones(columns.shape[1], 1))
        return out.to(grad.dtype).unflatten(0, grad.shape[:-1]), None, None, None


class PackedProduct(torch.autograd.Function):
    """x @ weight.T as torchao computes it; the backward de-quantises the weight anew, where torchao's keeps it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        ctx.save_for_backward(weight)
        ctx.x_dtype = x.dtype
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient [..., N] @ weight [N, K] -> [..., K]."""
        (weight,) = ctx.saved_tensors
        return (grad @ weight.dequantize().to(grad.dtype)).to(ctx.x_dtype), None
