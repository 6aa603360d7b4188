"""Refuse adapters that read a weight which is to be held in float8, or is: before a transform, and in steps after."""

from __future__ import annotations

import torch
from torch import nn

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.graph.probe import in_a_line, quiet
from lemo_fx.kernels.float8_linear.op import Float8Switch, HeldLinear, SwitchedLinear, dtype_of, held_layers

ROWS = 16


def refuse_readers(name: str, layer: nn.Module, known: set[tuple]) -> None:
    """Raise UnsupportedModelError where an adapter reads the weight that `base="float8"` would leave it packed.

    Args:
        known: kinds of adapters that are tried already; those of this layer are added.
    """
    for part, module in layer.named_modules():
        base = module._modules.get("base_layer")
        # Weights that come quantised are not held.
        if type(base) not in (nn.Linear, SwitchedLinear, HeldLinear) or type(base.weight) is not nn.Parameter:
            continue
        kind = (part, *map(type, module.modules()))
        if kind in known:
            continue
        known.add(kind)
        # In the weight's place zeros, since packing it again could not give it back.
        twin, switch = nn.utils.skip_init(nn.Linear, base.in_features, base.out_features, False), Float8Switch()
        weight = torch.zeros(base.out_features, base.in_features, dtype=dtype_of(base), device=base.weight.device)
        twin.weight = nn.Parameter(weight, requires_grad=False)
        switch.connect(twin)
        switch.hold()
        if not held_layers(twin):
            continue
        module._modules["base_layer"] = twin
        try:
            with quiet(module), torch.no_grad():
                module(weight.new_zeros(1, ROWS, base.in_features))
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"{name}.{part}: its adapter reads the weight below it, as those of DoRA, LoHa and others do, which "
                f"base='float8' holds packed ({in_a_line(error)}): use base='model'"
            ) from error
        finally:
            module._modules["base_layer"] = base
