"""Activation checkpointing changes no gradient, and a recompute never ranks again."""

import copy
import gc

import pytest
import torch
from tiny import ARCHITECTURES, assert_same_step, batch, gradients, packed, step, tiny, with_lora
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lemo_fx
from lemo_fx import Elimination, LemoConfig, UnsupportedModelError
from lemo_fx.kernels.select_blocks import op


def sparse(treatment="skip", score="measured", keep=0.5, **settings):
    site = Elimination(keep=keep, eliminated=treatment, score=score)
    return LemoConfig(**({"attention": site, "mlp": site, "block_size": 8, "dense_layers": ()} | settings))


def enable(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


@pytest.mark.parametrize(
    ("score", "recompute"),
    [("measured", "all"), ("random", "projections"), ("random", "elementwise"), ("step", "all")],
)
@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bit_for_bit(architecture, treatment, score, recompute):
    model = lemo_fx.transform(tiny(architecture), sparse(treatment, score, recompute=recompute))
    inputs = batch(2, 61, padding="both")
    expected = step(model, inputs)
    enable(model)
    assert_same_step(step(model, inputs), expected, "same")


@pytest.mark.parametrize("before", [False, True], ids=["enabled_after", "enabled_before"])
@pytest.mark.parametrize("recompute", ["all", "elementwise"])
@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_lora_and_dropout(treatment, dropout, recompute, before):
    inputs = batch(2, 64)
    found = []
    for checkpointing in (False, True):
        model = with_lora(tiny("llama"), dropout)
        if checkpointing and before:
            enable(model)
        lemo_fx.transform(model, sparse(treatment, recompute=recompute))
        if checkpointing and not before:
            enable(model)
        torch.manual_seed(5)
        found.append(step(model, inputs))
    assert_same_step(found[1], found[0], "same")


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_with_fitted_stand_ins_thresholds_and_shared_choices(treatment):
    model = tiny("llama")
    config = sparse("stand_in")
    predictors = lemo_fx.fit(model, torch.randint(97, (3, 64)), config, progress=False)
    for plan in (
        config,
        sparse(keep=None, attention=Elimination(threshold=2.0), mlp=Elimination(threshold=1.0, eliminated=treatment)),
        LemoConfig(Elimination(eliminated=treatment), Elimination(score="shared"), block_size=8, dense_layers=()),
    ):
        model.gradient_checkpointing_disable()
        lemo_fx.transform(model, plan, predictors=predictors if plan is config else None)
        inputs = packed([20, 44])
        expected = step(model, inputs)
        enable(model)
        assert_same_step(step(model, inputs), expected, "same")


def wrapped_by_the_user(model, reentrant):
    """Each layer call in a checkpoint that knows nothing of lemo_fx."""
    for layer in model.model.layers:
        run = type(layer).forward

        def forward(hidden, *args, layer=layer, run=run, **kwargs):
            if reentrant:
                return checkpoint(lambda x: run(layer, x, *args, **kwargs), hidden, use_reentrant=True)
            return checkpoint(run, layer, hidden, *args, use_reentrant=False, **kwargs)

        layer.forward = forward


@pytest.mark.parametrize("score", ["measured", "random"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_from_outside(reentrant, score):
    model = lemo_fx.transform(tiny("llama"), sparse(score=score))
    inputs = batch(2, 64)
    expected = step(model, inputs)
    other = copy.deepcopy(model)
    wrapped_by_the_user(other, reentrant)
    assert_same_step(step(other, inputs), expected, "same")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_never_ranks_again(reentrant, monkeypatch):
    """The scorer gives other scores whenever it is called again: the gradients must not notice."""
    from lemo_fx.runtime.scores import RandomScore

    calls = []

    def fickle(self, stream):
        calls.append(1)
        generator = torch.Generator().manual_seed(len(calls))
        return torch.rand(stream.shape[0], -(-stream.shape[1] // 8), generator=generator)

    monkeypatch.setattr(RandomScore, "forward", fickle)
    model = lemo_fx.transform(tiny("llama"), sparse(score="random"))
    inputs = batch(2, 64)
    expected = step(model, inputs)
    assert len(calls) == 4
    calls.clear()
    wrapped_by_the_user(model, reentrant)
    found = step(model, inputs)
    assert len(calls) == 8, "the recompute did score again"
    assert_same_step(found, expected, "same")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_several_layers_in_one_checkpoint(reentrant, steps):
    """The second layer's input has another address when it is recomputed, and earlier steps left choices behind."""
    model = lemo_fx.transform(tiny("llama", 4), sparse(score="random"))
    plain = copy.deepcopy(model)
    layers, decoder = model.model.layers, model.model

    def grouped(self, hidden, **kwargs):
        run = [lambda x, layer=layer: layer(x, **kwargs) for layer in layers]
        return checkpoint_sequential(run, 2, hidden, use_reentrant=reentrant)

    def logits(model, ids, group):
        hidden = model.model.embed_tokens(ids)
        rope = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        if group:
            return model.lm_head(grouped(decoder, hidden, position_embeddings=rope))
        for layer in model.model.layers:
            hidden = layer(hidden, position_embeddings=rope)
        return model.lm_head(hidden)

    kept = []
    for number in range(steps):
        ids = batch(2, 64, seed=number)["input_ids"]
        kept.append(torch.empty(1000 * (number + 1)))  # moves later allocations
        for m, group in ((plain, False), (model, True)):
            m.zero_grad()
            logits(m, ids, group).square().mean().backward()
        expected, found = gradients(plain), gradients(model)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_a_new_model_knows_nothing_of_a_deleted_one():
    gc.collect()
    before = len(op._records)
    model = lemo_fx.transform(tiny("llama"), sparse())
    copies = [copy.deepcopy(model), model]
    for m in copies:
        m(**batch(2, 64))
    assert len(op._records) == before + 8
    lemo_fx.revert(model)
    gc.collect()
    assert len(op._records) == before + 4
    del model, copies, m
    gc.collect()
    assert len(op._records) == before


def test_what_is_remembered_is_small():
    record, scores = op.SiteRecord(), torch.randn(1, 256)
    stream = torch.randn(1, 256 * 64, 16)
    for _ in range(op.REMEMBERED + 5):
        op.select_blocks(scores, None, None, stream, record.site, 64, (1, 2))
    assert len(record.choices) == op.REMEMBERED
    assert sum(t.untyped_storage().nbytes() for c in record.choices for t in (c.blocks, c.digest)) < 64 * 1024


@pytest.mark.parametrize("outside", [None, False, True], ids=["transformers", "outside", "outside_reentrant"])
def test_two_forwards_before_one_backward(outside):
    model = lemo_fx.transform(tiny("llama"), sparse())
    pair = [batch(2, 64, seed=s) for s in (0, 1)]
    one, two = (step(model, inputs) for inputs in pair)
    expected = {name: one[1][name] + two[1][name] for name in one[1]}
    if outside is None:
        enable(model)
    else:
        wrapped_by_the_user(model, outside)
    model.zero_grad()
    sum(model(**inputs).loss for inputs in pair).backward()
    found = gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-6)


def test_an_evaluation_between_forward_and_backward():
    model = lemo_fx.transform(tiny("llama"), sparse(active="always"))
    inputs, other = batch(2, 64), batch(2, 64, seed=9)
    expected = step(model, inputs)
    wrapped_by_the_user(model, False)
    model.zero_grad()
    loss = model(**inputs).loss
    with torch.no_grad():
        model.eval()(**other)
    model.train()
    loss.backward()
    assert_same_step((loss.detach(), gradients(model)), expected, "same")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_backwards_through_one_forward(checkpointing):
    model = lemo_fx.transform(tiny("llama"), sparse())
    inputs = batch(2, 64)
    expected = step(model, inputs)
    if checkpointing:
        enable(model)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_same_step((loss.detach(), gradients(model)), expected, "same")


def test_a_checkpointed_step_saves_less():
    inputs = batch(2, 64)
    sizes = []
    for checkpointing in (False, True):
        model = lemo_fx.transform(tiny("llama"), sparse())
        if checkpointing:
            enable(model)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            model(**inputs)
        sizes.append(sum(t.untyped_storage().nbytes() for t in seen.values()))
    assert sizes[1] < 0.7 * sizes[0]


def test_scoring_reads_no_random_state():
    """DESIGN: no random state is consumed by default; a dropout in the adapters must not be drawn for scores."""
    states = []
    for transformed in (False, True):
        model = with_lora(tiny("llama"), 0.3)
        if transformed:
            lemo_fx.transform(model, sparse(keep=1.0))
        torch.manual_seed(5)
        states.append((step(model, batch(2, 64)), torch.get_rng_state()))
    assert torch.equal(states[0][1], states[1][1])
    assert_same_step(states[1][0], states[0][0], "fp32")


def test_forwards_of_nearly_the_same_tokens():
    """Embeddings that differ within blocks only, as of two answers to one question."""
    first = batch(1, 64)["input_ids"]
    second = first.clone()
    second[:, 10:15], second[:, 26:31], second[:, 41:46] = 7, 8, 9

    def run(outside):
        model = lemo_fx.transform(tiny("llama"), sparse(score="measured"))
        loss = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
        if outside:
            loss = lambda ids: checkpoint(lambda x: model(input_ids=x, labels=x).loss, ids, use_reentrant=False)  # noqa: E731
        total = loss(first) - 2 * loss(second)
        total.backward()
        return total.detach(), gradients(model)

    assert_same_step(run(False), run(True), "fp32")


def test_inputs_of_other_order_are_told_apart_by_more_than_rounding():
    stream = torch.randn(1, 4096, 32)
    one, other = op._digest(stream), op._digest(stream.flip(1))
    assert (one - other).abs().mean() > 1e-2 * one.abs().mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_comes_twice(checkpointing):
    def build(**settings):
        model = tiny("llama", 4, **settings)
        model.model.layers[1] = model.model.layers[0]
        return model

    def run(transformed, keep=1.0, treatment="skip"):
        model = build(use_cache=False)
        classes = [type(module) for module in model.modules()]
        if transformed:
            lemo_fx.transform(model, sparse(treatment, "random", keep))
            assert any("layers.1: is model.layers.0 again" in note for note in lemo_fx.report(model).notes)
        if checkpointing:
            enable(model)
        found = step(model, batch(2, 64))
        if transformed:
            assert [type(module) for module in lemo_fx.revert(model).modules()] == classes
        return found

    assert_same_step(run(False), run(True), "fp32")
    torch.testing.assert_close(run(True, 0.5, "exact")[0], run(False)[0])
    # Where layers have one number, a default cache mixes their keys, and a rewritten model makes none.
    with pytest.raises(UnsupportedModelError, match="both have layer_idx=0"):
        lemo_fx.transform(build(), sparse())
