"""Find the sites of a decoder layer: branches that leave the residual stream and are added back to it.

The residual stream is the dominator chain of what the layer returns, of a tuple the first value: every path from the
input to it runs through these nodes.
A residual add is a node of that chain that adds its immediate dominator, the stream, perhaps scaled, to one or more
other values: the branches. Sequential, sandwich-norm, parallel-residual, dropout-before-add and post-norm layers all
fall out of this.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import networkx as nx
import torch
from torch import fx, nn

from lemo_fx.config import SiteKind
from lemo_fx.graph.anatomy import is_softmax_attention
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture, module_of, remove_dead_nodes
from lemo_fx.graph.token_wise import why_not_alone, why_not_elementwise, why_not_token_wise

ADDS = (operator.add, operator.iadd, torch.add)

SCALES = (operator.mul, torch.mul, operator.truediv, "mul", "to", "float")


@dataclass(frozen=True)
class Site:
    """One branch of the residual stream.

    Attributes:
        kind: "attention" where a node mixes tokens through softmax attention, else "mlp".
        stream: the value of the residual stream that the branch reads.
        add: the residual add that it returns to; parallel branches share one.
        branch: the value that is added.
        carrier: what it is added to: the stream, or the stream times something (MiniMax-Text scales it first).
        mixer: the attention call, or the last module call of an MLP.
        nodes: every node of the branch, in graph order.
        addends: all that the add adds to the stream: this branch, parallel ones, and what is no site.
        read_outside: (node of the branch, its user elsewhere in the layer), beside the branch's own value.
        token_wise: whether every node of the branch treats each token alone.
        whole: whether that is known of the branch alone, not of its parts, which may work on flat rows, say.
    """

    kind: SiteKind
    stream: fx.Node
    add: fx.Node
    branch: fx.Node
    carrier: fx.Node
    mixer: fx.Node
    nodes: tuple[fx.Node, ...]
    addends: tuple[fx.Node, ...]
    read_outside: tuple[tuple[fx.Node, fx.Node], ...] = ()
    token_wise: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why something must see every token.

    Attributes:
        node: at which node.
        reason: continues a sentence that begins with the node.
        site: the branch that stays dense; None where the layer must stay as it is.
    """

    node: str
    reason: str
    site: Site | None = None


def find_sites(graph: fx.Graph) -> tuple[list[Site], list[Refusal]]:
    """The sites of a captured decoder layer in the order in which they are computed, and what was refused.

    Nothing is changed, except that a flattening of [B, S, H] to [B * S, H] around an MLP (OPT) is removed once every
    operation inside is known to treat tokens one by one, and that attention weights which a layer returns beside its
    stream (Bamba) are None, as they are under every implementation but eager.
    """
    _return_no_weights(graph)
    _read_late(graph)
    sites, refusals = _analyse(graph)
    if not refusals and _remove_flattening(graph, sites):
        sites, refusals = _analyse(graph)
    inside = {node for site in (*sites, *(r.site for r in refusals if r.site)) for node in site.nodes}
    flat = [node for node, _ in _flattenings(graph) if node not in inside]
    if flat:
        reason = "flattens the token axis and not every branch is known to be token-wise"
        refusals += [Refusal(flat[0].name, reason, site) for site in sites]
        sites = []
    return sites, refusals


def _return_no_weights(graph: fx.Graph) -> None:
    output = graph.output_node()
    if not isinstance(output.args[0], tuple | list):
        return
    stream, *others = output.args[0]
    kept = tuple(None if _is_weights(graph, other) else other for other in others)
    output.args = ((stream, *kept),)
    remove_dead_nodes(graph)


def _read_late(graph: fx.Graph) -> None:
    """Take values out of what modules return only where they are needed: a branch may then end before."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.users:
            min(node.users, key=order.__getitem__).prepend(node)


def _is_weights(graph: fx.Graph, node: object) -> bool:
    """Whether this is the second thing that a softmax attention returns, and nobody else reads it."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or len(node.users) != 1:
        return False
    attention, index = node.args
    if not isinstance(attention, fx.Node) or attention.op != "call_module":
        return False
    return bool(index == 1 and is_softmax_attention(module_of(graph, attention)))


