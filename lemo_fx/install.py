"""Put rewritten graphs into a live model, and take them out again.

A module gets its new forward by swapping its `__class__` for one dynamic subclass per distinct graph that bears the
original's name (FSDP2 does the same). The object, its parameters and its state_dict keys stay what they are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lemo_fx import distributed
from lemo_fx.errors import UnsupportedModelError
from lemo_fx.graph.capture import PATCHING, graph_module
from lemo_fx.kernels.float8_linear.op import Float8Switch
from lemo_fx.kernels.private import cache_functions
from lemo_fx.planning.plans import Plan, SitePlan
from lemo_fx.runtime.cache import TELLER, add_teller
from lemo_fx.runtime.head import HeadSettings, head_methods
from lemo_fx.runtime.hooks import look_for_hooks
from lemo_fx.runtime.layer import STATE, LayerSettings, layer_methods

TRANSFORMATION = "_lemo_fx_transformation"
"""Instance attribute of a transformed model that holds its `Transformation`."""

ORIGINAL = "_lemo_fx_original"
"""Attribute of a class made here: the class it is made from."""


@dataclass
class Installed:
    """What was done to one module.

    Attributes:
        original: the class it had.
        graph: the rewritten graph; functions: the functions it calls, by name.
        parts: names of the submodules that were added.
        settings: read by the module's forward at run time.
        rows: of the report.
    """

    original: type[nn.Module]
    graph: fx.Graph
    functions: dict[str, fx.Graph]
    parts: tuple[str, ...]
    settings: LayerSettings | HeadSettings
    rows: list[SitePlan]


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module, Installed]]:
    """The rewritten modules of a model as it is now, by name: copies of layers included."""
    for name, module in model.named_modules():
        record = vars(module).get(STATE)
        if record is not None:
            yield name, module, record


class RewrittenClass(type):
    """Class of rewritten classes: what passes for the original class passes for each of them.

    Sharding policies look up the class of one layer and ask `isinstance` of the others, dense or rewritten otherwise.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        original = vars(cls).get(ORIGINAL)
        return super().__instancecheck__(instance) if original is None else isinstance(instance, original)


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a rewritten module, rewritten too."""
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    vars(twin).update(copy.deepcopy(vars(module), memo))
    record: Installed | None = vars(twin).get(STATE)
    if record is None:
        return twin
    for name in record.parts:
        part = twin._modules[name]
        if isinstance(part, Float8Switch):
            part.connect(twin)
            record.settings.step.switches.append(part)
    return twin


def shallow_copy(self: nn.Module) -> nn.Module:
    """The `__copy__` of a rewritten module."""
    twin = type(self).__new__(type(self))
    vars(twin).update(vars(self))
    return twin


def reduce_to_original(self: nn.Module, protocol: Any) -> tuple:
    """The `__reduce_ex__` of a rewritten module, which is pickled as what `uninstall` would make of it.

    Its class is made at run time and bears another's name, so that no other process could find it.
    """
    record: Installed | None = vars(self).get(STATE)
    added = record.parts if record else ()
    state = {name: value for name, value in vars(self).items() if name not in (STATE, TRANSFORMATION)}
    state["_modules"] = {name: child for name, child in self._modules.items() if name not in added}
    return object.__new__, (getattr(self, ORIGINAL),), state


def uncompiled_methods(original: type[nn.Module], forward: Callable) -> dict[str, Any]:
    """A forward that no compiled graph holds, also none of a module around it."""
    return {"forward": torch.compiler.disable(forward)}


Methods = Callable[[Any, Callable], dict[str, Any]]

_classes: dict[tuple[type, Callable, tuple[Hashable, ...], Methods], type[nn.Module]] = {}


def _swap(module: nn.Module, compiled: dict[str, Callable], codes: tuple[Hashable, ...], methods: Methods) -> None:
    with PATCHING:
        module.__class__ = rewritten_class(type(module), compiled, codes, methods)


def rewritten_class(
    original: type[nn.Module], compiled: dict[str, Callable], codes: tuple[Hashable, ...], methods: Methods
) -> type[nn.Module]:
    """The subclass of `original` that runs this code: one per distinct code.

    Args:
        compiled: "forward" and the functions it calls, by name.
        codes: their source, and what it calls by name.
        methods: (original class, graph forward) -> its methods by name.
    """
    # Another library may give a class another forward between two transforms (Liger does).
    key = (original, original.forward, codes, methods)
    if key not in _classes:
        namespace: dict[str, Any] = {name: function for name, function in compiled.items() if name != "forward"}
        # FSDP2 puts a class of its own on top, which transformers would wrap in a layer-wide checkpoint once more.
        namespace["__init_subclass__"] = classmethod(lambda cls, **_: None)
        namespace.update(__copy__=shallow_copy, __reduce_ex__=reduce_to_original)
        namespace.update(__module__=original.__module__, __qualname__=original.__qualname__, __doc__=original.__doc__)
        namespace[ORIGINAL] = original
        metaclass: Any = RewrittenClass if type(original) is type else type(original)
        subclass: type[nn.Module] = metaclass(original.__name__, (original,), namespace)
        # Set after creation: transformers wraps `forward` in a layer-wide checkpoint while a subclass is created (older
        # versions do so in `__call__`), but the rewritten graph recomputes each branch itself from its kept rows.
        for name, method in methods(original, compiled["forward"]).items():
            setattr(subclass, name, method)
        # In the place of a `__deepcopy__`, which a wrapper that passes attributes on (PEFT's) would take for its own.
        copy._deepcopy_dispatch[subclass] = deep_copy  # type: ignore[attr-defined]
        _classes[key] = subclass
    return _classes[key]


def plans_of(model: nn.Module) -> list[Plan]:
    """What to install again after `uninstall`."""
    return [
        Plan(
            name,
            module,
            record.graph,
            record.functions,
            {part: module.get_submodule(part) for part in record.parts},
            record.settings,
            record.rows,
        )
        for name, module, record in installed(model)
    ]


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that `install` keeps out of compiled graphs."""
    return [module for module in model.modules() if ORIGINAL in vars(type(module)) and STATE not in vars(module)]


