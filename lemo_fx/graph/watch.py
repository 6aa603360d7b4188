"""Watch an attention at work for what no comparison of values on a small probe can show.

Llama 4's layers without RoPE scale queries by `torch.arange(length)`, in steps of thousands of tokens: on kept tokens
alone they would number others than the model does. Gemma 4's later layers take keys and values from earlier ones, which
would be those of kept tokens alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lemo_fx.graph.capture import argument_names
from lemo_fx.graph.probe import LENGTH, quiet

SEQUENCES = (torch.arange, torch.linspace, torch.range)


def why_every_row(layer: nn.Module, attention: str, given: Mapping[str, Any]) -> str | None:
    """Why a layer's attention must see every token, as far as watching it shows; None where nothing is seen.

    Args:
        given: the layer's arguments by name, recorded on `LENGTH` tokens; nothing is tried where there are none.
    """
    if not given:
        return None
    numbers = _Numbers()
    touched: set[str] = set()
    watched = {name: _watched(value, name, touched) for name, value in given.items()}
    touched.clear()
    module = layer.get_submodule(attention)
    hooks = [
        module.register_forward_pre_hook(lambda *_: numbers.__enter__() and None),
        module.register_forward_hook(lambda *_: numbers.__exit__(None, None, None), always_call=True),
    ]
    try:
        with quiet(layer), torch.no_grad(), torch.random.fork_rng(devices=[]):
            type(layer).forward(layer, **watched)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        # The proof says what is wrong with a layer that does not run.
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if numbers.made:
        return "numbers the rows that it is given (torch.arange), and would take kept tokens for consecutive ones"
    if touched:
        return f"shares its keys and values with other layers through {', '.join(sorted(touched))}"
    return None


def why_no_stream(layer: nn.Module, given: Mapping[str, Any]) -> str | None:
    """What a layer is handed in the place of one residual stream; None where it is one, or nothing is known.

    Args:
        given: the layer's arguments by name, recorded on a few tokens.
    """
    name = argument_names(layer)[0]
    stream = given.get(name)
    if not isinstance(stream, torch.Tensor) or stream.dim() == 3:
        return None
    return (
        f"its {name!r} have {stream.dim()} axes: several residual streams side by side (hyper-connections, alternating "
        "updates), not one of [B, S, H]"
    )


class _Numbers(TorchFunctionMode):
    """Whether a sequence of `LENGTH` numbers was made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.made = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made |= func in SEQUENCES and out.numel() == LENGTH
        return out


def _watched(value: Any, name: str, touched: set[str]) -> Any:
    """A copy of a mapping that notes its name when an entry is read or written; everything else as it is."""
    if not isinstance(value, MutableMapping):
        return value
    kind = type(value)

    def noting(method: Any) -> Any:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            touched.add(name)
            return method(self, *args, **kwargs)

        return run

    names = ("__getitem__", "__setitem__", "get", "update", "setdefault", "pop")
    watched: Any = type(kind.__name__, (kind,), {method: noting(getattr(kind, method)) for method in names})
    if isinstance(value, dict):
        return watched(value)
    copied = copy.copy(value)
    copied.__class__ = watched
    return copied
