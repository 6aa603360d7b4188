"""A second view of a layer's attention, through which functions of our own see its queries, keys and values."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def twin_of(attention: nn.Module, implementation: str, **attributes: Any) -> nn.Module:
    """A module that shares an attention's submodules and dispatches to another function of transformers' registry.

    Nothing of the model is modified.

    Args:
        implementation: name in `ALL_ATTENTION_FUNCTIONS`.
        attributes: of the twin alone.
    """
    twin = copy.copy(attention)
    config: Any = copy.copy(attention.config)
    config._attn_implementation_internal = implementation
    vars(twin).update(config=config, **attributes)
    return twin


def function_of(attention: nn.Module) -> Callable:
    """The attention function that a layer's attention dispatches to by its config, eager's being that of its file."""
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    config: Any = attention.config
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
