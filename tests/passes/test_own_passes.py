"""Passes of a user's own, which `transform` takes as an argument."""

import functools

import pytest
import torch
from tiny import batch, tiny

import lemo_fx
from lemo_fx import ConfigError, GraphCheckError, UnsupportedModelError
from lemo_fx.kernels.restore.op import restore_exact
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.pipeline import PASSES
from lemo_fx.passes.rewrite import META, call

AT = PASSES.index(insert_restoration) + 1


def among(*own):
    return (*PASSES[:AT], *own, *PASSES[AT:])


def calling(function, name="changed"):
    """A pass that puts a function behind what every branch adds, where it is not there already."""

    def passing(rewrite):
        changed = 0
        for node in [n for n in rewrite.graph.nodes if n.target is restore_exact]:
            stream, *added, tokens = node.args
            behind = []
            for value in added:
                with rewrite.graph.inserting_after(value):
                    behind.append(call(rewrite.graph, function, (value,), name, value.meta[META]))
            node.args = (stream, *behind, tokens)
            changed += 1
        return changed

    return passing


def same(x):
    return x * 1


@pytest.mark.parametrize(
    ("passes", "match"),
    [
        ((), "must hold insert_scores, insert_elimination"),
        (PASSES[::-1], "in this order"),
        ((*PASSES, PASSES[0]), "two functions named insert_scores"),
        (among(functools.partial(same)), "must be a function with a name"),
        (among("clamp"), r"passes\[3\]='clamp'"),
        ({"clamp": same}, "must be a tuple of functions, not dict"),
    ],
)
def test_what_cannot_be_run_is_refused(passes, match):
    model = tiny("llama")
    with pytest.raises(ConfigError, match=match):
        lemo_fx.transform(model, passes=passes)
    assert type(model.model.layers[0]).forward is type(tiny("llama").model.layers[0]).forward


def test_a_pass_that_changes_what_is_computed():
    """It is seen by running the layer."""
    model = tiny("llama", 2)
    with pytest.raises(UnsupportedModelError, match="off by"):
        lemo_fx.transform(model, passes=among(calling(torch.neg)))

    def at_attention(rewrite):
        attention = [s for s in rewrite.sites if s.site.kind == "attention"]
        return one(rewrite) if attention and attention[0].treatment else 0

    def one(rewrite):
        node = next(n for n in rewrite.graph.nodes if n.target is restore_exact)
        with rewrite.graph.inserting_before(node):
            node.update_arg(1, call(rewrite.graph, torch.neg, (node.args[1],), "negated"))
        return 1

    report = lemo_fx.report(lemo_fx.transform(model, passes=among(at_attention)))
    assert [s.eliminated for s in report.sites] == ["dense", "exact"] * 2
    assert "its values are off by" in report.sites[0].note


def test_a_pass_that_leaves_nodes_without_users():
    def forgetful(rewrite):
        node = next(n for n in rewrite.graph.nodes if n.target is restore_exact)
        with rewrite.graph.inserting_before(node):
            call(rewrite.graph, torch.neg, (node.args[0],), "unused")
        return 1

    with pytest.raises(GraphCheckError, match="nobody uses unused"):
        lemo_fx.transform(tiny("llama"), passes=(*PASSES, forgetful))


def test_a_pass_that_a_notebook_defines_anew_runs():
    """Both functions bear one name, so that the generated code of both is alike."""
    model = tiny("llama", 2)
    ran = []

    def define(number):
        def told(x):
            ran.append(number)
            return x * 1

        return told

    for number in (1, 2):
        ran.clear()
        lemo_fx.transform(model, passes=among(calling(define(number))))
        model(**batch(1, 48))
        assert set(ran) == {number}
        assert "passing: 4 changes in 2 layers" in lemo_fx.report(model).notes
    lemo_fx.transform(model)
    assert not any(note.startswith("passing") for note in lemo_fx.report(model).notes), "the package's passes alone"
