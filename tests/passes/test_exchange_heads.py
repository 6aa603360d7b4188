"""Every attention call of a layer is exchanged, and nobody takes the mask of a part for that of the whole."""

import pytest
from tiny import tiny
from torch import nn

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture
from lemo_fx.graph.sites import find_sites
from lemo_fx.passes.checker import check
from lemo_fx.passes.exchange_heads import exchange_heads
from lemo_fx.passes.fuse_shared_selection import fuse_shared_selection
from lemo_fx.passes.insert_elimination import insert_elimination
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.outline_branches import outline_branches
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite
from lemo_fx.runtime import parts, sequence
from lemo_fx.runtime.scores import RandomScore
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.step import Step

GROUP = parts.SequenceGroup("nobody", 0, 2)


def rewrite_of(treatment, group=GROUP, layer=None):
    layer = tiny("llama").model.layers[0] if layer is None else layer
    graph = capture(layer, ABSENT_IN_TRAINING)
    sites, _ = find_sites(graph)
    planned = [PlannedSite(site.kind, site, treatment, "random") for site in sites]
    rewrite = LayerRewrite(layer, graph, planned, group=group)
    for number, site in enumerate(planned if treatment else ()):
        rewrite.modules[f"lemo_{site.name}_score"] = RandomScore(number, 4)
        rewrite.modules[f"lemo_{site.name}_select"] = SelectBlocks(4, 0.5, Step())
    for run in (insert_scores, insert_elimination, insert_restoration):
        run(rewrite)
    return rewrite


def called(rewrite, target):
    return [node for node in rewrite.graph.nodes if node.target == target]


@pytest.mark.parametrize(("treatment", "calls"), [("skip", 1), ("exact", 2), ("stand_in", 1), (None, 1)])
def test_every_attention_call_is_exchanged(treatment, calls):
    rewrite = rewrite_of(treatment)
    if treatment == "stand_in":
        rewrite.modules |= {f"lemo_{kind}_stand_in": nn.Identity() for kind in ("attention", "mlp")}
    assert len(called(rewrite, "self_attn")) == calls
    assert exchange_heads(rewrite) == calls
    assert not called(rewrite, "self_attn")
    exchanged = called(rewrite, "lemo_attention_exchange")
    told = [node.kwargs["lemo_told"] for node in exchanged if node.op == "call_module"]
    assert len(told) == calls
    # Kept rows are told by their tokens; all rows of a part, and those of a dense branch, are all there are.
    tokens = [node.args[2] for node in told]
    assert [one for one in tokens if one is not None] == ([rewrite.sites[0].tokens] if treatment else [])
    check(rewrite, "exchange_heads")
    assert exchange_heads(rewrite) == 0, "idempotent"
    fuse_shared_selection(rewrite)
    outline_branches(rewrite)
    check(rewrite, "the end", finished=True)
    inside = [node for body in rewrite.functions.values() for node in body.nodes if node.target is sequence.told]
    assert not inside, "what a recompute must find again is told outside of it"


def test_only_the_choice_reads_the_mask_of_a_part():
    rewrite = rewrite_of("exact")
    exchange_heads(rewrite)
    mask = rewrite.argument("attention_mask")
    assert {user.target for user in mask.users} == {sequence.told, sequence.own_mask, parts.mask_within}
    own = next(node for node in rewrite.graph.nodes if node.target is sequence.own_mask)
    assert {user.target for user in own.users} == {"lemo_attention_select", "lemo_mlp_select"}


def test_nothing_to_do_without_a_group():
    rewrite = rewrite_of("exact", group=None)
    before = str(rewrite.graph)
    assert exchange_heads(rewrite) == 0
    assert str(rewrite.graph) == before


def test_a_layer_that_takes_no_mask():
    class Layer(nn.Module):
        gradient_checkpointing = False

        def __init__(self):
            super().__init__()
            self.norm, self.first = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.first(self.norm(x))

    with pytest.raises(UnsupportedModelError, match="takes no attention_mask"):
        exchange_heads(rewrite_of(None, layer=Layer()))
