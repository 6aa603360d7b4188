"""A second view of a layer's attention, through which functions of our own see its queries, keys and values."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


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