def install(
    plans: list[Plan],
    owner: nn.Module | None = None,
    above: Sequence[nn.Module] = (),
    mixers: Sequence[nn.Module] = (),
) -> None:
    """Rewrite all planned modules, or none: any failure undoes what was done before it is raised.

    Args:
        owner: the model whose layers share a step.
        above: the modules that hold the decoder layers, whose calls bring labels or ask for a cache.
        mixers: the modules that no compiled graph shall hold: see `recurrent_mixers`.
    """
    cache_functions()
    for plan in plans:
        plan.settings.step.owner = None if owner is None else weakref.ref(owner)
    done: list[nn.Module] = []
    try:
        for plan in plans:
            done.append(plan.module)
            _install(plan)
        if owner is not None and plans:
            look_for_hooks(owner, plans[0].settings.step)
        # A causal model tells its layers the labels itself, which a wrapper may have changed (prompt tuning).
        head = any(isinstance(plan.settings, HeadSettings) for plan in plans)
        for module in above if plans else ():
            done.append(module)
            add_teller(module, plans[0].settings.config, plans[0].settings.step, labels=not head)
        for mixer in mixers:
            done.append(mixer)
            _swap(mixer, {"forward": type(mixer).forward}, (), uncompiled_methods)
        # Last, since what failed later could not give the weights back as they were.
        for plan in plans:
            for part in plan.parts.values():
                if isinstance(part, Float8Switch) and plan.settings.config.base == "float8":
                    part.hold()
    except BaseException:
        for module in done:
            uninstall(module)
        raise


def _install(plan: Plan) -> None:
    module = plan.module
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    # First, so that a failure anywhere below is undone by `uninstall`.
    parts = tuple(plan.parts)
    vars(module)[STATE] = Installed(type(module), plan.graph, plan.functions, parts, plan.settings, plan.rows)
    for name, part in plan.parts.items():
        module.add_module(name, part.to(device))
        part.train(module.training)
        if isinstance(part, Float8Switch):
            part.connect(module)
            plan.settings.step.switches.append(part)
    main = graph_module(module, plan.graph, plan.functions)
    built = {"forward": main, **{name: main.get_submodule(name) for name in plan.functions}}
    compiled: dict[str, Callable] = {name: type(function).forward for name, function in built.items()}
    called = (n.target for g in (plan.graph, *plan.functions.values()) for n in g.nodes if n.op == "call_function")
    codes = (*(f"{name}\n{function.code}" for name, function in built.items()), *called)
    methods = layer_methods if isinstance(plan.settings, LayerSettings) else head_methods
    _swap(module, compiled, codes, methods)


def uninstall(module: nn.Module) -> None:
    """Give a module its own class back and remove what was added.

    Raises:
        UnsupportedModelError: another library has put its own class on top since.
    """
    for handle in vars(module).pop(TELLER, ()):
        handle.remove()
    present = type(module)
    module.__class__ = vars(present).get(ORIGINAL, present)
    record: Installed | None = vars(module).get(STATE)
    if record is None:
        return
    if type(module) is not record.original:
        below = ORIGINAL in vars(present.__bases__[-1])
        restored = distributed.under_fsdp(present, record.original) if below else None
        if restored is None:
            raise UnsupportedModelError(
                f"{present.__name__} was put on top by another library after lemo_fx.transform: undo that first"
            )
        module.__class__ = restored
    for name in record.parts:
        part = module._modules.pop(name, None)
        if isinstance(part, Float8Switch):
            part.disconnect()
            record.settings.step.switches.remove(part)
    del vars(module)[STATE]
