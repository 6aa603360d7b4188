"""Run-time entry points of rewritten decoder layers: per call, the rewritten graph or the original forward."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError, LemoError
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, CACHE_NAMES, NO_CACHE, by_name
from lemo_fx.kernels.private import global_hooks, in_transform
from lemo_fx.runtime.captured import Captured, harmless
from lemo_fx.runtime.offload import offloading
from lemo_fx.runtime.parts import SequenceGroup, is_told
from lemo_fx.runtime.scores import StepScore
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.step import Step

logger = logging.getLogger(__name__)

STATE = "_lemo_fx"
"""Instance attribute of a rewritten module that holds its `Installed` record."""


TELLER = "_lemo_fx_teller"
"""Instance attribute of a module above rewritten layers: handles of its `Teller`'s hooks."""


CHECKPOINTS_ALWAYS = "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer)
"""Whether transformers checkpoints a layer, and takes its cache away, without gradients too (before 5.24)."""


def own_hooks(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Hooks that someone put on modules within a layer, with the module's name: they count on seeing every token.

    A trained vector that is added at some positions, an adapter for the last tokens only (PEFT's aLoRA), or a record of
    activations would be shown kept rows, once for their values and once for their gradient.
    """
    for hook in global_hooks():
        if not harmless(hook):
            yield "every module", hook
    if not any(any(_hooks_of(module)) for child in _children(layer) for module in child.modules()):
        return
    for name, module in layer.named_modules():
        if name and not name.startswith("lemo_"):
            for hook in itertools.chain.from_iterable(hooks.values() for hooks in _hooks_of(module)):
                if not harmless(hook):
                    yield name, getattr(hook, "func", hook)


def _children(layer: nn.Module) -> list[nn.Module]:
    """The layer's own modules, without those that lemo_fx added."""
    return [child for name, child in layer.named_children() if not name.startswith("lemo_")]


def _hooks_of(module: nn.Module) -> tuple[dict[int, Callable], ...]:
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


@dataclass
class LayerSettings:
    """What a rewritten decoder layer asks before each forward.

    Attributes:
        floats: names of its modules' float attributes.
        presence: arguments whose absence changes what the layer computes -> whether the graph is for calls with them.
        group: the ranks that share a sequence, or None.
        captured: the layer as it was captured.
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
                "the causal model with what lemo_fx.shard_sequence returns"
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
            self.captured.check(layer, self.step.name_of(layer))
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


@functools.cache
def warn_once(words: str) -> None:
    """Say once that a rewritten layer trains as it was."""
    logger.warning(words)


def without_default_cache(
    model: nn.Module, settings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Default `use_cache` to False where layers run sparse: transformers would make a cache, which they cannot fill.

    Said to the call and not in the model's config, which is saved with the model and holds in `eval()` too.

    Without a cache and a mask transformers takes restarting positions for documents. Where the model would have made a
    cache, a mask of ones says that they are none.
    """
    given = by_name(settings.arguments, args, kwargs)
    said = any(given.get(name) is not None for name in ("use_cache", *CACHE_NAMES))
    if said or "use_cache" not in settings.arguments or not (settings.config.active == "always" or model.training):
        return args, kwargs
    changed: dict[str, Any] = {"use_cache": False}
    inputs = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    numbered = given.get("position_ids") is not None and given.get("attention_mask") is None
    if numbered and isinstance(inputs, torch.Tensor) and _makes_a_cache(model):
        changed["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    in_place = dict(zip(settings.arguments, args, strict=False))
    more = {name: value for name, value in changed.items() if name not in in_place}
    return tuple({**in_place, **changed}[name] for name in in_place), {**kwargs, **more}


def _makes_a_cache(model: nn.Module) -> bool:
    """Whether a call that says nothing of a cache makes one in the original model, which checkpointing forbids."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    checkpoints = model.training and (CHECKPOINTS_ALWAYS or torch.is_grad_enabled())
    forbids = checkpoints and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return bool(getattr(text, "use_cache", False)) and not forbids


@dataclass
class Teller:
    """Hooks of a module above the decoder layers that is no causal model, and which people call by itself too.

    Attributes:
        arguments: names of its forward's arguments.
        before: labels that the layers knew before the running calls.
    """

    config: LemoConfig
    step: Step
    arguments: tuple[str, ...]
    before: list[torch.Tensor | None] = field(default_factory=list)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before its forward: a step begins; tell the layers its labels."""
        given = by_name(self.arguments, args, kwargs)
        if not torch.compiler.is_compiling():
            look_for_hooks(module, self.step)
        self.step.scores = None
        self.before.append(self.step.labels)
        if given.get("labels") is not None:
            self.step.labels = given["labels"]
        return without_default_cache(module, self, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it: the layers are through."""
        self.step.labels = self.before.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teller:
        return Teller(self.config, copy.deepcopy(self.step, memo), self.arguments)

    def __reduce__(self) -> tuple:
        # Pickled layers are not rewritten: nobody is to be told.
        return Teller, (LemoConfig(), Step(), ())


def add_teller(module: nn.Module, config: LemoConfig, step: Step, labels: bool) -> None:
    """Put the hooks on a module whose forward takes a cache (or `labels`); on others there is nothing to tell."""
    arguments = tuple(inspect.signature(module.forward).parameters)
    told = "use_cache" in arguments or (labels and "labels" in arguments)
    if not told or STATE in vars(module):
        return
    teller = Teller(config, step, arguments)
    vars(module)[TELLER] = (
        module.register_forward_pre_hook(teller.enter, with_kwargs=True),
        module.register_forward_hook(teller.leave, always_call=True),
    )


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
    """The methods of a rewritten decoder layer, by name.

    Args:
        kind: its original class.
    """
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