def _analyse(graph: fx.Graph) -> tuple[list[Site], list[Refusal]]:
    nodes = list(graph.nodes)
    entry = next(n for n in nodes if n.op == "placeholder")
    returned = graph.output_node().args[0]
    last = returned[0] if isinstance(returned, tuple | list) and returned else returned
    flow = nx.DiGraph((source, user) for source in nodes for user in source.users)
    if not isinstance(last, fx.Node) or entry not in flow or not nx.has_path(flow, entry, last):
        return [], [Refusal(entry.name, "does not reach the output")]
    # A type is no way for values: the stream may be cast back to the type that it came in.
    values = flow.subgraph(n for n in nodes if n.target is not getattr or n.args[1] not in ("dtype", "device"))
    dominator = nx.immediate_dominators(values, entry)
    spine = [last]
    while spine[-1] is not entry:
        spine.append(dominator[spine[-1]])
    spine.reverse()

    order = {node: position for position, node in enumerate(nodes)}
    branches: list[Site] = []
    adds: set[fx.Node] = set()
    for stream, add in itertools.pairwise(spine):
        if not _is_add(add):
            continue
        below = nx.descendants(flow, stream)
        attends = partial(_attends, graph, flow, below)
        leaves, opened = _leaves(add, stream, attends)
        carrier = _carrier(leaves, stream, partial(_region, flow, below))
        if carrier is None:
            continue
        addends = tuple(sorted((leaf for leaf in leaves if leaf is not carrier), key=order.__getitem__))
        adds.update(opened)
        # As they are computed, which may not be as they are added: a dropout of one draws before a dropout of the next.
        for branch in (addend for addend in addends if addend in below):
            region = tuple(sorted(_region(flow, below, branch), key=order.__getitem__))
            kind: SiteKind = "attention" if attends(branch) else "mlp"
            branches.append(Site(kind, stream, add, branch, carrier, _mixer(graph, region), region, addends))
    if not branches:
        return [], [_why_no_add(graph, spine)]

    sites: list[Site] = []
    refusals: list[Refusal] = []
    regions = [set(site.nodes) for site in branches]
    for number, site in enumerate(branches):
        outside = tuple(
            (node, user)
            for node in site.nodes
            for user in node.users
            if not (node is site.branch and user in adds)
            and not any(node in region and user in region for region in regions)
        )
        site = replace(site, read_outside=outside)
        refusal = _why_not(graph, site)
        whole = refusal is not None and site.kind == "mlp" and not outside and _is_token_wise(graph, site)
        if whole:
            refusal = None
        others = set().union(*(region for other, region in enumerate(regions) if other != number))
        shared = next((n for n in site.nodes if n in others and _is_heavy(graph, n)), None)
        if shared is not None:
            # Each branch becomes a function of its own, and would compute it again.
            refusals.append(Refusal(shared.name, "is shared by two branches"))
        elif refusal is None:
            sites.append(replace(site, read_outside=(), token_wise=site.kind == "mlp", whole=whole))
        elif all(order[user] > order[site.add] for _, user in outside):
            refusals.append(refusal)
        else:
            # What reads it comes before the add: it can be left where it is, but not be made a function.
            refusals.append(replace(refusal, site=None))
    return sites, refusals


def _why_no_add(graph: fx.Graph, spine: list[fx.Node]) -> Refusal:
    """What a layer does to its stream where it adds nothing to it.

    Args:
        spine: the values of the stream, the layer's input first.
    """
    if len(spine) == 1:
        return Refusal(spine[0].name, "is returned as it comes: no residual add in sight")
    node = spine[1]
    if node.op != "call_module":
        return Refusal(node.name, "makes the next residual stream and is no plain x + y: no residual add in sight")
    kind = type(module_of(graph, node)).__name__
    return Refusal(node.name, f"hands the residual stream through {kind}: no residual add in sight outside of it")


def _region(flow: nx.DiGraph, below: set[fx.Node], node: fx.Node) -> set[fx.Node]:
    """A value and all it is computed from below the stream."""
    return (nx.ancestors(flow, node) | {node}) & below


def _attends(graph: fx.Graph, flow: nx.DiGraph, below: set[fx.Node], node: fx.Node) -> bool:
    region = _region(flow, below, node)
    return any(n.op == "call_module" and is_softmax_attention(module_of(graph, n)) for n in region)


def _carrier(leaves: list[fx.Node], stream: fx.Node, region: Callable[[fx.Node], set[fx.Node]]) -> fx.Node | None:
    """Of all that a residual add adds, the one that is the stream or the stream scaled; None where none or several."""
    found = [leaf for leaf in leaves if leaf is stream]
    found = found or [leaf for leaf in leaves if (own := region(leaf)) and all(n.target in SCALES for n in own)]
    return found[0] if len(found) == 1 else None


def _is_add(node: fx.Node) -> bool:
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    by_function = node.op == "call_function" and node.target in ADDS
    return len(tensors) == 2 and not node.kwargs and (by_function or (node.op, node.target) == ("call_method", "add"))


