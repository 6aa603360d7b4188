"""Find attention that numbers the rows it is given: on kept tokens alone it would number others than the model does.

Llama 4's layers without RoPE scale queries by `torch.arange(length)`, in steps of thousands of tokens: no small probe can
show it in their values, so what attention asks torch for is watched instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lemo_fx.graph.probe import LENGTH, quiet

SEQUENCES = (torch.arange, torch.linspace, torch.range)


def counts_rows(layer: nn.Module, attention: str, given: Mapping[str, Any]) -> bool:
    """Whether a layer's attention makes a sequence of as many numbers as it is given rows.

    Args:
        given: the layer's arguments by name, recorded on `LENGTH` tokens; False where there are none.
    """
    if not given:
        return False
    watch = _Watch()
    module = layer.get_submodule(attention)
    hooks = [
        module.register_forward_pre_hook(lambda *_: watch.__enter__() and None),
        module.register_forward_hook(lambda *_: watch.__exit__(None, None, None), always_call=True),
    ]
    try:
        with quiet(layer), torch.no_grad(), torch.random.fork_rng(devices=[]):
            type(layer).forward(layer, **given)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        # The proof says what is wrong with a layer that does not run.
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return watch.counted


class _Watch(TorchFunctionMode):
    """Whether a sequence of `LENGTH` numbers was made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counted |= func in SEQUENCES and out.numel() == LENGTH
        return out
