"""Where two sites of a layer keep the same tokens, eliminate once and restore once.

before:  rows = eliminate(x, t);  h = restore(x, a(rows), t);  more = eliminate(h, t);  y = restore(h, m(more), t)
after:   rows = eliminate(x, t);  more = rows + a(rows);  y = restore(x, a(rows) + m(more), t)
The stream between the two sites is then never materialised, and a recompute needs the kept rows once instead of twice.
"""

import dataclasses
import operator

from torch import fx

from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.kernels.eliminate.op import eliminate_op
from lemo_fx.kernels.restore.op import restore_op
from lemo_fx.passes.rewrite import META, LayerRewrite, call


def fuse_shared_selection(rewrite: LayerRewrite) -> int:
    """Returns the number of pairs that were fused."""
    changed = 0
    for inner in [n for n in rewrite.graph.nodes if n.target is restore_op]:
        stream, _, tokens = inner.args
        takes = [u for u in inner.users if u.target is eliminate_op and u.args[1] is tokens]
        gives = [u for u in inner.users if u.target is restore_op and u.args[0] is inner and u.args[2] is tokens]
        rows = next((n for n in rewrite.graph.nodes if n.target is eliminate_op and n.args == (stream, tokens)), None)
        if len(takes) != 1 or len(gives) != 1 or len(inner.users) != 2 or rows is None:
            continue
        _fuse(rewrite, rows, inner, takes[0], gives[0])
        changed += 1
    remove_dead_nodes(rewrite.graph)
    return changed


def _fuse(rewrite: LayerRewrite, rows: fx.Node, inner: fx.Node, take: fx.Node, give: fx.Node) -> None:
    attended = inner.args[1]
    assert isinstance(attended, fx.Node)
    graph = rewrite.graph
    _, added, tokens = give.args
    assert isinstance(added, fx.Node)
    # The branches may differ in what their tokens may do, never in precision: they share a budget.
    region = dataclasses.replace(attended.meta[META], name="lemo_layer_branch", token_wise=False)
    with graph.inserting_before(take):
        middle = call(graph, operator.add, (rows, attended), "rows_between", region)
    take.replace_all_uses_with(middle)
    with graph.inserting_before(give):
        total = call(graph, operator.add, (attended, added), "rows_added", region)
    give.args = (inner.args[0], total, tokens)
    joined = {attended.meta[META].name, added.meta[META].name}
    for node in graph.nodes:
        mark = node.meta.get(META)
        if mark is not None and mark.name in joined:
            node.meta[META] = region
