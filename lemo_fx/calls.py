"""What happens when a rewritten module is called: which code runs, told of which labels and which cache.

A decoder layer runs its rewritten graph in training steps and its original code elsewhere (`LayerSettings.applies`). A
causal model checks each call and tells its layers the labels; the modules between tell them whether a cache was asked
for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from lemo_fx import parallel, runtime
from lemo_fx.capture import ABSENT_IN_TRAINING, CACHE_NAMES, NO_CACHE
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError, LemoError
from lemo_fx.loss import segmentable
from lemo_fx.offload import offloading
from lemo_fx.parts import SelectBlocks, StepScore

STATE = "_lemo_fx"
"""Instance attribute of a rewritten module that holds its `Installed` record."""

TELLER = "_lemo_fx_cache"
"""Instance attribute of a module above rewritten layers: handles of its `CacheTeller`'s hooks."""

CHECKPOINTS_ALWAYS = "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer)
"""Whether transformers checkpoints a layer, and takes its cache away, without gradients too (before 5.24)."""


@dataclass
class LayerSettings:
    """What a rewritten decoder layer asks before each forward.

    Attributes:
        floats: names of its modules' float attributes.
    """

    config: LemoConfig
    arguments: tuple[str, ...]
    attention_config: Any
    implementation: str | None
    layer_index: int
    step: runtime.Step
    floats: tuple[str, ...]

    def _holds_a_past(self, cache: Any, length: int) -> bool:
        """Whether a cache was filled before this step; earlier dense layers may have filled it in this very step."""
        return cache.get_seq_length(self.layer_index) > 0 or cache.get_seq_length() > length

    def _fills_a_cache(self, layer: nn.Module) -> bool:
        """Whether a cache that reaches the layer is more than what transformers makes in every forward."""
        if not layer.training:
            return self.step.cache_asked
        # From a checkpointed layer transformers takes it away.
        return not torch.is_grad_enabled() or (self.step.cache_asked and not layer.gradient_checkpointing)

    def _takes(self, layer: nn.Module, stream: torch.Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the rewritten graph can do what this step asks of the layer."""
        if stream.dim() != 3 or stream.shape[1] < self.config.block_size:
            return False
        for name in ABSENT_IN_TRAINING:
            value = given.get(name)
            if name == "use_cache" or value is None:
                continue
            # A cache is to be filled, which a rewritten layer cannot: nothing trains, or the call asked for it.
            filled = not hasattr(value, "get_seq_length") or self._holds_a_past(value, stream.shape[1])
            if filled or self._fills_a_cache(layer):
                return False
        return True

    def applies(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this call runs the rewritten graph; otherwise the original code runs."""
        if self.step.dense or not (layer.training or self.config.active == "always"):
            return False
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        stream = given[self.arguments[0]]
        if not self._takes(layer, stream, given):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                pass_by(layer)
            return False
        if self.implementation != getattr(self.attention_config, "_attn_implementation", None):
            raise LemoError(
                f"the attention implementation was {self.implementation!r} when lemo_fx.transform ran and is "
                f"{self.attention_config._attn_implementation!r} now: call lemo_fx.revert and lemo_fx.transform again"
            )
        return True


def asks_for_cache(given: Mapping[str, Any]) -> bool:
    """Whether a call brings a cache or wants one back; transformers makes one unasked where the config says so."""
    return bool(given.get("use_cache")) or any(given.get(name) is not None for name in CACHE_NAMES)


def without_default_cache(
    model: nn.Module, settings: HeadSettings | CacheTeller, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call that says nothing of a cache asks for none where it runs rewritten layers: they could not fill it."""
    given = {**dict(zip(settings.arguments, args, strict=False)), **kwargs}
    if given.get("use_cache") is not None or asks_for_cache(given) or "use_cache" not in settings.arguments:
        return args, kwargs
    trains = torch.is_grad_enabled() or given.get("labels") is not None or settings.step.labels is not None
    if not (settings.config.active == "always" or (model.training and trains)):
        return args, kwargs
    at = settings.arguments.index("use_cache")
    if at < len(args):
        return (*args[:at], False, *args[at + 1 :]), kwargs
    return args, {**kwargs, "use_cache": False}


@dataclass
class CacheTeller:
    """Hooks of a module between the head and the decoder layers, which people call by itself too.

    Attributes:
        arguments: names of its forward's arguments.
    """

    config: LemoConfig
    step: runtime.Step
    arguments: tuple[str, ...]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before its forward: tell the layers whether this call asked for a cache."""
        self.step.cache_asked = asks_for_cache({**dict(zip(self.arguments, args, strict=False)), **kwargs})
        return without_default_cache(module, self, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it: the layers are through; a recompute asks for nothing."""
        self.step.cache_asked = False


def add_cache_teller(module: nn.Module, config: LemoConfig, step: runtime.Step) -> None:
    """Put the hooks on a module whose forward takes `use_cache`; on others there is nothing to tell."""
    arguments = tuple(inspect.signature(module.forward).parameters)
    if "use_cache" not in arguments or STATE in vars(module):
        return
    teller = CacheTeller(config, step, arguments)
    vars(module)[TELLER] = (
        module.register_forward_pre_hook(teller.enter, with_kwargs=True),
        module.register_forward_hook(teller.leave, always_call=True),
    )


def wanted(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> bool:
    """Whether a call asks a causal model for something, or says nothing and the model's config asks for it."""
    asked = kwargs.get(name)
    return bool(getattr(model.config, name, False) if asked is None else asked)


def pass_by(layer: nn.Module) -> None:
    """Let the report say nothing of what an earlier step kept in a layer."""
    for part in layer._modules.values():
        if isinstance(part, SelectBlocks):
            part.nothing_kept()


@dataclass
class HeadSettings:
    """What a rewritten causal model asks before each forward."""

    config: LemoConfig
    step: runtime.Step
    arguments: tuple[str, ...]
    loss_function: Callable | None
    slices_itself: bool
    sparse_experts: bool
    weights_checked: bool = False

    def check(self, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Raise where the rewritten layers would be shown parts, or the router's auxiliary loss the wrong tokens."""
        alone = not torch.distributed.is_initialized() and not vars(model).get("_is_replica")
        if not alone and (model.training or self.config.active == "always") and not torch.compiler.is_compiling():
            parallel.refuse_process(model)
            if not self.weights_checked:
                # At the first step, since models are sharded after the transform; a walk through all modules.
                parallel.refuse_cut_weights(model)
                for name, module in model.named_modules():
                    if STATE in vars(module) and module is not model:
                        parallel.refuse_finer_units(name, module)
                self.weights_checked = True

        if not model.training or self.step.dense:
            return
        if wanted(model, kwargs, "output_attentions") and self.config.attention is not None:
            raise InputError(
                "output_attentions: in training, rewritten layers attend with the kept tokens besides, and what is "
                "collected is no longer one matrix a layer; ask for it in eval()"
            )
        if wanted(model, kwargs, "output_router_logits") and self.sparse_experts:
            raise InputError(
                "output_router_logits: the auxiliary loss counts every token, but the experts of rewritten layers see "
                "only the kept ones; transform with LemoConfig(mlp=None), or train without the auxiliary loss"
            )

    def segments(self, model: nn.Module, labels: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call computes the loss in segments and returns no logits."""
        return (
            model.training
            and labels is not None
            and self.loss_function is not None
            and model.loss_function is self.loss_function
            and not wanted(model, kwargs, "output_router_logits")
            and not kwargs.get("return_logits")
            and wanted(model, kwargs, "return_dict")  # In a tuple the logits have a place.
            and segmentable(model.get_output_embeddings())  # type: ignore[operator]
        )


def call_layer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `__call__` of a rewritten decoder layer that has more to do than its forward, which a compiler may cut off.

    With one choice a step, the choice is made here where it falls to this layer; under `LemoConfig(offload=True)` what
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


def make_layer_forward(original: Callable, graph_forward: Callable) -> Callable:
    """The forward of a rewritten decoder layer."""

    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None:
            return original(self, *args, **kwargs)
        if settings.applies(self, args, kwargs):
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
    return forward


def make_head_forward(original: Callable, graph_forward: Callable) -> HeadForward:
    """The forward of a causal model with rewritten layers: computes the loss in segments."""
    graph_forward = can_return_tuple(graph_forward)

    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None:
            return original(self, *args, **kwargs)
        given = {**dict(zip(settings.arguments, args, strict=False)), **kwargs}
        if not settings.segments(self, given.get("labels"), given):
            return original(self, *args, **kwargs)
        own = next((name for name in CACHE_NAMES if name in settings.arguments), None)
        for name in CACHE_NAMES:
            if own is not None and name != own and given.get(name) is not None:
                # An older name, which a decorator of the original forward would have translated.
                given[own] = given.pop(name)
        if not settings.slices_itself and isinstance(given.get("logits_to_keep", 0), int):
            given["logits_to_keep"] = slice(-given.get("logits_to_keep", 0), None)
        return graph_forward(self, **given)

    return HeadForward(forward)


def make_generate(original: Callable) -> Callable:
    """The `generate` of a causal model with rewritten layers, whose original code runs in training mode too.

    A forward cannot tell: without gradients and labels, an outer checkpoint's first pass and the reference of a
    preference loss, which must be as sparse as what follows, look like a step of `generate(use_cache=False)`.
    """

    @functools.wraps(original)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None or settings.config.active == "always":
            return original(self, *args, **kwargs)
        before, settings.step.dense = settings.step.dense, True
        try:
            return original(self, *args, **kwargs)
        finally:
            settings.step.dense = before

    return generate


class HeadForward:
    """The `forward` of a causal model's class: checks each call and tells the layers its labels, whatever then runs.

    Libraries put a forward of their own on the instance (TRL its fused head, accelerate its autocast), before or after
    `transform`; an attribute of the class that takes precedence over the instance's sees to those calls as well.
    """

    def __init__(self, forward: Callable) -> None:
        self.forward = telling_labels(forward)

    def __get__(self, model: nn.Module | None, owner: type | None = None) -> Callable:
        if model is None:
            return self.forward
        own = vars(model).get("forward")
        forward = self.forward if own is None else telling_labels(_unbound(own))
        # torch 2.11 cannot compile the making of a bound method; libraries look for one (accelerate for `__func__`).
        return functools.partial(forward, model) if torch.compiler.is_compiling() else MethodType(forward, model)

    def __set__(self, model: nn.Module, forward: Callable) -> None:
        vars(model)["forward"] = forward

    def __delete__(self, model: nn.Module) -> None:
        if vars(model).pop("forward", None) is None:
            raise AttributeError("forward")


def _unbound(forward: Callable) -> Callable:
    """A function of an instance's dict as one that takes the instance."""
    return functools.wraps(forward)(lambda self, *args, **kwargs: forward(*args, **kwargs))


def telling_labels(forward: Callable) -> Callable:
    """A causal model's forward with its call checked, and whose rewritten layers know the labels while it runs."""

    @functools.wraps(forward)
    def told(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None:
            return forward(self, *args, **kwargs)
        settings.check(self, kwargs)
        if not torch.compiler.is_compiling():
            for switch in settings.step.switches:
                switch.refresh()
        given = {**dict(zip(settings.arguments, args, strict=False)), **kwargs}
        args, kwargs = without_default_cache(self, settings, args, kwargs)
        step = settings.step
        before = step.labels, step.cache_asked
        step.cache_asked = asks_for_cache(given)
        if given.get("labels") is not None:
            step.labels = given["labels"]
        try:
            return forward(self, *args, **kwargs)
        finally:
            step.labels, step.cache_asked = before
            step.scores = None

    return told
