"""Two sites that keep the same tokens eliminate once; sites that must not, do not."""

from layers import Layer, count, rewrite_of

from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.kernels.eliminate.op import eliminate_op
from lemo_fx.kernels.restore.op import restore_op
from lemo_fx.passes.checker import check
from lemo_fx.passes.fuse_shared_selection import fuse_shared_selection
from lemo_fx.passes.insert_elimination import insert_elimination
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.outline_branches import outline_branches


def test_shared_choices_are_fused_once():
    layer = Layer()
    rewrite = rewrite_of(layer)
    insert_scores(rewrite)
    insert_elimination(rewrite)
    insert_restoration(rewrite)
    one, two = (n for n in rewrite.graph.nodes if str(n.target).endswith("_select"))
    two.replace_all_uses_with(one)
    remove_dead_nodes(rewrite.graph)
    assert count(rewrite.graph, restore_op, eliminate_op) == 4
    assert fuse_shared_selection(rewrite) == 1
    remove_dead_nodes(rewrite.graph)
    assert count(rewrite.graph, restore_op, eliminate_op) == 2
    assert fuse_shared_selection(rewrite) == 0, "idempotent"
    assert outline_branches(rewrite) == 1
    check(rewrite, "the end", finished=True)


def test_exact_restores_are_not_fused():
    rewrite = rewrite_of(Layer(), ("exact", "skip"))
    for run in (insert_scores, insert_elimination, insert_restoration):
        run(rewrite)
    assert fuse_shared_selection(rewrite) == 0
