"""The families that people fine-tune, tiny: everything that tools/survey_architectures.py checks, and LoRA."""

import pytest
import torch
import transformers
from survey_architectures import EVERYTHING, batch, same, survey_one
from tiny import TOLERANCE, step, with_lora
from tiny_models import HEAD, tiny_model

import lemo_fx
from lemo_fx import LemoConfig

FAMILIES = {
    "qwen3_next": {"linear_attn": "mixes tokens"},
    "granitemoehybrid": {"mamba": "mixes tokens"},
    "falcon_h1": {"mamba": "mixes tokens"},
    "nemotron_h": {"mixer": "mixes tokens"},
    "lfm2": {"conv": "mixes tokens"},
    "bamba": {"mamba": "mixes tokens"},
    "qwen3_moe": {},
    "deepseek_v3": {},
    "gpt_oss": {},
    "gemma4_text": {"attention": "shares its keys and values", "mlp_1": "'per_layer_input'"},
    "llama4_text": {"attention": "numbers the rows"},
    "minimax": {"self_attn": "and reads more than its token"},
}
"""Model type -> by branch, why it is left dense in some layers."""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_values_gradients_checkpointing_padding_and_documents(model_type):
    row = survey_one(model_type, kinds=("padded", "packed"))
    assert row["outcome"] in ("works", "partly"), row
    done = row["LeMo's rule"]["rewritten"]
    assert any(site.startswith("attention") for site in done), row
    assert any(site.startswith("mlp") for site in done), row
    reasons = [*row["default"]["left"], *row["LeMo's rule"]["left"]]
    expected = FAMILIES[model_type]
    for reason in reasons:
        site, _, why = reason.partition(": ")
        assert site in expected, reason
        assert expected[site] in why


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora(model_type):
    results = []
    for plan in (None, EVERYTHING, LemoConfig(block_size=8)):
        torch.manual_seed(0)
        model = with_lora(tiny_model(model_type), targets=["q_proj", "v_proj", "o_proj"])
        results.append(step(model if plan is None else lemo_fx.transform(model, plan), batch("padded")))
    original, everything, default = ((float(loss), gradients) for loss, gradients in results)
    same("keep 1.0", original, everything)
    same("exact", original, default, gradients=False)
    assert all(gradient.isfinite().all() for gradient in default[1].values())


def refusal(model):
    with pytest.raises(lemo_fx.UnsupportedModelError) as error:
        lemo_fx.transform(model, LemoConfig(block_size=8))
    return str(error.value)


def test_what_has_no_attention_that_can_be_told_of_kept_tokens_is_named():
    assert "FalconAttention in its layers (FalconDecoderLayer) computes attention by itself" in refusal(
        tiny_model("falcon")
    )
    assert "its layers (MambaBlock) have no softmax attention" in refusal(tiny_model("mamba"))
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    assert "BertSelfAttention in BertLayer, is not causal" in refusal(transformers.BertForMaskedLM(config))


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text"])
def test_several_residual_streams_are_named(model_type):
    words = refusal(tiny_model(model_type))
    assert "its 'hidden_states' have 4 axes: several residual streams side by side" in words


def test_experts_that_work_on_flat_rows_beside_a_dense_mlp():
    """Gemma 4 26B: the router and the experts of a branch take [B S, H]."""
    config = tiny_model("gemma4_text").config
    settings = config.to_dict() | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    settings |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 4 * HEAD}
    model = transformers.Gemma4ForCausalLM(type(config)(**settings)).train()
    expected = step(model, batch("padded"))
    lemo_fx.transform(model, EVERYTHING)
    assert {site.eliminated for site in lemo_fx.report(model).sites if site.site == "mlp"} == {"skip"}
    found = step(model, batch("padded"))
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE["fp32"])
