"""Watch a layer at work for what no comparison of values on a small probe can show.

Llama 4's layers without RoPE scale queries by `torch.arange(length)`, in steps of thousands of tokens: on kept tokens
alone they would number others than the model does. Gemma 4's later layers take keys and values from earlier ones, which
would be those of kept tokens alone; so would be a loss that a module of experts leaves on itself or in a list.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lemo_fx.graph.capture import argument_names, modes_kept, uncompiled
from lemo_fx.graph.probe import LENGTH
from lemo_fx.kernels.float8_linear.as_it_comes import is_quantised
from lemo_fx.kernels.private import tree_leaves

SEQUENCES = (torch.arange, torch.linspace, torch.range)
LIKE = (torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as)
"""Methods that read the kind or shape of another tensor, and none of its values."""


@dataclass(frozen=True)
class Watched:
    """What the modules of a layer did in one call.

    Attributes:
        numbering: names of attentions that made a sequence of numbers of the stream's length.
        shared: names of the layer's arguments, mappings, in which entries were read or written.
        left: by name of a module, or empty for the layer itself, the shape of a tensor that it left for others to read.
        counted: by name of a module, the buffer that it changes in training.
    """

    numbering: frozenset[str] = frozenset()
    shared: tuple[str, ...] = ()
    left: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    counted: Mapping[str, str] = field(default_factory=dict)

    def why_every_row(self, attention: str | None, called: Sequence[str]) -> str | None:
        """Why a branch must see every token, continuing a sentence that begins with it; None where nothing was seen.

        Args:
            attention: name of its attention, if it has one; called: names of all modules that it calls.
        """
        if attention in self.numbering:
            return "numbers the rows that it is given (torch.arange), and would take kept tokens for consecutive ones"
        if attention is not None and self.shared:
            return f"shares its keys and values with other layers through {', '.join(self.shared)}"

        def within(name: str) -> bool:
            return any(f"{name}.".startswith(f"{outer}.") for outer in called)

        for name, shape in self.left.items():
            if within(name):
                return f"{_left(shape)} in {name}, and for others it would be that of kept tokens"
        for name, buffer in self.counted.items():
            if within(name):
                return f"changes the buffer {name}.{buffer} in training, by the tokens or the calls that it sees"
        return None

    @property
    def left_by_layer(self) -> str:
        """What the layer's own forward left; empty where it left nothing."""
        return _left(self.left[""]) + " in its own forward, and a graph would not" if "" in self.left else ""


def _left(shape: tuple[int, ...]) -> str:
    return f"leaves a tensor {list(shape)} somewhere (an attribute, a list, a global variable) that was made"


def watch(layer: nn.Module, given: Mapping[str, Any]) -> Watched:
    """Watch a layer in one call without gradient; nothing is seen where its arguments are not known.

    Args:
        given: the layer's arguments by name, recorded on `LENGTH` tokens.
    """
    if not given:
        return Watched()
    modules = {name: module for name, module in layer.named_modules() if name}
    touched: set[str] = set()
    watched = {name: _watched(value, name, touched) for name, value in given.items()}
    touched.clear()
    stream = argument_names(layer)[0]
    # Another stream than the recorded one: what was made of that may be where this call leaves its own.
    watched[stream] = 1.5 * watched[stream]
    seen = _Seen(watched[stream])
    names = {module: name for name, module in modules.items()}

    def enter(module: nn.Module, args: Any) -> None:
        seen.within.append(names[module])

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.follow((args, kwargs), out)
        seen.within.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave, with_kwargs=True, always_call=True) for module in names]
    # Quantised layers keep what they unpacked.
    plain = {name for name, module in modules.items() if not is_quantised(module)}
    buffers = {(name, k): b for name in plain for k, b in modules[name]._buffers.items() if b is not None}
    values = {key: buffer.clone() for key, buffer in buffers.items()}
    devices = [v.device for v in given.values() if isinstance(v, torch.Tensor) and v.is_cuda][:1]
    counted = {}
    try:
        with modes_kept(layer), uncompiled(), torch.no_grad(), torch.random.fork_rng(devices=devices), seen:
            layer.train()
            type(layer).forward(layer, **watched)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        # The proof says what is wrong with a layer that does not run.
        return Watched()
    finally:
        for hook in hooks:
            hook.remove()
        for (name, key), value in values.items():
            own = buffers[name, key]
            # By value: BatchNorm changes its statistics past torch's count of changes.
            if modules[name]._buffers[key] is not own or not torch.equal(own, value):
                counted[name] = key
                modules[name]._buffers[key] = own
                with torch.no_grad():
                    own.copy_(value)
    del watched
    left = {name: shape for name, shape in seen.left().items() if name in plain or not name}
    return Watched(frozenset(seen.numbering), tuple(sorted(touched)), left, counted)


def why_no_stream(layer: nn.Module, given: Mapping[str, Any]) -> str | None:
    """What a layer is handed in the place of one residual stream; None where it is one, or nothing is known."""
    name = argument_names(layer)[0]
    stream = given.get(name)
    if not isinstance(stream, torch.Tensor) or stream.dim() == 3:
        return None
    return (
        f"its {name!r} have {stream.dim()} axes: several residual streams side by side (hyper-connections, alternating "
        "updates), not one of [B, S, H]"
    )


class _Seen(TorchFunctionMode):
    """What a layer's modules make of its stream while this is active.

    Attributes:
        within: names of the modules that are being called, the innermost last.
        numbering: names of modules in which a sequence of `LENGTH` numbers was made.
        made: what was computed from the stream: (name of the module in which, the tensor).
    """

    def __init__(self, stream: torch.Tensor) -> None:
        super().__init__()
        self.within: list[str] = []
        self.numbering: set[str] = set()
        self.made: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        self._ids: set[int] = set()
        self._note(stream)

    def follow(self, given: Any, made: Any) -> None:
        """Remember what was made, if the stream is in what it was made of."""
        if any(id(value) in self._ids for value in tree_leaves(given)):
            self._note(made)

    def _note(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and id(value) not in self._ids:
                self._ids.add(id(value))
                forget = functools.partial(lambda key, _: self._ids.discard(key), id(value))
                self.made.append((self.within[-1] if self.within else "", weakref.ref(value, forget)))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in SEQUENCES and out.numel() == LENGTH:
            self.numbering.update(self.within)
        self.follow(args[:1] if func in LIKE else (args, kwargs), out)
        return out

    def left(self) -> dict[str, tuple[int, ...]]:
        """By name of a module, the shape of a tensor that was made in it and that something holds still."""
        if any(made() is not None for _, made in self.made):
            gc.collect()
        return {name: tuple(value.shape) for name, made in self.made if (value := made()) is not None}


def _watched(value: Any, name: str, touched: set[str]) -> Any:
    """A copy of a mapping that notes its name when an entry is read or written; everything else as it is."""
    if not isinstance(value, MutableMapping):
        return value
    kind = type(value)

    def noting(method: Any) -> Any:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            touched.add(name)
            return method(self, *args, **kwargs)

        return run

    names = ("__getitem__", "__setitem__", "get", "update", "setdefault", "pop")
    watched: Any = type(kind.__name__, (kind,), {method: noting(getattr(kind, method)) for method in names})
    if isinstance(value, dict):
        return watched(value)
    copied = copy.copy(value)
    copied.__class__ = watched
    return copied
