"""Add every branch back to the residual stream at its tokens' places.

before:  a' = attention(...);  a = attention(norm(x), ...);  y = x + a
after:   a' = attention(...);  y = restore(x, a', tokens)
`exact`: y = restore_exact(x, forward, a', tokens).  `stand_in`: one more restore, for the dropped tokens' rows.
Parallel branches are restored one after the other.
"""

import dataclasses
import operator
from typing import Any

from torch import fx

from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.kernels.restore.op import restore_exact, restore_op
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, call


def insert_restoration(rewrite: LayerRewrite) -> int:
    """Returns the number of residual adds that were replaced."""
    adds = list(dict.fromkeys(planned.site.add for planned in rewrite.sites))
    for add in adds:
        planned = [p for p in rewrite.sites if p.site.add is add]
        stream = planned[0].site.carrier
        with rewrite.graph.inserting_before(add):
            for site in planned:
                stream = _restore(rewrite, site, stream)
            for addend in planned[0].site.addends:
                if all(addend is not p.site.branch for p in planned):
                    stream = call(rewrite.graph, operator.add, (stream, addend), f"{addend.name}_added")
        add.replace_all_uses_with(stream)
        for later in rewrite.sites:
            places: dict[str, Any] = {
                name: stream for name in ("stream", "carrier") if getattr(later.site, name) is add
            }
            later.site = dataclasses.replace(later.site, **places)
    # The branches as they were.
    remove_dead_nodes(rewrite.graph)
    return len(adds)


def _restore(rewrite: LayerRewrite, planned: PlannedSite, stream: fx.Node) -> fx.Node:
    graph, name = rewrite.graph, f"{planned.name}_restored"
    if planned.treatment is None:
        return call(graph, operator.add, (stream, planned.output), name)
    if planned.treatment == "exact":
        both = (stream, planned.rest, planned.output, planned.tokens)
        return call(graph, restore_exact, both, name, kwargs={"dropped": planned.dropped} if planned.dropped else {})
    if planned.rest is not None:
        args = (stream, planned.rest, planned.dropped)
        stream = call(graph, restore_op, args, f"{planned.name}_rest_restored")
    return call(graph, restore_op, (stream, planned.output, planned.tokens), name)
