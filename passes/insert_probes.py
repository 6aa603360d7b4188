"""Let a profiling run see what goes into and comes out of every branch; the layer computes what it always did.

before:  n = norm(x);  a = attention(n, mask);  y = x + a
after:   n = norm(x);  a = attention(n, mask);  seen = lemo_attention_probe(n, a);  y = x + seen
scored:  ...  scores = lemo_attention_score(n', mask);  seen = lemo_attention_probe(n, a, x, scores);  y = x + seen
Not part of the pipeline: `lemo_fx.fit` runs it alone on a fresh capture, after `insert_scores` where it trains
predictors on the true scores.
"""

from lemo_fx.passes.rewrite import META, LayerRewrite, call, normed_input


def insert_probes(rewrite: LayerRewrite) -> int:
    """Returns the number of branches that are observed."""
    for planned in rewrite.sites:
        site = planned.site
        source = normed_input(rewrite, site)
        with rewrite.graph.inserting_before(site.add):
            seen = call(rewrite.graph, f"lemo_{planned.name}_probe", (), f"{planned.name}_seen")
        site.branch.replace_all_uses_with(seen)
        scored = (site.stream, planned.scores) if planned.scores is not None else ()
        seen.args = (source, site.branch, *scored)
    # A profiling run has no gradient: its regions need not become functions.
    for node in rewrite.graph.nodes:
        node.meta.pop(META, None)
    return len(rewrite.sites)
