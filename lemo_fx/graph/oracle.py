"""What a decoder layer must compute once tokens are dropped: its captured graph run node by node, branch by branch.

No pass, kernel or generated code takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx, nn

from lemo_fx.graph.capture import SPLAT
from lemo_fx.graph.sites import Site


@dataclass(frozen=True)
class Untouched:
    """A captured graph that no pass edits, and the sites in it, in the order in which they are planned."""

    graph: fx.Graph
    sites: Sequence[Site]


def snapshot(graph: fx.Graph, sites: Sequence[Site]) -> Untouched:
    """A copy of a captured graph for which passes may edit this one."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph, copies))

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return copies[value] if isinstance(value, fx.Node) else value

    places = [{f.name: of(getattr(site, f.name)) for f in fields(site)} for site in sites]
    return Untouched(copied, [replace(site, **place) for site, place in zip(sites, places, strict=True)])


@dataclass(frozen=True)
class Changes:
    """What to do otherwise than the layer does.

    Attributes:
        masks: by attention call, the additive mask [B, 1, S, S] that it reads in the place of the layer's.
        treat: (a branch's node, its value [B, S, H]) -> the value to add to the residual stream.
        tokens: by attention call, those [B, S] whose gradient leaves it by its input.
    """

    masks: Mapping[fx.Node, torch.Tensor]
    treat: Callable[[fx.Node, torch.Tensor], torch.Tensor] | None = None
    tokens: Mapping[fx.Node, torch.Tensor] = field(default_factory=dict)


class Oracle(fx.Interpreter):
    """Runs a layer's captured graph.

    Args:
        given: the layer's arguments by name.
    """

    def __init__(self, layer: nn.Module, captured: Untouched, given: Mapping[str, Any], changes: Changes) -> None:
        super().__init__(layer, garbage_collect_values=False, graph=captured.graph)
        self.given, self.changes = given, changes
        self.branches = {site.branch for site in captured.sites}
        self.named = {str(n.target) for n in captured.graph.nodes if n.op == "placeholder"}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The layer's argument of this name, or its default."""
        if str(target).startswith("**"):
            return {key: value for key, value in self.given.items() if key not in self.named}
        return self.given.get(str(target), args[0] if args else None)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        """A node's arguments, with mappings spread out and an attention's mask replaced."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        kwargs = {**{k: v for k, v in kwargs.items() if k != SPLAT}, **kwargs.get(SPLAT, {})}
        through = self.changes.tokens.get(n)
        if through is not None:

            def limited(value: Any) -> Any:
                runs = isinstance(value, torch.Tensor) and value.requires_grad and value.shape[:2] == through.shape
                return torch.where(through[..., None], value, value.detach()) if runs else value

            args, kwargs = tuple(map(limited, args)), {name: limited(value) for name, value in kwargs.items()}
        mask = self.changes.masks.get(n)
        if mask is not None:
            read = [i for i, a in enumerate(n.args) if isinstance(a, fx.Node) and a.target == "attention_mask"]
            args = tuple(mask if i in read else a for i, a in enumerate(args))
            if not read:
                kwargs["attention_mask"] = mask
        return args, kwargs

    def run_node(self, n: fx.Node) -> Any:
        """A node's value; a branch's may be replaced."""
        value = super().run_node(n)
        return self.changes.treat(n, value) if self.changes.treat and n in self.branches else value
