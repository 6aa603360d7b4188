"""A cache in a training step: the default one is not made, one that is asked for or filled runs the original code."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, assert_same_step, batch, gradients, packed, step, tiny, with_lora
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.runtime.logits import LateLogits


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, vocab_size=50, use_cache=True
    )
    site = Elimination(keep=0.5, score="random")
    return lemo_fx.transform(LlamaForCausalLM(config).train(), LemoConfig(attention=site, mlp=site, block_size=8))


def shares(model) -> set[float | None]:
    return {site.kept_share for site in lemo_fx.report(model).sites if site.eliminated != "dense"}


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_default_cache_does_not_switch_elimination_off(model, use_cache, labelled):
    """It is not made: of rewritten layers it would hold nothing."""
    ids = torch.randint(0, 50, (2, 64))
    assert model(input_ids=ids, labels=ids if labelled else None, use_cache=use_cache).past_key_values is None
    out = model(ids, None, None, None, None, ids if labelled else None, use_cache)
    assert isinstance(out.logits, LateLogits) == labelled
    assert shares(model) == {0.5}
    model.model(ids, use_cache=use_cache)
    assert shares(model) == {0.5}


@pytest.mark.parametrize("active", ["training", "always"])
@pytest.mark.parametrize("how", ["use_cache", "past_key_values"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_cache_that_a_call_asks_for_is_filled(model, how, labelled, active):
    ids, more = torch.randint(0, 50, (2, 64)), torch.randint(0, 50, (2, 1))
    lemo_fx.transform(model, replace(lemo_fx.report(model).config, active=active)).train(active == "training")

    def run():
        cache = {"use_cache": True} if how == "use_cache" else {how: DynamicCache(config=model.config)}
        out = model(input_ids=ids, labels=ids if labelled else None, **cache)
        return out.loss, model(more, past_key_values=out.past_key_values).logits

    loss, logits = run()
    assert shares(model) == {None}
    lemo_fx.revert(model)
    expected_loss, expected = run()
    torch.testing.assert_close(logits, expected)
    if labelled:
        torch.testing.assert_close(loss, expected_loss)


@pytest.mark.parametrize("how", ["use_cache", "past_key_values"])
def test_checkpointing_leaves_no_cache_to_fill(model, how):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 50, (2, 64))
    cache = {"use_cache": True} if how == "use_cache" else {how: DynamicCache(config=model.config)}
    model(input_ids=ids, labels=ids, **cache).loss.backward()
    assert shares(model) == {0.5}
    assert how == "use_cache" or cache[how].get_seq_length() == 0


def test_a_filled_cache_runs_the_original_code(model):
    ids = torch.randint(0, 50, (2, 64))
    with torch.no_grad():
        cache = model.eval()(input_ids=ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        expected = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model.train()(input_ids=ids, past_key_values=cache).logits, expected)
    assert shares(model) == {None}


def test_a_filled_cache_counts_in_a_step_with_labels(model):
    """Under whichever name it is given: prefix tuning trains through it."""
    ids = torch.randint(0, 50, (2, 64))
    with torch.no_grad():
        cache = model.eval()(input_ids=ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        loss = model.train()(input_ids=ids, labels=ids, past_key_values=copy.deepcopy(cache)).loss
        lemo_fx.revert(model)
        expected = model(input_ids=ids, labels=ids, past_key_values=copy.deepcopy(cache)).loss
        alone = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    assert not torch.isclose(loss, alone)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("active", ["training", "always"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_base_model_called_without_its_head_fills_a_cache_too(architecture, active, lora):
    model = tiny(architecture)
    model = with_lora(model) if lora else model
    site = Elimination(keep=0.5, score="random")
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, active=active)).train(active == "training")
    base = (model.get_base_model() if lora else model).base_model
    ids, more = torch.randint(3, 90, (2, 64)), torch.randint(3, 90, (2, 1))
    # A step that says nothing of a cache has none.
    assert base(ids).past_key_values is None
    assert shares(model) == {0.5}

    def run(**cache):
        out = base(ids, **cache)
        return base(more, past_key_values=out.past_key_values).last_hidden_state

    caches = [{"use_cache": True}, {"past_key_values": DynamicCache(config=model.config.get_text_config())}]
    found = [run(**cache) for cache in caches]
    assert shares(model) == {None}
    base(ids)
    assert shares(model) == {0.5}
    lemo_fx.revert(model)
    assert not any("_lemo_fx" in name or m._forward_hooks for m in model.modules() for name in vars(m))
    expected = run(use_cache=True)
    for hidden in found:
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_config_says_of_a_cache_stays_and_holds_in_evaluation(architecture, tmp_path):
    model = tiny(architecture)
    ids = batch(2, 32)["input_ids"]
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(ids, **how)
    site = Elimination(keep=0.5, score="random")
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8))
    with torch.no_grad():
        assert model(ids).past_key_values.get_seq_length(1) == 32
    assert torch.equal(model.generate(ids, **how), expected)
    assert torch.equal(model.train().generate(ids, **how), expected)
    assert model(ids, labels=ids).past_key_values is None
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().use_cache


def test_a_model_without_a_language_head_fills_a_cache_too():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, vocab_size=50, pad_token_id=0
    )
    model = LlamaForSequenceClassification(config).train()
    site = Elimination(keep=0.5, score="random")
    lemo_fx.transform(model, LemoConfig(attention=site, mlp=site, block_size=8))
    ids = torch.randint(1, 50, (2, 64))
    labels = torch.tensor([0, 1])
    assert model(input_ids=ids, labels=labels).past_key_values is None
    assert shares(model) == {0.5}
    cache = model(input_ids=ids, labels=labels, use_cache=True).past_key_values
    assert [cache.get_seq_length(i) for i in range(5)] == [64] * 5
    # A copy has hooks of its own.
    copied = copy.deepcopy(model)
    assert copied(input_ids=ids, labels=labels, use_cache=True).past_key_values.get_seq_length(2) == 64
    lemo_fx.revert(copied)
    assert not any(m._forward_pre_hooks for m in copied.modules())
    assert model(input_ids=ids, labels=labels).past_key_values is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("score", ["random", "step", "measured"])
@pytest.mark.parametrize("eliminated", ["skip", "exact"])
def test_a_pass_without_gradient_is_as_sparse_as_one_with_it(eliminated, score, checkpointing):
    """In a preference loss the reference (fresh adapters disabled) and the policy are the same model: loss log 2."""
    policy = with_lora(tiny("llama"), init=True)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    site = Elimination(keep=0.5, eliminated=eliminated, score=score)
    lemo_fx.transform(policy, LemoConfig(site, site, block_size=8, dense_layers=()))
    ids = torch.randint(3, 90, (2, 64))
    with torch.no_grad(), policy.disable_adapter():
        reference = policy(ids).logits
    assert shares(policy) == {0.5}
    assert torch.equal(policy(ids).logits, reference)
    with torch.no_grad():
        asked = policy(ids, use_cache=True).past_key_values
        original = lemo_fx.revert(policy)(ids, use_cache=True).past_key_values
    # Older transformers make no cache of their own accord where layers are checkpointed.
    assert (asked is None) == (original is None)
    assert asked is None or asked.get_seq_length(1) == 64


@pytest.mark.parametrize("said", [{}, {"use_cache": False}, {"use_cache": True}], ids=["unsaid", "no", "yes"])
def test_restarting_positions_are_documents_where_they_are_for_the_original(said):
    """For transformers they are none where a call makes a cache, which a rewritten one does not."""
    inputs = {name: value for name, value in packed([20, 28]).items() if name != "use_cache"}

    def run(transformed, checkpointing, positional):
        built = with_lora(tiny("llama"))
        if checkpointing:
            built.gradient_checkpointing_enable({"use_reentrant": False})
        if transformed:
            site = Elimination(keep=1.0, score="random")
            lemo_fx.transform(built, LemoConfig(site, site, block_size=8, dense_layers=()))
        if not positional:
            return step(built, {**inputs, **said})
        model = built.get_base_model()
        loss = model(inputs["input_ids"], None, inputs["position_ids"], labels=inputs["labels"], **said).loss
        loss.backward()
        return loss.detach(), gradients(built)

    for how in [(False, False), (False, True), (True, False)]:
        assert_same_step(run(False, *how), run(True, *how), "fp32")
