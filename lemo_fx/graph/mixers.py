"""Modules that mix tokens by a recurrence: linear attention and state-space models, which stay as they are."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lemo_fx import distributed
from lemo_fx.graph.anatomy import Anatomy, is_softmax_attention, text_config
from lemo_fx.graph.sites import holds_matrix
from lemo_fx.graph.token_wise import MIXES, why_not_token_wise

SOFTMAX = ("softmax", "scaled_dot_product_attention")


class _Softmax(TorchFunctionMode):
    """Whether a softmax, or attention as one call, is computed in a with block."""

    seen = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or getattr(function, "__name__", "") in SOFTMAX
        return function(*args, **(kwargs or {}))


def recurrent_mixers(anatomy: Anatomy) -> list[nn.Module]:
    """Children of decoder layers that mix tokens without a softmax; one of each class is run on eight tokens to see it.

    None of them is for a compiler: in torch's own words each is a loop over pieces of the sequence, which would be
    written out piece by piece (512 times a layer at 32,768 tokens), and kernels of other packages end a graph anyway.
    """
    width = getattr(text_config(anatomy.config), "hidden_size", None)
    if not isinstance(width, int):
        return []
    found: list[nn.Module] = []
    known: dict[type[nn.Module], bool] = {}
    for _, layer in anatomy.layers:
        for child in layer.children():
            if not holds_matrix(child) or any(is_softmax_attention(module) for module in child.modules()):
                continue
            if type(child) not in known:
                known[type(child)] = False
                # Whatever a module raises that wants other arguments.
                with contextlib.suppress(Exception), distributed.gathered(layer), _Softmax() as softmax:
                    known[type(child)] = why_not_token_wise(child, width) == MIXES and not softmax.seen
            if known[type(child)]:
                found.append(child)
    return found
