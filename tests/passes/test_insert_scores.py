"""Scores in the graph."""

from layers import Layer, rewrite_of

from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.rewrite import META


def test_a_measured_mlp_is_scored_from_its_normed_input():
    rewrite = rewrite_of(Layer(), score="measured")
    assert insert_scores(rewrite) == 2
    scores = next(n for n in rewrite.graph.nodes if n.target == "lemo_mlp_0_score")
    assert scores.args[0].target == "norm"
    assert scores.meta[META].gradient is False
    assert scores.args[0].meta[META] == scores.meta[META]
