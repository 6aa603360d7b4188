"""The families that people fine-tune, tiny: everything that tools/survey_architectures.py checks, and LoRA."""

import pytest
import torch
import transformers
from survey_architectures import EVERYTHING, batch, same, step, survey_one
from tiny import TOLERANCE, with_lora
from tiny_models import HEAD, tiny_model
from torch.nn import functional

import lemo_fx
from lemo_fx import LemoConfig
from lemo_fx.runtime.logits import LateLogits

FAMILIES = {
    "qwen3_5_text": {"linear_attn": "mixes tokens"},
    "qwen3_next": {"linear_attn": "mixes tokens"},
    "granitemoehybrid": {"mamba": "mixes tokens"},
    "falcon_h1": {"mamba": "mixes tokens"},
    "nemotron_h": {"mixer": "mixes tokens"},
    "lfm2": {"conv": "mixes tokens"},
    "bamba": {"mamba": "mixes tokens"},
    "qwen3_moe": {},
    "olmoe": {},
    "glm4v_moe": {},
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
    original, everything, default = results
    same("keep 1.0", original, everything)
    same("exact", original, default, gradients=False)
    assert all(gradient.isfinite().all() for gradient in default[1].values())


@pytest.mark.parametrize("experts", ["all-linear", "target_parameters"])
@pytest.mark.parametrize(
    "model_type",
    ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe", "granitemoeshared"],
)
def test_lora_on_mixtures_of_experts(model_type, experts):
    """PEFT adapts routers and shared experts by `all-linear`, experts in one tensor by their names."""
    fused = ["experts.gate_up_proj", "experts.down_proj"]
    how = {"targets": "all-linear"} if experts == "all-linear" else {"targets": ["q_proj"], "target_parameters": fused}
    results = []
    for plan in (None, EVERYTHING, LemoConfig(block_size=8)):
        torch.manual_seed(0)
        model = with_lora(tiny_model(model_type), **how)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        results.append(step(model if plan is None else lemo_fx.transform(model, plan), batch("padded")))
    original, everything, default = results
    assert any(".experts." in name for name in original[1]) or experts == "all-linear"
    same("keep 1.0", original, everything)
    same("exact", original, default, gradients=False)


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_routers_that_return_a_tuple_take_no_adapter(model_type):
    """PEFT's `all-linear` adapts them, and fails on its own; without them a step is plain LoRA's."""
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'dtype'"):
        step(with_lora(tiny_model(model_type)), batch("padded"))
    results = []
    for plan in (None, EVERYTHING, LemoConfig(block_size=8)):
        torch.manual_seed(0)
        model = with_lora(tiny_model(model_type), exclude_modules=["router"])
        results.append(step(model if plan is None else lemo_fx.transform(model, plan), batch("padded")))
    same("keep 1.0", results[0], results[1])
    same("exact", results[0], results[2], gradients=False)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_a_head_that_asks_whether_its_hidden_states_were_cut(model_type, softcap):
    """Gemma 4 asks by their number, which a graph cannot: with every logit kept it does not matter."""
    model = tiny_model(model_type)
    model.config.final_logit_softcapping = softcap
    count = {"num_items_in_batch": torch.tensor(7)}
    shifted = functional.pad(batch("plain")["labels"], (0, 1), value=-100)[:, 1:]
    cut = {**batch("plain"), "logits_to_keep": 10, "shift_labels": shifted[:, -10:].contiguous()}
    calls = [batch("plain"), batch("padded"), {**batch("packed"), **count}, {**batch("plain"), "logits_to_keep": 0}]
    expected = [step(model, inputs) for inputs in (*calls, cut)]
    unlabelled = model(batch("padded")["input_ids"]).logits
    lemo_fx.transform(model, LemoConfig(attention=None, mlp=None))
    assert not [note for note in lemo_fx.report(model).notes if "not segmented" in note]
    for inputs, wanted in zip(calls, expected, strict=False):
        assert isinstance(model(**inputs).logits, LateLogits)
        same("segments", wanted, step(model, inputs))
    # Other calls run the original head.
    assert not isinstance(model(**cut).logits, LateLogits)
    same("the original head", expected[-1], step(model, cut))
    torch.testing.assert_close(model(batch("padded")["input_ids"]).logits, unlabelled)


@pytest.mark.parametrize("model_type", ["bart", "blenderbot-small", "marian", "pegasus", "whisper"])
def test_a_head_that_makes_its_own_loss(model_type):
    """Decoders of encoder-decoder models call torch's cross entropy; labels are not shifted, their number not told."""
    model = tiny_model(model_type)
    calls = [batch("plain"), batch("padded"), {**batch("padded"), "num_items_in_batch": torch.tensor(7)}]
    expected = [step(model, inputs) for inputs in calls]
    lemo_fx.transform(model, LemoConfig(attention=None, mlp=None))
    assert not [note for note in lemo_fx.report(model).notes if "not segmented" in note or "not proven" in note]
    for inputs, wanted in zip(calls, expected, strict=True):
        assert isinstance(model(**inputs).logits, LateLogits)
        same("segments", wanted, step(model, inputs))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *args: None)  # No plain linear any more: recomputed in the backward.
    same("segments of any head", expected[0], step(model, calls[0]))


def test_a_head_that_asks_for_the_outputs_of_images():
    """Granite-Docling hands on what its images made, where the call has any."""
    modeling = pytest.importorskip("transformers.models.granite_docling.modeling_granite_docling")
    model = tiny_model("granite_docling")
    expected = step(model, batch("padded"))
    lemo_fx.transform(model, LemoConfig(attention=None, mlp=None))
    assert not [note for note in lemo_fx.report(model).notes if "not segmented" in note]
    assert isinstance(model(**batch("padded")).logits, LateLogits)
    same("segments", expected, step(model, batch("padded")))

    def with_images(module, args, outputs):
        outputs.image_outputs = modeling.GraniteDoclingImageFeaturesOutput(router_logits=torch.tensor([0.2, -0.1]))
        return outputs

    model.model.register_forward_hook(with_images)
    outputs = model(**batch("padded"))
    assert isinstance(outputs.logits, LateLogits)
    assert outputs.router_logits.tolist() == pytest.approx([0.2, -0.1])
    same("segments", expected, step(model, batch("padded")))
    more = model(**batch("padded"), router_labels=torch.tensor([1, 0]))
    assert more.loss > outputs.loss


def test_an_mlp_whose_optional_argument_changes_it():
    """Moshi's hands a codebook's number on to linear layers, where it has one."""
    row = survey_one("moshi", kinds=("padded",))
    assert row["outcome"] == "partly", row
    assert row["LeMo's rule"]["rewritten"] == {"mlp": 5}


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("inkling2_text", "attention_input Inkling2BlockAttentionResidual is not causal"),
        ("muse_spark", "'post_attention_residual_gate' hands the residual stream through MuseSparkResidualGate"),
        ("qwen4_exp_text", "'attn_hyper_connection' hands the residual stream through Qwen4ExpTextGatedResidual"),
        ("zamba2", "'mamba_decoder' hands the residual stream through Zamba2MambaDecoderLayer"),
        ("zaya", "'post_attention_residual_scale' hands the residual stream through ZayaResidualScaling"),
    ],
)
def test_where_the_residual_stream_goes_is_named(model_type, words):
    assert words in refusal(tiny_model(model_type))


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


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "hy_v4"])
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
