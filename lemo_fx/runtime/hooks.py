"""Hooks that someone put on modules within a rewritten layer: with them, the layer runs its original code."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lemo_fx.kernels.private import global_hooks
from lemo_fx.runtime.captured import harmless
from lemo_fx.runtime.layer import LayerSettings, settings_of
from lemo_fx.runtime.step import Step

logger = logging.getLogger(__name__)


def own_hooks(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Hooks that someone put on modules within a layer, with the module's name: they count on seeing every token.

    A trained vector that is added at some positions, an adapter for the last tokens only (PEFT's aLoRA), or a record of
    activations would be shown kept rows, once for their values and once for their gradient.
    """
    for hook in global_hooks():
        if not harmless(hook):
            yield "every module", hook
    for name, module in layer.named_modules():
        if name and not name.startswith("lemo_"):
            own = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
            for hook in itertools.chain.from_iterable(hooks.values() for hooks in own):
                if not harmless(hook):
                    yield name, getattr(hook, "func", hook)


def look_for_hooks(model: nn.Module, step: Step) -> None:
    """Let layers with hooks of someone's run their original code.

    Called where a step begins, since hooks may come after a transform. It looks again once torch has made a handle of
    another hook, or while there are some that may be removed.
    """
    if step.handles == RemovableHandle.next_id and not step.hooked:
        return
    step.handles = RemovableHandle.next_id
    before, step.hooked = step.hooked, False
    for layer in model.modules():
        settings = settings_of(layer)
        if isinstance(settings, LayerSettings):
            found = next(own_hooks(layer), None)
            settings.hooked = found is not None
            if found is not None and not before and not step.hooked:
                logger.warning("%s: %s", type(layer).__name__, hooks_note(*found))
            step.hooked |= settings.hooked


def hooks_note(name: str, hook: Any) -> str:
    """For the report, of a hook within a layer."""
    named = getattr(hook, "__qualname__", type(hook).__name__)
    return (
        f"{name} has a hook ({named}), which in a rewritten layer would see the kept tokens only, so the layer runs "
        "its original code: hook the whole decoder layer instead, or remove the hook"
    )
