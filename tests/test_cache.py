"""A cache in a training step: a fresh one must not switch elimination off, a filled one runs the original code."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lemo_fx
from lemo_fx import Elimination, LemoConfig


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


@pytest.mark.parametrize("use_cache", [None, True])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_fresh_cache_does_not_switch_elimination_off(model, use_cache, labelled):
    ids = torch.randint(0, 50, (2, 64))
    model(input_ids=ids, labels=ids if labelled else None, use_cache=use_cache)
    assert shares(model) == {0.5}


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
