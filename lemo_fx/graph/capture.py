"""Capture the forward of one module as a torch.fx graph in which its submodules are leaf calls.

transformers v5 dropped its own FX support. A decoder layer needs little of it: called on proxies, its unwrapped forward
yields about ten nodes, and because nothing inside a leaf is copied or inlined, adapters, quantised linears, hooks and
attention back-ends go on working as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from transformers.utils import ModelOutput

from lemo_fx.errors import CaptureError
from lemo_fx.kernels.private import with_kwargs

SPLAT = "_splat_"
"""Keyword under which a node holds a `**mapping` argument; printed and executed as `**mapping`."""

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What versions of transformers call a layer's cache; "cache" is the newest."""

NO_CACHE: Mapping[str, Any] = {**dict.fromkeys(CACHE_NAMES), "use_cache": False}
"""A layer's cache under all its names, and the values that say that there is none."""

ABSENT_IN_TRAINING: Mapping[str, Any] = {**NO_CACHE, "encoder_hidden_states": None, "encoder_attention_mask": None}
"""Layer arguments that a training step does not use. The captured graph holds these values in their place, and a call
that brings anything else runs the original code."""


def by_name(names: Iterable[str], args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, those given in place and those given by name, by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


class Tracer(fx.Tracer):
    """Traces one module: submodules are leaves, `**kwargs` is carried through, `self.training` stays a question.

    Args:
        constants: values to hold in place of some arguments.
        leaf_functions: functions to record as one node instead of tracing into them.
        properties: attributes of the module whose value is a function to record as one node.
        equal: what the forward is told where it asks whether two values are the same; None for an error, as for any
            other question about a value.
    """

    def __init__(
        self,
        constants: Mapping[str, Any] | None = None,
        leaf_functions: tuple[Callable, ...] = (),
        properties: tuple[str, ...] = (),
        equal: bool | None = None,
    ) -> None:
        super().__init__()
        self.constants = constants or {}
        self.leaf_functions = leaf_functions
        self.properties = properties
        self.equal = equal
        self.thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A node in this thread. fx patches `nn.Module` for all threads, and another one may be in a training step."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if type(m) is nn.CrossEntropyLoss and m not in (self.submodule_paths or ()):
            # A forward that makes its loss itself calls the function that is in it.
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A node for a parameter in this thread; see `call_module`."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every submodule is one node."""
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        """See `equal`."""
        if self.equal is None or obj.node.target is not operator.eq:
            return super().to_bool(obj)
        return self.equal

    def keys(self, obj: fx.Proxy) -> Any:
        """`**proxy` is the only way that a captured forward uses a mapping."""
        return [SPLAT]

    def create_arg(self, a: Any) -> Any:
        """A ModelOutput built inside the forward becomes a call to its class; fx would take it for a dict."""
        if isinstance(a, ModelOutput):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}  # type: ignore[arg-type]
            kwargs = {name: self.create_arg(value) for name, value in fields.items() if value is not None}
            return self.create_node("call_function", type(a), (), kwargs)
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """One placeholder per argument of the undecorated forward, `**kwargs` included."""
        function = inspect.unwrap(root_fn)
        args: list[Any] = [self.root]
        variadic = False
        for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL:
                raise CaptureError(f"{type(self.root).__name__}.forward takes *{name}, which a graph cannot carry")
            if parameter.kind is parameter.VAR_KEYWORD:
                variadic = True
                args.append(self.create_proxy("placeholder", f"**{name}", (), {}))
                continue
            default = () if parameter.default is parameter.empty else (parameter.default,)
            proxy = self.create_proxy("placeholder", name, default, {})
            args.append(self.constants.get(name, proxy))
        if isinstance(self.root, nn.Module):
            vars(self.root)["training"] = self.create_proxy("get_attr", "training", (), {})
        return (with_kwargs(function, len(args)) if variadic else function), args

    @contextmanager
    def recorded_leaves(self, module: nn.Module) -> Iterator[None]:
        """While tracing, calls to the leaf functions and to functions held by properties become nodes."""
        names = vars(inspect.getmodule(inspect.unwrap(type(module).forward)))
        places: list[tuple[dict[str, Any], str, Callable]] = [
            (names, function.__name__, function) for function in self.leaf_functions
        ]
        places += [(vars(module), f"_{name}", getattr(module, name)) for name in self.properties]
        before = [space.get(name) for space, name, _ in places]
        try:
            for space, name, function in places:
                space[name] = self._recorder(function)
            yield
        finally:
            for (space, name, _), value in zip(places, before, strict=True):
                if value is None:
                    space.pop(name, None)
                else:
                    space[name] = value

    def _recorder(self, function: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return record


PATCHING = threading.RLock()
"""Held while something of the whole process is changed: `nn.Module`, which fx patches, and the compiler's stance. Two
threads would undo each other's changes in the wrong order, and a class made meanwhile would keep fx's patches."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run their original code."""
    with PATCHING, torch.compiler.set_stance("force_eager"):
        yield


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Of its class's forward, without decorators and `self`."""
    return tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]


