"""Run-time entry points of rewritten decoder layers: per call, the rewritten graph or the original forward."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError, LemoError
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, NO_CACHE, by_name
from lemo_fx.kernels.private import in_transform
from lemo_fx.runtime.captured import Captured
from lemo_fx.runtime.offload import offloading
from lemo_fx.runtime.parts import SequenceGroup, is_told
from lemo_fx.runtime.scores import StepScore
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.step import Step

logger = logging.getLogger(__name__)

STATE = "_lemo_fx"
"""Instance attribute of a rewritten module that holds its `Installed` record."""

CHECKPOINTS_ALWAYS = "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer)
"""Whether transformers checkpoints a layer, and takes its cache away, without gradients too (before 5.24)."""


@dataclass
class LayerSettings:
    """What a rewritten decoder layer asks before each forward.

    Attributes:
        floats: names of its modules' float attributes.
        presence: arguments whose absence changes what the layer computes -> whether the graph is for calls with them.
        hooked: whether `look_for_hooks` found someone's hooks within it.
    """

    config: LemoConfig
    arguments: tuple[str, ...]
    attention_config: Any
    implementation: str | None
    step: Step
    floats: tuple[str, ...]
    presence: Mapping[str, bool]
    group: SequenceGroup | None = None
    captured: Captured | None = None
    hooked: bool = False

    def _takes(self, layer: nn.Module, stream: torch.Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the rewritten graph can do what this step asks of the layer."""
        if stream.dim() != 3 or stream.shape[1] < self.config.block_size:
            return False
        if any((given.get(name) is not None) != present for name, present in self.presence.items()):
            return False
        other = None if self.captured is None else self.captured.other_kind(given)
        if other:
            warn_once(f"calls with another {other!r} than the model gives its layers by itself run the original layers")
            return False
        # From a checkpointed layer transformers takes the cache away, so that only what it already holds counts.
        taken = layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()
        for name in ABSENT_IN_TRAINING:
            value = given.get(name)
            if name == "use_cache" or value is None:
                continue
            # A cache that is here was asked for, and a rewritten layer cannot fill it.
            if not (taken and hasattr(value, "get_seq_length") and value.get_seq_length() == 0):
                return False
        return True

    def check_part(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], applies: bool) -> None:
        """Raise where ranks share a sequence and a layer would take a part of it for the whole."""
        if applies != is_told(by_name(self.arguments, args, kwargs).get("attention_mask")):
            raise InputError(
                "ranks share a sequence, but a rewritten layer was called without being told of the whole of it: call "
                "the causal model, which tells it"
                if applies
                else "a part of a sequence reached a layer that runs its original code, which would attend within that "
                "part alone: train with model.train(), parts of at least one block, no hooks within layers and no "
                "cache, and evaluate whole sequences"
            )

    def applies(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this call runs the rewritten graph; otherwise the original code runs."""
        if self.step.dense:
            return False
        records = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not (layer.training or self.config.active == "always"):
            if records and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
                warn_once("a model in eval mode runs its original layers: if this is training, call model.train()")
            return False
        given = by_name(self.arguments, args, kwargs)
        stream = given[self.arguments[0]]
        if not self._takes(layer, stream, given) or self.hooked:
            if records:
                pass_by(layer)
                if stream.dim() == 3 and stream.shape[1] < self.config.block_size:
                    warn_once(
                        f"sequences under one block of {self.config.block_size} tokens run the original layers: "
                        "nothing is eliminated; pack them, or choose a smaller block_size"
                    )
            return False
        refuse_function_transforms(type(layer).__name__)
        if self.captured is not None and not torch.compiler.is_compiling():
            self.captured.check(layer, self.step.name_of)
        if self.implementation != getattr(self.attention_config, "_attn_implementation", None):
            raise LemoError(
                f"the attention implementation was {self.implementation!r} when lemo_fx.transform ran and is "
                f"{self.attention_config._attn_implementation!r} now: call lemo_fx.revert and lemo_fx.transform again"
            )
        return True


def refuse_function_transforms(name: str) -> None:
    """Raise where torch.func or forward-mode gradients would go through a rewritten module, named so."""
    if not torch.compiler.is_compiling() and in_transform():
        raise InputError(
            f"{name}: torch.func (grad, vmap, jvp) and forward-mode gradients do not know the operations of rewritten "
            "modules: call lemo_fx.set_dense(model) before, which runs the original layers, and "
            "lemo_fx.set_dense(model, False) after"
        )


@functools.cache
def warn_once(words: str) -> None:
    """Log a warning, once in a process."""
    logger.warning(words)


def pass_by(layer: nn.Module) -> None:
    """Clear a layer's kept-token counts, so that the report does not show those of an earlier step."""
    for part in layer._modules.values():
        if isinstance(part, SelectBlocks):
            part.nothing_kept()


def call_layer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `__call__` of a rewritten decoder layer: what it has to do beside its forward, which a compiler may cut off.

    The scores of a step (`StepScore`) are drawn here by its first sparse layer; under `LemoConfig(offload=True)` what
    the layer saves for the backward goes to the host.
    """
    settings: LayerSettings = vars(self)[STATE].settings
    stream = args[0] if args else kwargs[settings.arguments[0]]
    choices = [part for part in self._modules.values() if isinstance(part, StepScore)]
    sparse = (self.training or settings.config.active == "always") and not settings.step.dense
    if choices and sparse and stream.dim() == 3:
        choices[0].draw(stream)
        settings.step.drawn = True
    others = [*args, *kwargs.values()]
    try:
        with offloading(self, stream, others) if settings.config.offload else nullcontext():
            return nn.Module.__call__(self, *args, **kwargs)
    finally:
        settings.step.drawn = False


def settings_of(module: nn.Module) -> Any:
    """A rewritten module's settings; None after `revert`, which a wrapper of its forward (accelerate's) may outlive."""
    record = vars(module).get(STATE)
    return None if record is None else record.settings


def floats_of(value: Any) -> list[float]:
    """An attribute's floats: itself, or a dict's values (PEFT's scaling by adapter)."""
    return [x for x in (value.values() if isinstance(value, dict) else (value,)) if isinstance(x, float)]


def read_floats(layer: nn.Module, names: Sequence[str]) -> None:
    """Use every float attribute of a layer's modules, in compiled code before all else.

    Dynamo makes an input of a float that another compilation saw with another value (models of other `lora_alpha` in
    one process), where it is used first; used first inside a checkpointed branch, it could not be used outside.
    """
    for module in layer.modules():
        for name in names:
            for value in floats_of(getattr(module, name, None)):
                value * 1.0


def layer_methods(kind: Any, graph_forward: Callable) -> dict[str, Callable]:
    """The methods of a rewritten decoder layer of a class, by name."""
    original = kind.forward

    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None:
            return original(self, *args, **kwargs)
        applies = settings.applies(self, args, kwargs)
        if settings.group is not None:
            settings.check_part(args, kwargs, applies)
        if applies:
            if torch.compiler.is_compiling():
                read_floats(self, settings.floats)
            return graph_forward(self, *args, **kwargs)
        if self.gradient_checkpointing and self.training and (CHECKPOINTS_ALWAYS or torch.is_grad_enabled()):
            # transformers checkpoints a layer in its own class's `forward` or `__call__`, which are ours now, and takes
            # the cache away from it.
            kwargs.update({name: value for name, value in NO_CACHE.items() if name in kwargs})
            return self._gradient_checkpointing_func(functools.partial(original, self, **kwargs), *args)
        return original(self, *args, **kwargs)

    # A code object of its own: a compiler counts compilations, and gives up after eight, by code object.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
    return {"forward": forward, "__call__": call_layer}
