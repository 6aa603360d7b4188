"""The passes in their order: how often each applies, and that a layer with every token kept computes the same."""

import pytest
import torch
from layers import PARALLEL, Layer, count, output_of, rewrite_of

from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.kernels.eliminate.op import eliminate_op
from lemo_fx.kernels.restore.op import restore_exact, restore_op
from lemo_fx.passes.checker import check
from lemo_fx.passes.fuse_shared_selection import fuse_shared_selection
from lemo_fx.passes.insert_elimination import insert_elimination
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.outline_branches import outline_branches
from lemo_fx.passes.pipeline import PASSES, run_passes
from lemo_fx.passes.rewrite import META
from lemo_fx.runtime import branch
from lemo_fx.runtime.select import SelectBlocks


@pytest.mark.parametrize(
    ("treatments", "expected"),
    [(("skip", "skip"), 2), (("skip", None), 1), ((None, None), 0), (("exact", "skip"), 2)],
)
@pytest.mark.parametrize("layer", [Layer, *PARALLEL])
def test_counts_of_every_pass(layer, treatments, expected):
    rewrite = rewrite_of(layer(), treatments)
    assert insert_scores(rewrite) == expected
    assert count(rewrite.graph, "lemo_mlp_0_score", "lemo_mlp_1_score") == expected
    assert insert_elimination(rewrite) == expected
    exact = treatments.count("exact")
    assert count(rewrite.graph, eliminate_op) == expected
    adds = 2 if layer is Layer else 1
    assert insert_restoration(rewrite) == adds
    remove_dead_nodes(rewrite.graph)
    assert (count(rewrite.graph, restore_op), count(rewrite.graph, restore_exact)) == (expected - exact, exact)
    assert fuse_shared_selection(rewrite) == 0, "two choices of their own"
    assert outline_branches(rewrite) == 2 + exact
    assert outline_branches(rewrite) == 0, "idempotent"
    assert count(rewrite.graph, branch.token_wise_without_gradient) == exact
    assert not any(META in node.meta for node in rewrite.graph.nodes)
    check(rewrite, "the end", finished=True)


def test_the_pipeline_reports_counts_and_is_observed():
    seen = []
    changes = run_passes(rewrite_of(Layer()), lambda name, rewrite: seen.append((name, len(rewrite.graph.nodes))))
    assert [name for name, _ in seen] == ["captured", *(p.__name__ for p in PASSES)]
    assert changes == {
        "insert_scores": 2,
        "insert_elimination": 2,
        "insert_restoration": 2,
        "exchange_heads": 0,
        "fuse_shared_selection": 0,
        "outline_branches": 2,
    }


@pytest.mark.parametrize("layer", [Layer, *PARALLEL])
def test_a_layer_with_every_token_kept_computes_the_same(layer):
    module = layer()
    expected = module(x := torch.randn(2, 16, 8))
    rewrite = rewrite_of(module)
    for part in rewrite.modules.values():
        if isinstance(part, SelectBlocks):
            part.set_keep(1.0)
    run_passes(rewrite)
    torch.testing.assert_close(output_of(rewrite, x), expected)
