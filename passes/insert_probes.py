"""Let a profiling run see what goes into and comes out of every branch; the layer computes what it always did.

before:  n = norm(x);  a = attention(n, mask);  y = x + a
after:   n = norm(x);  a = attention(n, mask);  lemo_attention_probe(n, a);  y = x + a
scored:  ...  scores = lemo_attention_score(n', mask);  lemo_attention_probe(n, a, x, scores);  y = x + a
Not part of the pipeline: `lemo_fx.fitting.profile` runs it alone on a fresh capture, after `insert_scores` where the
true scores are wanted.
"""

from torch import fx

from lemo_fx.passes.rewrite import META, LayerRewrite, call, normed_input, part_name


def insert_probes(rewrite: LayerRewrite) -> int:
    """Returns the number of branches that are observed."""
    for planned in rewrite.sites:
        site = planned.site
        seen: tuple[fx.Node | None, ...] = (normed_input(rewrite, site), site.branch)
        if planned.scores is not None:
            seen += (site.stream, planned.scores)
        # Nobody uses the result, so no dead-code elimination may follow.
        with rewrite.graph.inserting_before(site.add):
            call(rewrite.graph, part_name(planned.name, "probe"), seen, f"{planned.name}_seen")
    # A profiling run has no gradient: its regions need not become functions.
    for node in rewrite.graph.nodes:
        node.meta.pop(META, None)
    return len(rewrite.sites)
