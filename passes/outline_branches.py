"""Make one function of every marked region, so that it can run without gradient or be recomputed in the backward.

before:  rows = eliminate(x, t);  n = norm(rows);  a = attention(n, ...);  y = restore(x, a, t)
after:   rows = eliminate(x, t);  a = branch(self.lemo_attention_branch, ..., rows, ...);  y = restore(x, a, t)
         lemo_attention_branch(rows, ...): n = norm(rows);  return attention(n, ...)
The functions become methods of the rewritten layer's class: what they call is looked up on the layer at run time.
"""

import operator
from collections.abc import Callable

from torch import fx

from lemo_fx.errors import GraphCheckError
from lemo_fx.kernels.float8_linear.op import Float8Switch
from lemo_fx.passes.rewrite import META, LayerRewrite, Region, call
from lemo_fx.runtime import branch

FLOAT8 = "lemo_float8"
"""Attribute of a rewritten layer: the switch of its frozen linear layers."""


def outline_branches(rewrite: LayerRewrite) -> int:
    """Returns the number of functions made."""
    regions: dict[Region, list[fx.Node]] = {}
    for node in rewrite.graph.nodes:
        if isinstance(node.meta.get(META), Region):
            regions.setdefault(node.meta[META], []).append(node)
    for region, nodes in regions.items():
        _outline(rewrite, region, nodes)
    return len(regions)


def _outline(rewrite: LayerRewrite, region: Region, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    inputs = list(dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside))
    inputs.sort(key=lambda node: node.op == "placeholder")
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    if not outputs or (region.token_wise and len(outputs) > 1):
        raise GraphCheckError(f"region {region.name} has {len(outputs)} results ({outputs}); one is needed")
    body = fx.Graph()
    values = {node: body.placeholder(node.name) for node in inputs}
    for node in nodes:
        values[node] = body.node_copy(node, lambda n: values[n])
        values[node].meta.pop(META, None)
    results = tuple(values[node] for node in outputs)
    body.output(results if len(results) > 1 else results[0])
    rewrite.functions[region.name] = body

    name = region.name.removeprefix("lemo_")
    with rewrite.graph.inserting_before(nodes[-1]):
        function = rewrite.graph.create_node("get_attr", region.name, name=region.name)
        length = (rewrite.length(),) if region.token_wise else ()
        if region.gradient:
            switch = rewrite.graph.create_node("get_attr", "gradient_checkpointing")
            run: Callable = branch.token_wise_branch if region.token_wise else branch.branch
            share = (region.share,) if region.token_wise else ()
            args: tuple = (function, switch, rewrite.recompute, *length, *share, *inputs)
        else:
            run = branch.token_wise_without_gradient if region.token_wise else branch.without_gradient
            args = (function, *length, *inputs)
        precision = {}
        if region.float8:
            rewrite.modules.setdefault(FLOAT8, Float8Switch())
            precision["float8"] = rewrite.graph.create_node("get_attr", FLOAT8)
        result = call(rewrite.graph, run, args, name, kwargs=precision)
        for number, output in enumerate(outputs):
            one = result
            if len(outputs) > 1:
                one = call(rewrite.graph, operator.getitem, (result, number), f"{name}_{number}")
            output.replace_all_uses_with(one)
    for node in reversed(nodes):
        rewrite.graph.erase_node(node)
