"""Activations that are not numbers: nothing hangs or crashes, choices stay valid, and the loss shows it."""

import pytest
import torch
from processes import SPARSE
from tiny import Recorder, batch, gradients, tiny
from torch.utils.checkpoint import checkpoint

import lemo_fx
from lemo_fx import Elimination, LemoConfig, Predictors


def embedded(model, inputs, bad=None, token=26):
    """The same batch as embeddings; a token of the first sample is `bad` throughout."""
    stream = model.get_input_embeddings()(inputs["input_ids"]).detach()
    if bad is not None:
        stream[0, token] = bad
    return {**{k: v for k, v in inputs.items() if k != "input_ids"}, "inputs_embeds": stream.requires_grad_()}


def assert_valid(recorder, length):
    for calls in recorder.tokens.values():
        for tokens in calls:
            assert torch.equal(tokens, calls[0]), "a recompute chose anew"
            assert (tokens.diff(dim=1) > 0).all()
            assert tokens.min() >= 0
            assert tokens.max() < length


BAD = [float("nan"), float("inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize(
    "site", [{"keep": 0.4}, {"threshold": 0.5}, {"keep": 0.4, "balance": True}], ids=["keep", "threshold", "balance"]
)
@pytest.mark.parametrize("score", ["measured", "predicted", "random", "step"])
def test_a_token_that_is_no_number(score, site, treatment, checkpointing, bad):
    config = Elimination(**site, score=score, eliminated=treatment)
    config = LemoConfig(config, config, block_size=8, dense_layers=())
    model = tiny("llama")
    lemo_fx.transform(model, config, predictors=Predictors.random(model, SPARSE))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch(2, 61, padding="both")
    clean = model(**embedded(model, {**inputs, "labels": None})).logits
    dirty = model(**embedded(model, {**inputs, "labels": None}, bad)).logits
    assert not dirty[0].isfinite().all()
    if "keep" in site:
        assert torch.equal(dirty[1], clean[1]), "another sample sees nothing of it"
    given = embedded(model, inputs, bad)
    with Recorder(model) as recorder:
        loss = model(**given).loss
        loss.backward()
    assert_valid(recorder, 61)
    assert not loss.isfinite()
    assert any(not g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3", "opt", "mixtral"])
@pytest.mark.parametrize("score", ["measured", "step"])
def test_a_model_whose_weights_have_diverged(architecture, score):
    model = tiny(architecture)
    site = Elimination(keep=0.5, score=score)
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".0." in name:
                parameter.fill_(float("nan"))
    with Recorder(model) as recorder:
        loss = model(**batch(2, 64)).loss
        loss.backward()
    assert_valid(recorder, 64)
    assert loss.isnan()


def test_half_precision_that_overflows():
    model = tiny("llama").half()
    lemo_fx.transform(model, SPARSE)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    with Recorder(model) as recorder:
        loss = model(**batch(2, 64)).loss
        loss.backward()
    assert_valid(recorder, 64)
    assert not loss.isfinite()


@pytest.mark.parametrize("bad", BAD)
def test_recomputes_find_their_own_choice_by_the_samples_that_are_numbers(bad):
    """Several forwards before their backwards, each layer checkpointed as a whole; a threshold's counts differ."""
    model = tiny("llama", 1)
    site = Elimination(threshold=2.5)
    lemo_fx.transform(model, LemoConfig(site, None, block_size=8, dense_layers=()))
    layer = model.model.layers[0]
    streams = [embedded(model, batch(2, 64, seed=seed), bad, 0)["inputs_embeds"] for seed in range(4)]
    rope = model.model.rotary_emb(streams[0], torch.arange(64)[None])
    with Recorder(model) as recorder:
        outputs = [checkpoint(layer, x, position_embeddings=rope, use_reentrant=False) for x in streams]
        for output in outputs:
            output.sum().backward()
    (calls,) = recorder.tokens.values()
    assert len({tokens.shape for tokens in calls[:4]}) > 1, "the counts are to differ"
    assert all(torch.equal(again, first) for again, first in zip(calls[4:], calls[:4], strict=True))
