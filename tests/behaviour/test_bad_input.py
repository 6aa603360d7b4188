"""Bad input gets a typed, helpful error, and the model is left exactly as it was."""

import dataclasses
import importlib
import json
import logging

import pytest
import torch
import transformers
from tiny import anatomy, assert_same_step, batch, selections, step, tiny, with_lora

import lemo_fx
from lemo_fx import (
    ConfigError,
    Elimination,
    InputError,
    LemoConfig,
    LemoError,
    PredictorError,
    UnsupportedModelError,
)

SPARSE = LemoConfig(Elimination(keep=0.5), Elimination(keep=0.5), block_size=8, dense_layers=())


def refused(model, config=SPARSE, error=UnsupportedModelError, match=None, **given):
    before = anatomy(model)
    with pytest.raises(error, match=match) as caught:
        lemo_fx.transform(model, config, **given)
    assert isinstance(caught.value, LemoError)
    assert anatomy(model) == before


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_sequences_longer_than_the_model_reads(architecture, lora):
    model = tiny(architecture)
    model = with_lora(model) if lora else model
    with pytest.raises(InputError, match=r"sequence 1 has 513 tokens; \w+ reads up to 512"):
        lemo_fx.fit(model, [[3] * 512, [3] * 513])


@pytest.mark.parametrize(
    ("size", "match"), [(1024, "reads up to 512 tokens"), (128, "longest sequence has 100 tokens")]
)
def test_blocks_larger_than_every_sequence(monkeypatch, size, match):
    monkeypatch.setattr(importlib.import_module("lemo_fx.fitting.fit"), "run_probes", None)
    with pytest.raises(ConfigError, match=f"block_size={size}: the .*{match}"):
        lemo_fx.fit(tiny("llama"), [[3] * 100, [3] * 7], lemo_fx.LemoConfig(block_size=size))


def test_an_encoder_decoder():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = transformers.BartConfig(
        **sizes, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=50, max_position_embeddings=128
    )
    refused(transformers.BartForConditionalGeneration(config))


def test_state_space_and_linear_attention():
    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=50)
    refused(transformers.MambaForCausalLM(mamba), match="no causal decoder layers")
    hybrid = transformers.Qwen3NextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        vocab_size=50,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    model = lemo_fx.transform(transformers.Qwen3NextForCausalLM(hybrid), SPARSE)
    rows = {(row.module, row.site): row for row in lemo_fx.report(model).sites}
    assert "mixes tokens" in rows["model.layers.0", "linear_attn"].note
    assert rows["model.layers.1", "attention"].eliminated == "skip"


def test_block_size_that_does_not_fit_the_model():
    refused(tiny("llama"), LemoConfig(block_size=1024), ConfigError, "block_size=1024 does not fit")


def test_layers_that_do_not_exist_and_lists_of_another_length():
    refused(tiny("llama"), LemoConfig(dense_layers=(7,)), ConfigError, "dense_layers")
    config = LemoConfig(Elimination(keep=[0.5] * 3), block_size=8, dense_layers=())
    refused(tiny("llama"), config, ConfigError, "3 values")


def test_the_name_of_a_preset_is_a_plan():
    model = lemo_fx.transform(tiny("llama"), "fast")
    assert lemo_fx.report(model).config == LemoConfig.preset("fast")
    plan = LemoConfig(Elimination(keep=[0.5, 0.25]), None, 8, (1,), offload=True)
    assert LemoConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = tiny("llama")
    refused(model, match="meta device")


def test_a_frozen_model():
    refused(tiny("llama").requires_grad_(False), match="no parameter")
    lemo_fx.transform(tiny("llama").requires_grad_(False), LemoConfig(block_size=8, active="always"))


def test_treatments_and_scores_without_what_they_need():
    site = Elimination(eliminated="stand_in")
    refused(tiny("llama"), LemoConfig(site, site, 8, ()), PredictorError, "lemo_fx.fit")
    site = Elimination(score="predicted")
    refused(tiny("llama"), LemoConfig(site, site, 8, ()), PredictorError, "predict")


