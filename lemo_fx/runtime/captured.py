"""Whether a layer is still what was captured: its numbers and switches, constants of its graph, and its parts.

A graph holds what `self.alpha` or `self.config.multiplier` was. A branch was shown to treat each token alone with the
modules that it had. Both may change after a transform: a scale that is annealed, an MLP that is exchanged or whose
forward is patched, adapters that are added. So what a layer is made of is compared in every call, and where something
is new, the layer is captured and analysed once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lemo_fx.errors import CaptureError, LemoError
from lemo_fx.graph.anatomy import is_softmax_attention
from lemo_fx.graph.capture import capture, readable_code
from lemo_fx.graph.left_out import kind_of
from lemo_fx.graph.sites import Refusal, Site, find_sites

Parts = tuple[tuple[str, nn.Module, Any], ...]

OWN = "lemo_"
"""How the names of modules begin that lemo_fx adds to a layer."""

HARMLESS = frozenset({"torch", "transformers", "accelerate", "bitsandbytes", "torchao", "lemo_fx"})
"""Packages whose hooks and forwards within a layer work with any rows: they manage weights, or collect what a call
asked for."""

SWITCHED = frozenset({"training", "gradient_checkpointing"})
"""Attributes that a graph reads anew in every call."""


def harmless(hook: Any) -> bool:
    """True if a hook, or a forward that was put on a module, is of a package in `HARMLESS`."""
    function = getattr(hook, "func", hook)
    package = getattr(function, "__module__", None) or type(function).__module__
    return package.partition(".")[0] in HARMLESS


def _plain(value: Any) -> dict[str, Any]:
    kinds = (bool, int, float, str, type(None))
    return {name: v for name, v in vars(value).items() if isinstance(v, kinds) and name not in SWITCHED}


@dataclass
class Captured:
    """A decoder layer as it was when it was captured.

    Attributes:
        code: of its graph, before any pass; found: its sites and what was refused.
        constants: arguments that it was captured with, by name.
        kinds: of the arguments that its graph does not use -> the kinds of values (`kind_of`) for which that is right.
        numbers: its own plain attributes and those of its config; parts: its children and theirs, two levels deep,
            with their names and the forwards that were put on them.
    """

    code: str
    found: tuple[Any, ...]
    constants: Mapping[str, Any]
    numbers: tuple[dict[str, Any], ...]
    parts: Parts
    kinds: Mapping[str, tuple[Any, ...]]

    def other_kind(self, given: Mapping[str, Any]) -> str:
        """The argument of a call that the graph does not use, and the forward may; empty if there is none."""
        return next((n for n, kinds in self.kinds.items() if n in given and kind_of(given[n]) not in kinds), "")

    def check(self, layer: nn.Module, name_of: Callable[[nn.Module], str]) -> None:
        """Raise where the layer would compute something else now than its captured graph."""
        numbers, parts = numbers_of(layer), parts_of(layer)
        if (numbers, parts) == (self.numbers, self.parts) or isinstance(layer, FSDPModule):
            return
        changed = self._changed(layer, parts)
        if changed:
            raise LemoError(
                f"{name_of(layer)}: {changed} since lemo_fx.transform, and its rewritten graph does not know: call "
                "lemo_fx.revert and lemo_fx.transform again"
            )
        self.numbers, self.parts = numbers, parts

    def _changed(self, layer: nn.Module, parts: Parts) -> str:
        known = {name: (module, forward) for name, module, forward in self.parts}
        for name, module, forward in parts:
            before, own = known.get(name, (None, None))
            patched = forward is not own and forward is not None and not harmless(forward)
            if is_softmax_attention(module) and (module is not before or patched):
                # What it does with kept tokens only a proof shows.
                return f"{name} was exchanged or given another forward"
        try:
            graph = capture(layer, self.constants)
            code = readable_code(graph, "Forward")
            found = summary(*find_sites(graph))
        except CaptureError as error:
            return f"its forward has changed ({error})"
        if code != self.code:
            return "a number or switch that its forward reads, or the forward itself, has changed"
        return "" if found == self.found else "what its modules do with tokens has changed"


@dataclass
class CapturedHead:
    """A causal model's own forward as it was when it was captured.

    Attributes:
        code: of its graph, before the loss was segmented.
        constants, options: of the capture; numbers: as in `Captured`.
    """

    code: str
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    numbers: tuple[dict[str, Any], ...]

    def unchanged(self, head: nn.Module) -> bool:
        """Whether it would compute now what its captured graph does."""
        numbers = numbers_of(head)
        if numbers != self.numbers:
            try:
                code = readable_code(capture(head, self.constants, **self.options), "Forward")
            except CaptureError:
                return False
            if code != self.code:
                return False
            self.numbers = numbers
        return True


def summary(sites: list[Site], refusals: list[Refusal]) -> tuple[Any, ...]:
    """What `find_sites` found, to be compared."""
    found = [(site.kind, site.branch.name, site.add.name, site.whole) for site in sites]
    return (*found, *((refusal.node, refusal.reason) for refusal in refusals))


def numbers_of(layer: nn.Module) -> tuple[dict[str, Any], ...]:
    """The plain attributes of a layer and of its config, which its forward may read."""
    config = vars(layer).get("config")
    return (_plain(layer), _plain(config)) if hasattr(config, "__dict__") else (_plain(layer),)


def parts_of(layer: nn.Module) -> Parts:
    """A layer's children and theirs: (name, module, the forward that was put on it or None)."""
    found = []
    for name, child in layer._modules.items():
        if child is not None and not name.startswith(OWN):
            found.append((name, child, vars(child).get("forward")))
            found += [
                (f"{name}.{inner}", module, vars(module).get("forward"))
                for inner, module in child._modules.items()
                if module is not None
            ]
    return tuple(found)
