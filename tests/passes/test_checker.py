"""The checker, on graphs broken on purpose."""

import pytest
import torch
from layers import Layer, rewrite_of
from torch import nn

from lemo_fx.errors import GraphCheckError
from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.kernels.eliminate.op import eliminate_op
from lemo_fx.kernels.restore.op import restore_op
from lemo_fx.passes import pipeline
from lemo_fx.passes.checker import check
from lemo_fx.passes.insert_elimination import insert_elimination
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.pipeline import PASSES, run_passes
from lemo_fx.passes.rewrite import META


def finished(treatments=("skip", "skip")):
    rewrite = rewrite_of(Layer(), treatments)
    run_passes(rewrite)
    check(rewrite, "nothing", finished=True)
    return rewrite


class TestTheChecker:
    def refuses(self, rewrite, match):
        with pytest.raises(GraphCheckError, match=match) as error:
            check(rewrite, "the break", finished=True)
        assert "after the break" in str(error.value)

    def node(self, rewrite, target):
        return next(n for n in rewrite.graph.nodes if n.target is target)

    def test_an_elimination_that_is_never_restored(self):
        rewrite = finished()
        restored = self.node(rewrite, restore_op)
        restored.replace_all_uses_with(restored.args[0])
        rewrite.graph.erase_node(restored)
        self.refuses(rewrite, "no restore brings back")

    def test_rows_restored_at_other_tokens(self):
        rewrite = finished()
        one, two = (n for n in rewrite.graph.nodes if n.target is restore_op)
        one.args, two.args = (*one.args[:2], two.args[2]), (*two.args[:2], one.args[2])
        with pytest.raises(GraphCheckError):
            check(rewrite, "the break", finished=True)

    def test_rows_restored_twice(self):
        rewrite = finished()
        restored = self.node(rewrite, restore_op)
        with rewrite.graph.inserting_after(restored):
            again = rewrite.graph.call_function(restore_op, (restored, *restored.args[1:]))
        restored.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
        self.refuses(rewrite, "restore")

    def test_the_stream_added_to_itself(self):
        rewrite = finished()
        restored = self.node(rewrite, restore_op)
        restored.args = (restored.args[0], restored.args[0], restored.args[2])
        self.refuses(rewrite, "adds the stream to itself")

    def test_the_input_restored_instead_of_a_branch(self):
        rewrite = finished()
        last = [n for n in rewrite.graph.nodes if n.target is restore_op][-1]
        last.args = (last.args[0], rewrite.entry, last.args[2])
        self.refuses(rewrite, "own input")

    def test_a_module_that_the_layer_lacks(self):
        rewrite = finished()
        next(n for n in rewrite.graph.nodes if n.op == "call_module").target = "nowhere"
        self.refuses(rewrite, "calls nowhere")

    def test_a_function_that_nobody_made(self):
        rewrite = finished()
        next(n for n in rewrite.graph.nodes if n.op == "get_attr").target = "lemo_nothing"
        self.refuses(rewrite, "reads lemo_nothing")

    def test_a_mark_left_over(self):
        rewrite = finished()
        self.node(rewrite, eliminate_op).meta[META] = "mark"
        self.refuses(rewrite, "still marked")

    def test_a_branch_that_is_still_added(self, monkeypatch):
        monkeypatch.setattr("lemo_fx.passes.insert_restoration.remove_dead_nodes", lambda graph: 0)
        rewrite = rewrite_of(Layer())
        insert_scores(rewrite)
        insert_elimination(rewrite)
        insert_restoration(rewrite)
        branch = rewrite.sites[0].site.branch
        restored = next(n for n in rewrite.graph.nodes if n.target is restore_op)
        with rewrite.graph.inserting_after(restored):
            twice = rewrite.graph.call_function(torch.add, (restored, branch))
        restored.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
        remove_dead_nodes(rewrite.graph)
        with pytest.raises(GraphCheckError, match=r"of the branch mlp_0 is still there"):
            check(rewrite, "the break")

    def test_eliminated_rows_added_without_a_restore(self):
        rewrite = finished()
        output = rewrite.graph.output_node()
        rows = self.node(rewrite, eliminate_op)
        with rewrite.graph.inserting_before(output):
            output.args = (rewrite.graph.call_function(torch.add, (output.args[0], rows)),)
        self.refuses(rewrite, "returns eliminated rows")

    def test_a_whole_branch_restored_as_if_it_were_rows(self):
        rewrite = finished()
        restored = self.node(rewrite, restore_op)
        with rewrite.graph.inserting_before(restored):
            whole = rewrite.graph.call_module("first", (restored.args[0],))
        restored.args = (restored.args[0], whole, restored.args[2])
        self.refuses(rewrite, "of another length")

    def test_a_choice_within_a_region(self):
        rewrite = rewrite_of(Layer())
        insert_scores(rewrite)
        insert_elimination(rewrite)
        chosen = rewrite.sites[0].tokens
        chosen.meta[META] = rewrite.sites[0].output.meta[META]
        with pytest.raises(GraphCheckError, match="chooses blocks within the region lemo_mlp_0_branch"):
            check(rewrite, "the break")

    def test_a_choice_within_a_function(self):
        rewrite = finished()
        body = rewrite.functions["lemo_mlp_0_branch"]
        output = body.output_node()
        with body.inserting_before(output):
            output.args = (body.call_module("lemo_mlp_0_select", (output.args[0],)),)
        self.refuses(rewrite, "lemo_mlp_0_branch chooses blocks")

    @pytest.mark.parametrize("change", ["module", "class", "attribute", "parameter"])
    def test_a_pass_that_changes_the_layer(self, change, monkeypatch):
        def meddle(rewrite):
            layer = rewrite.layer
            if change == "module":
                layer.add_module("more", nn.Linear(1, 1))
            elif change == "class":
                layer.first.__class__ = nn.Bilinear
            elif change == "attribute":
                layer.scale = 2
            else:
                layer.second.weight = nn.Parameter(layer.second.weight.detach())
            return 1

        monkeypatch.setattr(pipeline, "PASSES", (*PASSES[:2], meddle, *PASSES[2:]))
        with pytest.raises(GraphCheckError, match="after meddle: the pass changed the layer itself"):
            run_passes(rewrite_of(Layer()))

    def test_every_pass_is_checked(self, monkeypatch):
        def adds_to_itself(rewrite):
            restored = self.node(rewrite, restore_op)
            restored.args = (restored.args[0], restored.args[0], restored.args[2])
            return 1

        monkeypatch.setattr(pipeline, "PASSES", (*PASSES[:3], adds_to_itself, *PASSES[3:]))
        with pytest.raises(GraphCheckError, match="after adds_to_itself"):
            run_passes(rewrite_of(Layer()))

    def test_a_graph_out_of_order(self):
        rewrite = finished()
        nodes = list(rewrite.graph.nodes)
        nodes[-2].append(self.node(rewrite, eliminate_op))
        self.refuses(rewrite, "before")

    def test_all_is_well(self):
        for treatments in (("skip", "skip"), ("exact", None), (None, None)):
            finished(treatments)
