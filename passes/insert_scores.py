"""Give every sparse site a score per token block (LeMo section 4.1; predicted scores: section 4.2).

before:  n = norm(x);  a = attention(n, mask);  y = x + a
after:   n' = norm(x);  scores = lemo_attention_score(n', mask)          # without gradient
         n = norm(x);  a = attention(n, mask);  y = x + a
A predictor reads the stream, since it does without the norm: scores = lemo_attention_predictor(x, mask).
An MLP's predictor only says which tokens may hold a block's maximum; those are measured:
         tokens = lemo_mlp_predictor(x, mask);  n' = norm(x[tokens]);  scores = lemo_mlp_score(n')
Where attention learns of documents from position_ids or cu_seq_lens (flash attention), it gets those too.
A "shared" site gets none: it takes the tokens of the layer's attention.
"""

from torch import fx

from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, Region, call, clone, part_name
from lemo_fx.runtime import kept


def insert_scores(rewrite: LayerRewrite) -> int:
    """Returns the number of sites that got a score."""
    changed = 0
    for planned in rewrite.sites:
        if planned.treatment is None or planned.score == "shared":
            continue
        with rewrite.graph.inserting_before(planned.site.add):
            planned.scores = _score(rewrite, planned)
        changed += 1
    return changed


def _score(rewrite: LayerRewrite, planned: PlannedSite) -> fx.Node:
    target, name = part_name(planned.name, "score"), f"{planned.name}_scores"
    predictor = part_name(planned.name, "predictor")
    region = Region(part_name(planned.name, "scores"), gradient=False)
    if planned.score in ("random", "step"):
        return call(rewrite.graph, target, (rewrite.entry,), name)
    site = planned.site
    if planned.score == "predicted" and site.kind == "attention":
        args: tuple = (site.stream, rewrite.argument("attention_mask"))
        if kept.numbers_documents(site.mixer, rewrite.graph):
            args += (rewrite.argument("position_ids"), rewrite.others)
        return call(rewrite.graph, predictor, args, name)
    before_mixer = (
        list(site.nodes)
        if site.whole
        else [n for n in site.nodes[: site.nodes.index(site.mixer)] if _feeds(n, site.mixer)]
    )
    values = {}
    if planned.score == "predicted":
        args = (site.stream, rewrite.argument("attention_mask"))
        tokens = call(rewrite.graph, predictor, args, f"{planned.name}_candidates")
        name_of_rows = f"{planned.name}_candidate_rows"
        values[site.stream] = call(rewrite.graph, kept.take, (site.stream, tokens), name_of_rows, region)
    copies = clone(rewrite.graph, before_mixer, values, region, "scored")
    if site.whole:
        return call(rewrite.graph, target, (copies[site.branch],), name, region)
    args, kwargs = fx.map_arg((site.mixer.args, dict(site.mixer.kwargs)), lambda n: copies.get(n, n))
    return call(rewrite.graph, target, args, name, region, kwargs)


def _feeds(node: fx.Node, mixer: fx.Node) -> bool:
    return mixer in node.users or any(_feeds(user, mixer) for user in node.users)
