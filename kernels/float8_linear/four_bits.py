"""Frozen weights in bitsandbytes' 4 bits (`Linear4bit`): what such a layer holds, and the weight unpacked.

Products in float8 unpack and round it for as long as they take; its 4 bits are all that is kept in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

CLASSES = ("Linear4bit", "LinearNF4", "LinearFP4")
"""bitsandbytes' classes of linear layers, known by name."""


class Packed(NamedTuple):
    """A weight [N, K] as bitsandbytes packs it, and what it is to be unpacked to.

    Attributes:
        values: two of them in a byte; absmax: the largest magnitude of each block of `block` values.
        nested_absmax, nested_code, offset: where `absmax` is quantised itself, what it is read by, in blocks of
            `nested_block`; else None.
        kind: "nf4" or "fp4"; rows, columns: N, K.
        dtype: that the layer computes in.
    """

    values: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    offset: torch.Tensor | None
    kind: str
    block: int
    nested_block: int
    rows: int
    columns: int
    dtype: torch.dtype


TENSORS = 5
"""How many of `Packed` are tensors: the first."""


def is_four_bits(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' own in 4 bits; a class made of those may compute in another way."""
    return type(layer).__name__ in CLASSES and type(layer).__module__.startswith("bitsandbytes.")


def read(layer: nn.Linear, dtype: torch.dtype) -> Packed | None:
    """A layer's weight in 4 bits; None where it has none, or not all of it (not quantised yet, sharded, repacked).

    Args:
        dtype: to unpack to where the layer does not say what it computes in.
    """
    if not is_four_bits(layer):
        return None
    made: Any = layer
    # bitsandbytes looks in the layer too, where a sharding library has made the parameter anew.
    state = getattr(made.weight, "quant_state", None)
    state = getattr(made, "quant_state", None) if state is None else state
    sides = (layer.out_features, layer.in_features)
    if state is None or getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != sides:
        return None
    if 2 * made.weight.numel() * made.weight.itemsize != sides[0] * sides[1]:
        return None
    dtype, nested = made.compute_dtype or dtype, state.state2 if state.nested else None
    absmax, code, size = (None, None, 0) if nested is None else (nested.absmax, nested.code, nested.blocksize)
    scales = (state.absmax, absmax, code, state.offset)
    return Packed(made.weight, *scales, state.quant_type, state.blocksize, size, *sides, dtype)


@torch.library.custom_op("lemo_fx::unpack_4bit", mutates_args=())
def unpack(
    values: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    kind: str,
    block: int,
    nested_block: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    turn: int = 0,
) -> torch.Tensor:
    """The weight [N, K] of a `Packed`, by bitsandbytes.

    One operation, so that a compiler has no scales of double quantisation to keep between forward and backward.

    Args:
        turn: nothing but another name: equal operations a compiler would do once, and keep the result.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(absmax, shape=torch.Size((rows, columns)), blocksize=block, quant_type=kind, dtype=dtype)
    if nested_absmax is not None:
        state.state2 = QuantState(nested_absmax, code=nested_code, blocksize=nested_block, dtype=torch.float32)
        state.offset, state.nested = offset, True
    return dequantize_4bit(values.view(-1, 1), state)


@unpack.register_fake
def _(*arguments: Any, turn: int = 0) -> torch.Tensor:
    packed = Packed(*arguments[: len(Packed._fields)])
    return packed.absmax.new_empty(packed.rows, packed.columns, dtype=packed.dtype)
