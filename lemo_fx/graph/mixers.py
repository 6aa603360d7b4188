"""Modules that mix tokens by a recurrence: linear attention and state-space models, which stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lemo_fx import distributed
from lemo_fx.graph.anatomy import Anatomy, is_softmax_attention, text_config
from lemo_fx.graph.probe import quiet
from lemo_fx.graph.sites import holds_matrix
from lemo_fx.kernels.private import tree_leaves, tree_map

SOFTMAX = ("softmax", "scaled_dot_product_attention")
LEAST = 0.05
"""Of the change of a row, the change of the others that is no rounding (bfloat16, integers)."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is handed: in place, and by name."""


class _Softmax(TorchFunctionMode):
    """Whether a softmax, or attention as one call, is computed in a with block."""

    seen = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or getattr(function, "__name__", "") in SOFTMAX
        return function(*args, **(kwargs or {}))


def recurrent_mixers(anatomy: Anatomy, usual: Callable[[nn.Module], Mapping[str, Any]]) -> list[nn.Module]:
    """Children of decoder layers that mix tokens without a softmax; one of each class is run on a few tokens to see it.

    None of them is for a compiler: in torch's own words each is a loop over pieces of the sequence, which would be
    written out piece by piece (512 times a layer at 32,768 tokens), and kernels of other packages end a graph anyway.

    Args:
        usual: the arguments by name of a layer's call; nothing where they are not known. The children are then handed
            hidden states alone.
    """
    found: list[nn.Module] = []
    known: dict[type[nn.Module], bool] = {}
    for _, layer in anatomy.layers:
        children = [
            child
            for child in layer.children()
            if holds_matrix(child) and not any(is_softmax_attention(module) for module in child.modules())
        ]
        new = {type(child): child for child in children if type(child) not in known}
        known.update(dict.fromkeys(new, False))
        if new:
            # Whatever a layer or a module raises that wants other arguments.
            with contextlib.suppress(Exception), distributed.gathered(layer), quiet(layer), torch.no_grad():
                for child, call in _calls(layer, list(new.values()), usual(layer), anatomy):
                    with contextlib.suppress(Exception):
                        known[type(child)] = _mixes_without_softmax(child, call)
        found += [child for child in children if known[type(child)] and child not in found]
    return found


def _calls(
    layer: nn.Module, children: list[nn.Module], given: Mapping[str, Any], anatomy: Anatomy
) -> list[tuple[nn.Module, Call]]:
    """What each child is handed first in a call of the layer with these arguments by name."""
    if not given:
        weight = next(p for p in layer.parameters() if p.is_floating_point() and p.itemsize > 1)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(1, 8, text_config(anatomy.config).hidden_size, generator=generator, device="cpu")
        return [(child, ((rows.to(weight),), {})) for child in children]
    calls: dict[nn.Module, Call] = {}

    def keep(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(child, (args, kwargs))

    with contextlib.ExitStack() as hooks:
        for child in children:
            hooks.enter_context(child.register_forward_pre_hook(keep, with_kwargs=True))
        type(layer).forward(layer, **given)
    return list(calls.items())


def _mixes_without_softmax(module: nn.Module, call: Call) -> bool:
    """Whether another first row in what a module is handed changes other rows of what it returns."""
    args, kwargs = call
    rows = _first((args, *kwargs.values()))

    def other(value: Any) -> Any:
        if value is not rows:
            return value
        changed = rows.clone()
        first = changed.view(-1, changed.shape[-1])[0]
        first.copy_(first.flip(-1))
        return changed

    with _Softmax() as softmax:
        one = _first(module(*args, **kwargs))
        two = _first(module(*tree_map(other, args), **tree_map(other, kwargs)))
    if softmax.seen or one.shape[:-1] != rows.shape[:-1]:
        return False
    change = (one - two).abs().reshape(-1, one.shape[-1])
    return bool(change[1:].max() > LEAST * change[0].max())


def _first(values: Any) -> torch.Tensor:
    """The first tensor of hidden states."""
    return next(v for v in tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1)
