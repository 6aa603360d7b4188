"""Optional arguments: what a captured forward does not show of those that a call leaves out or brings otherwise."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from lemo_fx.errors import CaptureError
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, KEYS, argument_names, capture, readable_code, remove_dead_nodes


def unread(graph: fx.Graph) -> tuple[str, ...]:
    """Optional arguments that a captured graph does not use.

    Its forward may have asked about them what a tracer answers once (`isinstance(bias, torch.Tensor)`), and do
    something else in a call that brings another kind of value.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    named = [str(n.target) for n in placeholders if n.args and not n.users and not str(n.target).startswith("*")]
    used = {n.args[1] for p in placeholders for n in p.users if len(n.args) > 1 and isinstance(n.args[1], str)}
    keys = {key for p in placeholders for key in p.meta.get(KEYS, ())}
    return (*named, *sorted(keys - used))


def kind_of(value: Any) -> Any:
    """What a forward may ask of an argument without computing with it: a number or word itself, a tensor's type."""
    return value if isinstance(value, bool | int | float | str | None) else type(value)


def kinds_left_out(module: nn.Module, graph: fx.Graph, besides: Iterable[str]) -> dict[str, Any]:
    """The optional arguments that a captured graph does not use, and the kind of value of each where left out."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return {name: kind_of(defaults.get(name)) for name in unread(graph) if name not in besides}


def matters_when_absent(
    module: nn.Module,
    graph: fx.Graph,
    constants: Mapping[str, Any] | None = None,
    besides: tuple[str, ...] = (),
    **options: Any,
) -> tuple[str, ...]:
    """The optional arguments whose absence changes what a captured forward does, beyond being handed on.

    While tracing, an argument is a proxy and never None: `if attention_mask is None` is answered once. So where the
    source does more with an argument than that, the forward is captured once more with it held at None, and what comes
    out is compared.

    Args:
        graph: `capture(module, constants, **options)`.
        besides: arguments not to ask about.
    """
    constants = constants or {}
    return tuple(
        name
        for name, parameter in inspect.signature(inspect.unwrap(type(module).forward)).parameters.items()
        if parameter.default is None
        and name not in (*constants, *besides)
        and not _only_handed_on(module, name)
        and _matters(module, graph, name, constants, options)
    )


def _only_handed_on(module: nn.Module, name: str) -> bool:
    """Whether by its source a module's forward does nothing with an argument but call submodules with it."""
    children = frozenset(f"self.{child}" for child in module._modules)
    used = _used(inspect.unwrap(type(module).forward), children)
    return used is not None and name not in used


@functools.cache
def _used(forward: Callable, children: frozenset[str]) -> frozenset[str] | None:
    """The names that a function uses beyond handing them to one of these; None where that cannot be read."""
    try:
        nodes = [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward))))]
    except (OSError, TypeError, SyntaxError):
        return None
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in children]
    handed = {id(value) for n in calls for value in (*n.args, *(k.value for k in n.keywords if k.arg))}
    used = frozenset(n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in handed)
    return None if used & {"locals", "vars", "eval", "exec"} else used


def _matters(
    module: nn.Module, graph: fx.Graph, name: str, constants: Mapping[str, Any], options: Mapping[str, Any]
) -> bool:
    try:
        without = capture(module, {**constants, name: None}, **options)
    except CaptureError:
        return True
    return _text_without(graph, name) != _text_without(without, name)


def reads_use_cache(layer: nn.Module) -> bool:
    """Whether a layer's forward computes another stream when it is asked for a cache, beyond handing that on."""
    if "use_cache" not in argument_names(layer) or _only_handed_on(layer, "use_cache"):
        return False
    texts = []
    for value in (False, True):
        try:
            graph = capture(layer, {**ABSENT_IN_TRAINING, "use_cache": value})
        except CaptureError:
            return False
        output = graph.output_node()
        # The cache may be returned beside the stream.
        output.args = tuple(v[0] if isinstance(v, tuple | list) else v for v in output.args)
        remove_dead_nodes(graph)
        texts.append(re.sub(r"\b(True|False)\b", "", readable_code(graph, "Forward")))
    return texts[0] != texts[1]


def _text_without(graph: fx.Graph, name: str) -> str:
    """A graph's code with None wherever it reads this argument."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.target == name)
    return re.sub(rf"\b{node.name}\b", "None", readable_code(graph, "Forward"))
