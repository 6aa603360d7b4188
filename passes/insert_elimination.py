"""Let every sparse site's branch run on its kept tokens only (LeMo section 4.1, token elimination).

before:  n = norm(x);  a = attention(n, mask, rope);  y = x + a
after:   tokens = lemo_attention_select(scores, x);  rows = eliminate(x, tokens)
         n' = norm(rows);  a' = attention(n', compact_mask(mask, tokens), compact_rows(rope, tokens))
         n = norm(x);  a = attention(n, mask, rope);  y = x + a           # replaced by insert_restoration

With `keys="every"` the kept queries attend to every key; its gradient ends at the attention's input:
         tokens = lemo_attention_select(scores, x);  n = gradient_at(norm(x), tokens)
         keys = lemo_attention_keys(n, mask, rope);  rows = eliminate(n, tokens)
         a' = lemo_attention_queries(keys, tokens, mask, rows, compact_mask(mask, tokens), compact_rows(rope, tokens))

What becomes of the other tokens: `skip` adds nothing; `stand_in` runs a linear map on them; `exact` runs the branch
itself without gradient (attention needs every token for that, an MLP the dropped ones, see rows_for_values).
"""

from collections.abc import Callable

from torch import fx

from lemo_fx.kernels.eliminate.op import eliminate_op, gradient_at
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, Region, call, clone, normed_input, part_name
from lemo_fx.runtime import branch, kept

COMPACT: dict[str, Callable] = {
    "attention_mask": kept.compact_mask,
    "position_embeddings": kept.compact_rows,
    "position_ids": kept.compact_positions,
}
"""How each layer argument that runs along the sequence follows the kept tokens."""


def compacting(argument: fx.Node) -> Callable | None:
    """How a layer argument follows the kept tokens by its name; None where that is not known."""
    if argument.op != "placeholder":
        return None
    return kept.compact_kwargs if str(argument.target).startswith("**") else COMPACT.get(str(argument.target))


def insert_elimination(rewrite: LayerRewrite) -> int:
    """Returns the number of sites whose branch now runs on kept tokens."""
    changed = 0
    for planned in rewrite.sites:
        with rewrite.graph.inserting_before(planned.site.add):
            if planned.treatment is None:
                copies = clone(rewrite.graph, planned.site.nodes, {}, _branch_region(planned), "dense")
                planned.output = copies[planned.site.branch]
                for node, user in planned.site.read_outside:
                    user.replace_input_with(node, copies[node])
                continue
            _eliminate(rewrite, planned)
        changed += 1
    return changed


def _branch_region(planned: PlannedSite) -> Region:
    name = part_name(planned.name, "branch")
    return Region(name, True, planned.site.token_wise, planned.float8, planned.share)


def _eliminate(rewrite: LayerRewrite, planned: PlannedSite) -> None:
    graph, site, name = rewrite.graph, planned.site, planned.name
    if planned.score == "shared":
        planned.tokens = next(p.tokens for p in rewrite.sites if p.site.kind == "attention" and p.tokens)
    else:
        mask = rewrite.argument("attention_mask")
        planned.tokens = call(graph, part_name(name, "select"), (planned.scores, rewrite.entry, mask), f"{name}_tokens")
    branch = _branch_region(planned)
    if planned.every_key:
        planned.output = _kept_queries(rewrite, planned, branch)
    else:
        rows = call(graph, eliminate_op, (site.stream, planned.tokens), f"{name}_rows")
        values = {site.stream: rows}
        if site.kind == "attention":
            values.update(_compact_context(rewrite, planned, branch))
        planned.output = clone(graph, site.nodes, values, branch, "kept")[site.branch]
    if planned.treatment != "skip":
        planned.rest = _rest(rewrite, planned)


def _kept_queries(rewrite: LayerRewrite, planned: PlannedSite, region: Region) -> fx.Node:
    """The branch on the kept tokens, their queries attending to the keys of every token."""
    graph, site, name = rewrite.graph, planned.site, planned.name
    position = site.nodes.index(site.mixer)
    inputs = [n for n in site.mixer.all_input_nodes if n is site.stream or n in site.nodes]
    every = clone(graph, site.nodes[:position], {}, region, "keys")
    rows: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        every[node] = call(graph, gradient_at, (every.get(node, node), planned.tokens), f"{node.name}_of_keys", region)
        rows[node] = call(graph, eliminate_op, (every[node], planned.tokens), f"{node.name}_rows", region)
    args, kwargs = fx.map_arg((site.mixer.args, dict(site.mixer.kwargs)), lambda n: every.get(n, n))
    keys = call(graph, part_name(name, "keys"), args, f"{name}_keys", region, kwargs)
    kept_ones = {**rows, **_compact_context(rewrite, planned, region)}
    args, kwargs = fx.map_arg((site.mixer.args, dict(site.mixer.kwargs)), lambda n: kept_ones.get(n, n))
    args = (keys, planned.tokens, rewrite.argument("attention_mask"), *args)
    mixed = call(graph, part_name(name, "queries"), args, f"{name}_queries", region, kwargs)
    after = [n for n in site.nodes[position + 1 :] if n not in inputs]
    return clone(graph, after, {site.mixer: mixed}, region, "kept")[site.branch]


def _compact_context(rewrite: LayerRewrite, planned: PlannedSite, region: Region) -> dict[fx.Node, fx.Node]:
    """The layer arguments that the attention call reads, each shortened to the kept tokens."""
    compact: dict[fx.Node, fx.Node] = {}
    length = rewrite.length()
    for argument in planned.site.mixer.all_input_nodes:
        function = compacting(argument)
        if function is None and argument.op == "placeholder" and argument is not rewrite.entry:
            # Planned only where it was seen to run along the sequence, or not to be a tensor.
            function = kept.compact_rows
        if function is not None:
            name = f"{argument.name.strip('_')}_kept"
            args: tuple = (argument, planned.tokens, length)
            if function in (kept.compact_positions, kept.compact_kwargs):
                args += (kept.numbers_documents(planned.site.mixer, rewrite.graph),)
            compact[argument] = call(rewrite.graph, function, args, name, region)
    return compact


def _rest(rewrite: LayerRewrite, planned: PlannedSite) -> fx.Node:
    graph, site, name = rewrite.graph, planned.site, planned.name
    exact, token_wise = planned.treatment == "exact", site.token_wise
    if not exact or token_wise:
        planned.dropped = call(graph, kept.dropped_tokens, (planned.tokens, rewrite.entry), f"{name}_dropped")
    if exact:
        region = Region(part_name(name, "forward"), False, token_wise, float8=rewrite.forward == "float8")
        values = {}
        if token_wise:
            # Where checkpointing keeps the products, the forward computes the kept rows' as well.
            recomputed = rewrite.recompute != "elementwise" and graph.create_node("get_attr", "gradient_checkpointing")
            args = (site.stream, planned.dropped, recomputed)
            values[site.stream] = call(graph, branch.rows_for_values, args, f"{name}_other_rows")
        return clone(graph, site.nodes, values, region, "forward")[site.branch]
    region = Region(part_name(name, "approximation"), gradient=False)
    rows = call(graph, eliminate_op, (site.stream, planned.dropped), f"{name}_dropped_rows", region)
    source = normed_input(rewrite, site)
    before = site.nodes[: site.nodes.index(source) + 1] if source is not site.stream else ()
    copies = clone(graph, before, {site.stream: rows}, region, "stand_in")
    return call(graph, part_name(name, "stand_in"), (copies.get(source, rows),), f"{name}_stand_in_rows", region)