def test_shared_choice_where_the_mlp_comes_first():
    model = tiny("gpt_neox")

    class MlpFirst(type(model.gpt_neox.layers[0])):
        def forward(self, hidden_states, **kwargs):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states + self.attention(self.input_layernorm(hidden_states), **kwargs)[0]

    for layer in model.gpt_neox.layers:
        layer.__class__ = MlpFirst
    config = LemoConfig(Elimination(keep=0.5), Elimination(keep=0.5, score="shared"), 8, ())
    refused(model, config, match="shared")


def test_a_forward_replaced_on_a_layer():
    model = tiny("llama")
    model.model.layers[1].forward = model.model.layers[1].forward
    refused(model, match=r"model\.layers\.1\.forward was replaced")


class MixesTokens(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x.cumsum(1) * self.weight


@pytest.mark.parametrize("lora", [False, True])
def test_a_last_layer_that_fails_rolls_everything_back(lora):
    model = tiny("llama", 3)
    model = with_lora(model, targets=["q_proj"]) if lora else model
    inputs = batch(2, 48)
    expected = step(model, inputs)
    predicted = Elimination(keep=0.5, score="predicted")
    predictors = lemo_fx.Predictors.random(model, LemoConfig(predicted, predicted, 8, (2,)))
    plan = LemoConfig(predicted, predicted, 8, ())
    refused(model, plan, PredictorError, match=r"layer 2", predictors=predictors)
    assert_same_step(step(model, inputs), expected, "same")
    lemo_fx.transform(model, LemoConfig(predicted, predicted, 8, (2,)), predictors=predictors)


def test_a_last_layer_that_cannot_be_rewritten_stays_as_it_is():
    model = tiny("llama", 3)
    model.model.layers[2].mlp = MixesTokens(32)
    lemo_fx.transform(model, SPARSE)
    rows = [row for row in lemo_fx.report(model).sites if row.eliminated == "dense"]
    assert [(row.module, row.site) for row in rows] == [("model.layers.2", "mlp")]
    assert "MixesTokens mixes tokens" in rows[0].note


@pytest.mark.parametrize("where", ["to", "rewritten_class"])
def test_an_installation_that_fails_midway_rolls_everything_back(where, monkeypatch):
    from lemo_fx import install
    from lemo_fx.runtime.select import SelectBlocks

    model = tiny("llama", 3)
    inputs = batch(2, 48)
    expected = step(model, inputs)
    calls = []

    def failing(original, limit):
        def run(*args, **kwargs):
            calls.append(1)
            if len(calls) == limit:
                raise MemoryError("no memory")
            return original(*args, **kwargs)

        return run

    if where == "to":
        monkeypatch.setattr(SelectBlocks, "to", failing(torch.nn.Module.to, 6), raising=False)
    else:
        monkeypatch.setattr(install, "rewritten_class", failing(install.rewritten_class, 3))
    before = anatomy(model)
    with pytest.raises(MemoryError):
        lemo_fx.transform(model, SPARSE)
    assert anatomy(model) == before
    assert_same_step(step(model, inputs), expected, "same")


def test_a_failed_new_plan_keeps_the_old_one():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    inputs = batch(2, 48)
    expected = step(model, inputs)
    refused(model, LemoConfig(dense_layers=(9,)), ConfigError)
    assert len(selections(model)) == 4
    assert_same_step(step(model, inputs), expected, "same")
    assert lemo_fx.report(model).config == SPARSE


def test_nan_in_the_scores_keeps_the_block_and_warns_once(caplog):
    model = lemo_fx.transform(tiny("llama", 1), LemoConfig(Elimination(keep=0.4), None, 8, ()))
    inputs = batch(1, 64)
    embedded = model.model.embed_tokens(inputs["input_ids"]).detach()
    embedded[0, 26] = float("nan")
    with caplog.at_level(logging.WARNING, logger="lemo_fx"):
        for _ in range(2):
            model(inputs_embeds=embedded, labels=inputs["labels"])
    assert len([r for r in caplog.records if "NaN" in r.message]) == 1
    assert "NaN" in str(lemo_fx.report(model).sites[0].note)


def test_another_attention_implementation_afterwards():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    model.set_attn_implementation("eager")
    with pytest.raises(LemoError, match="attention implementation"):
        model(**batch(2, 48))


def test_sliding_window_where_attention_counts_for_itself():
    model = tiny("mistral")
    model.config._attn_implementation = "flash_attention_2"
    refused(model, LemoConfig(SPARSE.attention, None, 8, ()), match="sliding window.*attn_implementation='sdpa'")


@pytest.mark.parametrize("asked_by", ["call", "config"])
def test_router_loss_with_sparse_experts(asked_by):
    model = lemo_fx.transform(tiny("mixtral", output_router_logits=asked_by == "config"), SPARSE)
    inputs = batch(2, 48) | ({"output_router_logits": True} if asked_by == "call" else {})
    with pytest.raises(InputError, match="output_router_logits"):
        model(**inputs)
    assert lemo_fx.set_dense(model)(**inputs).aux_loss is not None
    model.config.output_router_logits = False
    assert lemo_fx.set_dense(model, False)(**batch(2, 48)).loss is not None
    model.config.output_router_logits = asked_by == "config"
    lemo_fx.transform(model, LemoConfig(SPARSE.attention, None, 8, ()))
    assert model(**inputs).aux_loss is not None


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("kind", ["GraniteMoeShared", "JetMoe"])
def test_router_loss_where_the_experts_are_not_the_last_module(kind):
    """Beside a shared MLP; in the attention."""
    settings = {"GraniteMoeShared": {"num_local_experts": 4, "shared_intermediate_size": 32}, "JetMoe": {}}[kind]
    if kind == "JetMoe":
        settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings, output_router_logits=True)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    expected = step(model, batch(2, 48))
    # JetMoE's attention routes too.
    attention = None if kind == "JetMoe" else Elimination(keep=1.0)
    site = Elimination(keep=0.5)
    sparse = LemoConfig(site, None, 8, ()) if kind == "JetMoe" else LemoConfig(None, site, 8, ())
    with pytest.raises(InputError, match="output_router_logits"):
        lemo_fx.transform(model, sparse)(**batch(2, 48))
    lemo_fx.transform(model, LemoConfig(attention, None, 8, ()))
    assert_same_step(step(model, batch(2, 48)), expected, "fp32")


@pytest.mark.parametrize("asked_by", ["call", "config"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_loss_with_dense_experts(checkpointing, asked_by):
    model = tiny("mixtral", output_router_logits=asked_by == "config", router_aux_loss_coef=0.5)
    inputs = batch(2, 48) | ({"output_router_logits": True} if asked_by == "call" else {})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = step(model, inputs)
    lemo_fx.transform(model, LemoConfig(Elimination(keep=1.0), None, 8, ()))
    assert_same_step(step(model, inputs), expected, "fp32")
    # Said in the call, it counts for more than what the config says.
    without = step(model, inputs | {"output_router_logits": False})
    assert without[0] < expected[0] - 0.1


def test_functions_that_need_a_transformed_model():
    for function in (lemo_fx.report, lemo_fx.graphs):
        with pytest.raises(lemo_fx.NotTransformedError, match="transform"):
            function(tiny("llama"))
    model = tiny("llama")
    assert lemo_fx.revert(model) is model


def test_every_error_is_a_lemo_error():
    errors = [v for v in vars(lemo_fx).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(errors) >= 9
    assert all(issubclass(error, LemoError) for error in errors)
