"""The invariants of passes/README.md, checked after every pass and tested on graphs broken on purpose."""

import operator

import networkx as nx
from torch import fx

from lemo_fx.errors import GraphCheckError
from lemo_fx.kernels.eliminate.op import eliminate_op
from lemo_fx.kernels.restore.op import restore_exact, restore_op
from lemo_fx.passes.rewrite import META, LayerRewrite, Region, inventory
from lemo_fx.runtime.select import SelectBlocks


def check(rewrite: LayerRewrite, after: str, finished: bool = False) -> None:
    """Raise GraphCheckError if the graph is malformed after a pass; `finished` also asks for what the end must hold."""
    graph = rewrite.graph
    owner, graph.owning_module = graph.owning_module, None
    try:
        graph.lint()
    except RuntimeError as error:
        raise GraphCheckError(f"after {after}: {error}") from error
    finally:
        graph.owning_module = owner
    for node in graph.nodes:
        _check_target(rewrite, node, after)
        if finished and node.target is eliminate_op and not _restored(node):
            raise GraphCheckError(
                f"after {after}: {node} eliminates tokens that no restore brings back, or more than one"
            )
        if node.target in (restore_op, restore_exact):
            _check_restore(node, after)
        if finished and node.meta.get(META) is not None:
            raise GraphCheckError(f"after {after}: {node} is still marked as part of a region")
        _check_recomputed(rewrite, node, after)
    for name, body in rewrite.functions.items():
        for node in body.nodes:
            if _selects(rewrite, node):
                raise GraphCheckError(f"after {after}: {name} chooses blocks ({node}), and may run a second time")
    _check_length(rewrite, after)
    _check_replaced(rewrite, after)
    if rewrite.untouched != inventory(rewrite.layer):
        raise GraphCheckError(f"after {after}: the pass changed the layer itself; only install may")


def _check_target(rewrite: LayerRewrite, node: fx.Node, after: str) -> None:
    if node.op == "call_module" and str(node.target) not in rewrite.modules:
        try:
            rewrite.layer.get_submodule(str(node.target))
        except AttributeError as error:
            raise GraphCheckError(f"after {after}: {node} calls {node.target}, which the layer lacks") from error
    if node.op == "get_attr" and str(node.target) not in (*rewrite.functions, *rewrite.modules):
        try:
            operator.attrgetter(str(node.target))(rewrite.layer)
        except AttributeError as error:
            raise GraphCheckError(f"after {after}: {node} reads {node.target}, which the layer lacks") from error


def _restored(node: fx.Node) -> bool:
    """Whether a restore adds back exactly what was taken out with these tokens."""
    tokens = node.args[1]
    assert isinstance(tokens, fx.Node)
    takes = [u for u in tokens.users if u.target is eliminate_op]
    gives = [u for u in tokens.users if u.target in (restore_op, restore_exact) and u.args[-1] is tokens]
    return len(gives) == len(takes) and len(node.users) >= 1


def _check_restore(node: fx.Node, after: str) -> None:
    stream, rows = node.args[0], node.args[-2]
    if stream is rows:
        raise GraphCheckError(f"after {after}: {node} adds the stream to itself")
    if isinstance(rows, fx.Node) and rows.op == "placeholder":
        raise GraphCheckError(f"after {after}: {node} restores the layer's own input instead of a branch")


def _selects(rewrite: LayerRewrite, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(rewrite.modules.get(str(node.target)), SelectBlocks)


def _check_recomputed(rewrite: LayerRewrite, node: fx.Node, after: str) -> None:
    """A selection is no part of a region, which becomes a function that may run a second time."""
    if _selects(rewrite, node) and isinstance(node.meta.get(META), Region):
        raise GraphCheckError(f"after {after}: {node} chooses blocks within the region {node.meta[META].name}")


def _check_length(rewrite: LayerRewrite, after: str) -> None:
    """What the layer returns has S tokens: eliminated rows come back through a restore, and through nothing else."""
    short: set[fx.Node] = set()
    for node in rewrite.graph.nodes:
        body = rewrite.functions.get(str(node.target)) if node.op == "get_attr" else None
        if node.target is eliminate_op or (body and any(inner.target is eliminate_op for inner in body.nodes)):
            short.add(node)
        elif node.target in (restore_op, restore_exact):
            # restore(stream, rows, tokens); restore_exact(stream, values, rows, tokens)
            if node.args[0] in short or (node.target is restore_op and node.args[1] not in short):
                raise GraphCheckError(f"after {after}: {node} restores to, or from, a value of another length")
        elif any(source in short for source in node.all_input_nodes):
            short.add(node)
        if node.op == "output" and node in short:
            raise GraphCheckError(f"after {after}: the layer returns eliminated rows, without a restore")


def _check_replaced(rewrite: LayerRewrite, after: str) -> None:
    """Where a residual add is gone, so are the branches that were planned: what is left of one would be added twice."""
    alive = set(rewrite.graph.nodes)
    branches = {planned.site.branch for planned in rewrite.sites}
    unplanned = [a for p in rewrite.sites for a in p.site.addends if a not in branches]
    flow = nx.DiGraph((source, user) for source in alive for user in source.users)
    needed = {*unplanned}.union(*(nx.ancestors(flow, addend) for addend in unplanned))
    for planned in rewrite.sites:
        if planned.site.add not in alive:
            left = next((n for n in planned.site.nodes if n in alive and n not in needed), None)
            if left is not None:
                raise GraphCheckError(f"after {after}: {left} of the branch {planned.name} is still there")
