"""What the passes work on: one decoder layer's graph, the sites planned in it, and the parts they add to the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from lemo_fx.config import Treatment
from lemo_fx.graph.sites import Site, holds_matrix
from lemo_fx.runtime.parts import SequenceGroup

META = "lemo_fx"
"""Key in `node.meta` under which the passes keep their marks."""

ROLES = ("score", "predictor", "select", "stand_in", "exchange", "probe", "keys", "queries")
"""What the parts are that a site adds to its layer."""


def part_name(site: str, role: str) -> str:
    """Under which a rewritten layer carries what a site adds to it: a part, by its role, or an outlined function."""
    return f"lemo_{site}_{role}"


def site_and_role(part: str) -> tuple[str, str]:
    """The site that a part belongs to, by name, and its role: `part_name` read backwards; no role of other modules."""
    own = part.removeprefix("lemo_")
    role = next((role for role in ROLES if own != part and own.endswith(f"_{role}")), "")
    return own.removesuffix(f"_{role}"), role


@dataclass(frozen=True)
class Region:
    """A mark: this node belongs to a piece that becomes one function.

    Attributes:
        name: of the function.
        gradient: False where it runs under no_grad; True where it is the branch that trains, and is recomputed in the
            backward when the model checkpoints its activations.
        token_wise: whether it may run on one piece of the tokens after the other.
        float8: whether its frozen linear layers compute in float8.
        share: of the stream's tokens that it runs on at most, in any layer.
    """

    name: str
    gradient: bool
    token_wise: bool = False
    float8: bool = False
    share: float = 1.0


@dataclass
class PlannedSite:
    """One site and what is to be done with it.

    Attributes:
        name: "attention", "mlp", or with a number where a layer has several of a kind.
        site: where it is in the captured graph.
        treatment: of the eliminated tokens; None leaves the branch dense (it still becomes a function, so that
            activation checkpointing covers it).
        score: node-producing kind: "measured", "predicted", "random", "step" or "shared".
        float8: whether what is computed with gradient computes in float8.
        share: of the tokens that such a site keeps at most, in any layer; 1 where that depends on the data.
        every_key: whether the gradient of kept queries knows every key, see `Elimination.keys`.
        scores, tokens, dropped, output, rest: filled in by the passes as they go.
    """

    name: str
    site: Site
    treatment: Treatment | None
    score: str = "measured"
    float8: bool = False
    share: float = 1.0
    every_key: bool = False
    scores: fx.Node | None = None
    tokens: fx.Node | None = None
    dropped: fx.Node | None = None
    output: fx.Node | None = None
    rest: fx.Node | None = None


def inventory(layer: nn.Module) -> list[tuple[Any, ...]]:
    """What a pass must not change: which modules a layer has, of which classes, with which attributes and weights."""
    return [
        (name, id(module), type(module), sorted(vars(module)), [(n, id(p)) for n, p in module._parameters.items()])
        for name, module in layer.named_modules()
    ]


@dataclass
class LayerRewrite:
    """The state that flows through the pipeline for one decoder layer.

    Attributes:
        layer: the decoder layer; never changed by a pass.
        graph: its captured graph; every pass edits it in place.
        sites: planned sites in the order in which they are computed.
        recompute: what a checkpointed branch computes again in the backward, see `runtime.branch`.
        presence: arguments whose absence changes what the layer computes -> whether the graph is for calls with them.
        forward: precision of what `exact` computes without gradient, see `LemoConfig`.
        modules: parts to add to the layer by attribute name (see `part_name`).
        functions: graphs of the outlined functions by name.
        untouched: the layer's inventory before any pass.
    """

    layer: nn.Module
    graph: fx.Graph
    sites: list[PlannedSite]
    recompute: str = "all"
    forward: str = "model"
    presence: dict[str, bool] = field(default_factory=dict)
    group: SequenceGroup | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    functions: dict[str, fx.Graph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.untouched = inventory(self.layer)

    @property
    def entry(self) -> fx.Node:
        """The layer's input stream."""
        return next(iter(self.graph.nodes))

    def length(self) -> fx.Node:
        """The number of tokens in the stream, S; a function that is recomputed then need not hold on to the stream."""
        found = next((n for n in self.graph.nodes if n.target == "size" and n.args == (self.entry, 1)), None)
        if found is not None:
            return found
        return self._at_entry("size", self.entry, 1, name="length")

    def argument(self, name: str) -> fx.Node | None:
        """The layer argument of this name, which may be one of its `**kwargs`."""
        arguments = {str(n.target): n for n in self.graph.nodes if n.op == "placeholder"}
        if name in arguments or self.others is None:
            return arguments.get(name)
        others = self.others
        known = next((n for n in others.users if n.target == "get" and n.args == (others, name)), None)
        return self._at_entry("get", others, name, name=name) if known is None else known

    @property
    def others(self) -> fx.Node | None:
        """The layer's `**kwargs`, by whatever name."""
        return next((n for n in self.graph.nodes if n.op == "placeholder" and str(n.target).startswith("**")), None)

    def _at_entry(self, method: str, *args: Any, name: str) -> fx.Node:
        *_, last = (n for n in self.graph.nodes if n.op == "placeholder")
        with self.graph.inserting_after(last):
            return self.graph.create_node("call_method", method, args, name=name)


def clone(
    graph: fx.Graph, nodes: Iterable[fx.Node], values: Mapping[fx.Node, fx.Node], region: Region, suffix: str
) -> dict[fx.Node, fx.Node]:
    """Copy nodes at the insertion point with their inputs replaced through `values`; returns old -> new."""
    copies = dict(values)
    for node in nodes:
        copy = graph.node_copy(node, lambda n: copies.get(n, n))
        copy.name = graph._graph_namespace.create_name(f"{node.name}_{suffix}", None)
        copy.meta = {**node.meta, META: region}
        copies[node] = copy
    return copies


def call(graph: fx.Graph, target, args: tuple, name: str, region: Region | None = None, kwargs=None) -> fx.Node:
    """A named call to a function, or to a module where `target` is a string."""
    op = "call_module" if isinstance(target, str) else "call_function"
    node = graph.create_node(op, target, args, kwargs or {}, name=name)
    if region is not None:
        node.meta[META] = region
    return node


def normed_input(rewrite: LayerRewrite, site: Site) -> fx.Node:
    """What a branch computes on: the stream after the branch's own norm, before its attention or first projection."""
    nodes = site.nodes[: site.nodes.index(site.mixer)] if site.kind == "attention" else _before_matrices(rewrite, site)
    return nodes[-1] if nodes else site.stream


def _before_matrices(rewrite: LayerRewrite, site: Site) -> tuple[fx.Node, ...]:
    for index, node in enumerate(site.nodes):
        if node.op == "call_module" and holds_matrix(rewrite.layer.get_submodule(str(node.target))):
            return site.nodes[:index]
    return ()