def _leaves(add: fx.Node, stream: fx.Node, attends: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The addends of a residual add, and the adds between; an inner add opens where it joins parallel branches."""
    leaves, opened = [], [add]
    for addend in add.args:
        assert isinstance(addend, fx.Node)
        joins = (
            _is_add(addend)
            and len(addend.users) == 1
            and (stream in addend.args or sum(attends(a) for a in addend.args if isinstance(a, fx.Node)) == 1)
        )
        if joins:
            more = _leaves(addend, stream, attends)
            leaves.extend(more[0])
            opened.extend(more[1])
        else:
            leaves.append(addend)
    return leaves, opened


def _mixer(graph: fx.Graph, region: tuple[fx.Node, ...]) -> fx.Node:
    """The attention call of a branch, else its last call that is neither a dropout nor a norm."""
    calls = [n for n in region if n.op == "call_module"]
    attentions = [n for n in calls if is_softmax_attention(module_of(graph, n))]
    heavy = [n for n in calls if _is_heavy(graph, n)]
    return [*attentions[:1], *reversed(heavy), *reversed(calls), region[-1]][0]


def _why_not(graph: fx.Graph, site: Site) -> Refusal | None:
    """Why a branch must see every token; None if it may run on some of them."""
    attentions: list[fx.Node] = []
    for node in site.nodes:
        if node.op == "call_module":
            module = module_of(graph, node)
            if is_softmax_attention(module):
                if not getattr(module, "is_causal", False):
                    return Refusal(node.name, f"{type(module).__name__} is not causal", site)
                attentions.append(node)
                continue
            reason = why_not_token_wise(module, _width(graph))
            if reason:
                return Refusal(node.name, f"{type(module).__name__} {reason}", site)
        elif reason := why_not_elementwise(node, attentions):
            return Refusal(node.name, reason, site)
    if len(attentions) > 1:
        return Refusal(attentions[1].name, "is a second attention in one branch", site)
    if not any(node.op == "call_module" for node in site.nodes):
        return Refusal(site.branch.name, "holds no module to save work in", site)
    if site.read_outside:
        node, user = site.read_outside[0]
        return Refusal(node.name, f"is also read outside of its branch, by {user.name!r}", site)
    return None


def _is_token_wise(graph: fx.Graph, site: Site) -> bool:
    """Whether a branch as a whole is shown to treat each token alone, whatever its parts do (flat rows, say)."""
    layer = graph.owning_module
    assert isinstance(layer, nn.Module)
    called = [module_of(graph, node) for node in site.nodes if node.op == "call_module"]
    outside = {n for node in site.nodes for n in node.all_input_nodes} - {*site.nodes, site.stream}
    if not called or any(n.op not in ("placeholder", "get_attr") for n in outside):
        return False
    interpreter = fx.Interpreter(layer, garbage_collect_values=False, graph=graph)
    given: dict[fx.Node, object] = {}
    for node in outside:
        if node.op == "get_attr":
            given[node] = False if node.target == "training" else interpreter.fetch_attr(str(node.target))
        else:
            given[node] = {} if str(node.target).startswith("**") else None

    def run(x: torch.Tensor) -> object:
        interpreter.env = {**given, site.stream: x}
        for node in site.nodes:
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[site.branch]

    return why_not_alone(run, nn.ModuleList(called), (2, 8, _width(graph))) is None


def _is_heavy(graph: fx.Graph, node: fx.Node) -> bool:
    return node.op == "call_module" and holds_matrix(module_of(graph, node))


def holds_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight matrix: norms, activations and dropouts do not."""
    return any(p.dim() >= 2 for p in module.parameters())


def _width(graph: fx.Graph) -> int:
    """Hidden size of the layer: the length of the first norm's weight that it calls, or the first matrix's columns."""
    layer = graph.owning_module
    assert isinstance(layer, nn.Module)
    size = getattr(layer, "hidden_size", None) or getattr(layer, "embed_dim", None)
    if size is None:
        called = [getattr(module_of(graph, n), "weight", None) for n in graph.nodes if n.op == "call_module"]
        vectors = [w for w in called if isinstance(w, torch.Tensor) and w.dim() == 1]
        size = vectors[0].numel() if vectors else next(p for p in layer.parameters() if p.dim() == 2).shape[-1]
    return int(size)


def _flattenings(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(reshape or view node, its input) for x.reshape(-1, size) and y.view(x.shape)."""
    found = []
    for node in graph.nodes:
        if node.op != "call_method" or node.target not in ("reshape", "view"):
            continue
        source, *shape = node.args
        flat = len(shape) == 2 and shape[0] == -1
        back = len(shape) == 1 and isinstance(shape[0], fx.Node) and shape[0].target is getattr
        if flat or back:
            found.append((node, source))
    return found


def _remove_flattening(graph: fx.Graph, sites: list[Site]) -> bool:
    inside = {node for site in sites for node in site.nodes}
    pairs = [(node, source) for node, source in _flattenings(graph) if node not in inside]
    if not pairs or not sites:
        return False
    for node, source in pairs:
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    remove_dead_nodes(graph)
    graph.lint()
    return True


def scored_module(layer: nn.Module, site: Site) -> nn.Module:
    """What a site is scored at: its attention or MLP; where only the whole branch is known, what the branch adds."""
    return nn.Identity() if site.whole else layer.get_submodule(str(site.mixer.target))


def site_name(site: Site, sites: list[Site]) -> str:
    """Name of a site within its layer: its kind, numbered where a layer has several."""
    same = [s for s in sites if s.kind == site.kind]
    return site.kind if len(same) == 1 else f"{site.kind}_{same.index(site)}"


def site_names(layer: nn.Module) -> list[tuple[str, SiteKind]]:
    """(name, kind) of a decoder layer's sites."""
    sites, _ = find_sites(capture(layer, ABSENT_IN_TRAINING))
    return [(site_name(site, sites), site.kind) for site in sites]
