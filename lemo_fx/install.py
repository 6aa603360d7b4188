"""Put rewritten graphs into a live model, and take them out again.

A module gets its new forward by swapping its `__class__` for one dynamic subclass per distinct graph that bears the
original's name (FSDP2 does the same). The object, its parameters and its state_dict keys stay what they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import fx, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from lemo_fx import parallel, runtime
from lemo_fx.capture import ABSENT_IN_TRAINING, CACHE_NAMES, NO_CACHE, PATCHING, build_module
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError, LemoError, UnsupportedModelError
from lemo_fx.kernels.float8_linear.op import Float8Switch
from lemo_fx.kernels.select_blocks.op import forget
from lemo_fx.loss import segmentable
from lemo_fx.offload import offloading
from lemo_fx.parts import SelectBlocks, StepScore
from lemo_fx.passes.rewrite import LayerRewrite

STATE = "_lemo_fx"
"""Instance attribute of a rewritten module that holds its `Installed` record."""

TELLER = "_lemo_fx_cache"
"""Instance attribute of a module above rewritten layers: handles of its `CacheTeller`'s hooks."""

CHECKPOINTS_ALWAYS = "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer)
"""Whether transformers checkpoints a layer, and takes its cache away, without gradients too (before 5.24)."""


@dataclass
class Installed:
    """What was done to one module.

    Attributes:
        original: the class it had.
        graph: the rewritten graph; functions: the functions it calls, by name.
        parts: names of the submodules that were added.
        settings: read by the module's forward at run time.
    """

    original: type[nn.Module]
    graph: fx.Graph
    functions: dict[str, fx.Graph]
    parts: tuple[str, ...]
    settings: LayerSettings | HeadSettings


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

    def applies(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this call runs the rewritten graph; otherwise the original code runs."""
        if self.step.dense or not (layer.training or self.config.active == "always"):
            return False
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        stream = given[self.arguments[0]]
        if stream.dim() != 3 or stream.shape[1] < self.config.block_size:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                pass_by(layer)
            return False
        for name in ABSENT_IN_TRAINING:
            value = given.get(name)
            if name == "use_cache" or value is None:
                continue
            # A cache is to be filled, which a rewritten layer cannot: nothing trains, or the call asked for it.
            filled = not hasattr(value, "get_seq_length") or self._holds_a_past(value, stream.shape[1])
            if filled or self._fills_a_cache(layer):
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


class RewrittenClass(type):
    """Class of rewritten classes: what passes for the original class passes for each of them.

    Sharding policies look up the class of one layer and ask `isinstance` of the others, dense or rewritten otherwise.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        original = vars(cls).get("_lemo_fx_original")
        return super().__instancecheck__(instance) if original is None else isinstance(instance, original)


_classes: dict[tuple[type, Callable, tuple[str, ...], Callable], type[nn.Module]] = {}


def graph_module(module: nn.Module, graph: fx.Graph, functions: dict[str, fx.Graph]) -> fx.GraphModule:
    """A GraphModule for reading and calling; it shares the live module's submodules."""
    outlined = {name: build_module(targets_of(module, body), body, name) for name, body in functions.items()}
    return build_module({**targets_of(module, graph, besides=functions), **outlined}, graph, type(module).__name__)


def targets_of(module: nn.Module, graph: fx.Graph, besides: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What a graph calls or reads on the module, by name, besides the functions that are its own."""
    names = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return {name: functools.reduce(getattr, name.split("."), module) for name in names - set(besides)}


def rewritten_class(
    original: type[nn.Module],
    compiled: dict[str, Callable],
    codes: tuple[str, ...],
    make_forward: Callable[[Callable, Callable], Any],
    call: Callable,
) -> type[nn.Module]:
    """The subclass of `original` that runs this code: one per distinct code.

    Args:
        compiled: "forward" and the functions it calls, by name.
        make_forward: (original forward, graph forward) -> the forward to install.
        call: its `__call__`.
    """
    # Another library may give a class another forward between two transforms (Liger does).
    key = (original, original.forward, codes, call)
    if key not in _classes:
        namespace: dict[str, Any] = {name: function for name, function in compiled.items() if name != "forward"}
        # FSDP2 puts a class of its own on top, which transformers would wrap in a layer-wide checkpoint once more.
        namespace["__init_subclass__"] = classmethod(lambda cls, **_: None)
        namespace.update(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__)
        namespace["_lemo_fx_original"] = original
        metaclass: Any = RewrittenClass if type(original) is type else type(original)
        subclass: type[nn.Module] = metaclass(original.__name__, (original,), namespace)
        # Set after creation: transformers wraps `forward` in a layer-wide checkpoint while a subclass is created (older
        # versions do so in `__call__`), but the rewritten graph recomputes each branch itself from its kept rows.
        subclass.forward = make_forward(original.forward, compiled["forward"])  # type: ignore[method-assign]
        if make_forward is make_head_forward and hasattr(original, "generate"):
            subclass.generate = make_generate(original.generate)  # type: ignore[method-assign, attr-defined]
        subclass.__call__ = call  # type: ignore[method-assign]
        _classes[key] = subclass
    return _classes[key]


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
    record: Installed | None = vars(module).get(STATE)
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


@dataclass
class Plan:
    """Everything needed to rewrite one module, made without touching it."""

    name: str
    module: nn.Module
    graph: fx.Graph
    functions: dict[str, fx.Graph]
    parts: dict[str, nn.Module]
    settings: LayerSettings | HeadSettings
    rows: list[dict[str, Any]] = field(default_factory=list)


def layer_plan(
    name: str, rewrite: LayerRewrite, config: LemoConfig, step: runtime.Step, rows: list[dict[str, Any]]
) -> Plan:
    """The plan of one decoder layer from its finished rewrite."""
    mixers = [str(s.site.mixer.target) for s in rewrite.sites if s.site.kind == "attention"]
    attention: Any = rewrite.layer.get_submodule(mixers[0]) if mixers else None
    attention_config = getattr(attention, "config", None)
    arguments = tuple(
        str(n.target) for n in rewrite.graph.nodes if n.op == "placeholder" and not str(n.target).startswith("*")
    )
    implementation = getattr(attention_config, "_attn_implementation", None)
    layer_index = getattr(attention, "layer_idx", None) or 0
    floats = {name for module in rewrite.layer.modules() for name, x in vars(module).items() if floats_of(x)}
    settings = LayerSettings(
        config, arguments, attention_config, implementation, layer_index, step, tuple(sorted({"scaling", *floats}))
    )
    return Plan(name, rewrite.layer, rewrite.graph, rewrite.functions, rewrite.modules, settings, rows)


def install(plans: list[Plan], above: Sequence[nn.Module] = ()) -> None:
    """Rewrite all planned modules, or none: any failure undoes what was done before it is raised.

    Args:
        above: the modules that hold the decoder layers, whose calls may ask for a cache.
    """
    done: list[nn.Module] = []
    try:
        for plan in plans:
            done.append(plan.module)
            _install(plan)
        for module in above if plans else ():
            done.append(module)
            add_cache_teller(module, plans[0].settings.config, plans[0].settings.step)
    except BaseException:
        for module in done:
            uninstall(module)
        raise


def _install(plan: Plan) -> None:
    module = plan.module
    original = type(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    # First, so that a failure anywhere below is undone by `uninstall`.
    vars(module)[STATE] = Installed(original, plan.graph, plan.functions, tuple(plan.parts), plan.settings)
    for name, part in plan.parts.items():
        module.add_module(name, part.to(device))
        part.train(module.training)
        if isinstance(part, Float8Switch):
            part.connect(module)
            plan.settings.step.switches.append(part)
    main = graph_module(module, plan.graph, plan.functions)
    built = {"forward": main, **{name: main.get_submodule(name) for name in plan.functions}}
    compiled: dict[str, Callable] = {name: type(function).forward for name, function in built.items()}
    codes = tuple(f"{name}\n{function.code}" for name, function in built.items())
    layer = isinstance(plan.settings, LayerSettings)
    make: Callable = make_layer_forward if layer else make_head_forward
    more = plan.settings.config.offload or any(isinstance(part, StepScore) for part in plan.parts.values())
    call: Callable = call_layer if layer and more else nn.Module.__call__
    with PATCHING:
        module.__class__ = rewritten_class(original, compiled, codes, make, call)


def uninstall(module: nn.Module) -> None:
    """Give a module its own class back and remove what was added.

    Raises:
        UnsupportedModelError: another library has put its own class on top since.
    """
    for handle in vars(module).pop(TELLER, ()):
        handle.remove()
    record: Installed | None = vars(module).get(STATE)
    if record is None:
        return
    present = type(module)
    if present in (record.original, *_classes.values()):
        module.__class__ = record.original
    else:
        below = present.__bases__[-1] if present.__bases__[-1] in _classes.values() else None
        restored = parallel.under_fsdp(present, record.original) if below else None
        if restored is None:
            raise UnsupportedModelError(
                f"{present.__name__} was put on top by another library after lemo_fx.transform: undo that first"
            )
        module.__class__ = restored
    for name in record.parts:
        part = module._modules.pop(name, None)
        if isinstance(part, SelectBlocks):
            forget(part.site)
        elif isinstance(part, Float8Switch):
            part.disconnect()
            record.settings.step.switches.remove(part)
    del vars(module)[STATE]