@contextmanager
def restored(things: Iterable[Any], attribute: str) -> Iterator[None]:
    """Whatever a with block sets an attribute to, each of these things has its own value back after it."""
    before = [(thing, getattr(thing, attribute)) for thing in things]
    try:
        yield
    finally:
        for thing, value in before:
            setattr(thing, attribute, value)


def modes_kept(model: nn.Module) -> AbstractContextManager[None]:
    """The model's modules have their training modes back after a with block."""
    return restored(model.modules(), "training")


def capture(module: nn.Module, constants: Mapping[str, Any] | None = None, **options: Any) -> fx.Graph:
    """The graph of `module.forward`, with submodules as `call_module` nodes; for the arguments see `Tracer`.

    Raises:
        CaptureError: the forward branches on the value of a tensor, or otherwise cannot be written as a graph.
    """
    tracer = Tracer(constants, **options)
    training = vars(module)["training"]
    try:
        with PATCHING, tracer.recorded_leaves(module):
            graph = tracer.trace(module)
    # Anything may come of a forward that is given proxies; fx itself raises NameError for a module made within it.
    except Exception as error:
        if isinstance(error, CaptureError):
            raise
        why = "it calls a module that it makes itself" if isinstance(error, NameError) else error
        raise CaptureError(f"the forward of {type(module).__name__} cannot be captured as a graph: {why}") from error
    finally:
        vars(module)["training"] = training
    graph.owning_module = module  # type: ignore[assignment]
    for node in list(graph.nodes):
        _carry_mapping(graph, node)
        _note_key(node)
    remove_dead_nodes(graph)
    graph.lint()
    return graph


KEYS = "lemo_fx_keys"
"""Mark of a `**kwargs` placeholder: the keys that a forward looked up in it, whether it then used them or not."""


def _note_key(node: fx.Node) -> None:
    """Mark the mapping that a node takes a key out of."""
    looks_up = node.target is operator.getitem or (node.op == "call_method" and node.target in ("get", "pop"))
    source = node.args[0] if looks_up and len(node.args) > 1 else None
    if isinstance(source, fx.Node) and source.op == "placeholder" and isinstance(node.args[1], str):
        source.meta.setdefault(KEYS, set()).add(node.args[1])


def remove_dead_nodes(graph: fx.Graph) -> int:
    """Erase what nobody uses; placeholders stay, since they are the layer's signature."""
    dead = 0
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
            dead += 1
    return dead


def _carry_mapping(graph: fx.Graph, node: fx.Node) -> None:
    """kwargs[SPLAT] passed under SPLAT becomes the mapping itself."""
    item = node.kwargs.get(SPLAT)
    if isinstance(item, fx.Node) and item.target is operator.getitem and item.args[1] == SPLAT:
        node.kwargs = {**node.kwargs, SPLAT: item.args[0]}
        if not item.users:
            graph.erase_node(item)


def _expand_mappings(make: Any) -> Callable[[list[str]], list[str]]:
    return lambda lines: [re.sub(rf"\b{SPLAT}\s*=\s*", "**", line) for line in lines]


def build_module(root: nn.Module | dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule whose printed and executed code writes `**mapping` where a node holds it under SPLAT."""
    graph.on_generate_code(_expand_mappings)
    module = fx.GraphModule(root, graph, class_name=name)
    # fx's own prints to stderr where generated code fails; what fails in a proof is a finding.
    type(module).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    return module


def graph_module(
    module: nn.Module,
    graph: fx.Graph,
    functions: dict[str, fx.Graph],
    instead: Mapping[str, Any] = MappingProxyType({}),
) -> fx.GraphModule:
    """A GraphModule for reading and calling; it shares the live module's submodules, but for those in `instead`."""
    outlined = {name: build_module(_targets(module, body, instead), body, name) for name, body in functions.items()}
    return build_module(_targets(module, graph, {**instead, **outlined}), graph, type(module).__name__)


def _targets(module: nn.Module, graph: fx.Graph, instead: Mapping[str, Any]) -> dict[str, Any]:
    """What a graph calls or reads on the module, by name: what `instead` has under it, else the module's own."""
    names = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return {
        name: instead[name] if name in instead else functools.reduce(getattr, name.split("."), module) for name in names
    }


def readable_code(graph: fx.Graph, name: str) -> str:
    """A graph as the text of a class, without the clean-up statements that executed code carries."""
    graph.on_generate_code(_expand_mappings)
    code = graph.python_code("self").src
    lines = [re.sub(r";  (\w+ = )+None$", "", line) for line in code.splitlines() if line.strip()]
    return "\n".join([f"class {name}:", *(f"    {line}" for line in lines), ""])


def readable(graph: fx.Graph, functions: Mapping[str, fx.Graph], name: str) -> str:
    """A graph and the functions it calls as Python text, one class per graph."""
    pieces = [readable_code(graph, name), *(readable_code(body, title) for title, body in functions.items())]
    return "\n".join(pieces)


def module_of(graph: fx.Graph, node: fx.Node) -> nn.Module:
    """The submodule that a `call_module` node calls."""
    assert isinstance(graph.owning_module, nn.Module)
    return graph.owning_module.get_submodule(str(node.target))


def is_tensor_function(target: Any) -> bool:
    """Whether a call_function target is one of torch's own."""
    return getattr(target, "__module__", "").startswith("torch")
