"""Adapters on a quantised base: bitsandbytes and torchao, on the CPU."""

import pytest
import torch
import transformers
from peft import prepare_model_for_kbit_training
from tiny import assert_same_step, batch, step, tiny, with_lora
from training import plan

import lemo_fx


def bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(**settings)


def int8_weights():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


KINDS = {
    "nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "fp32"),
    "qlora": (
        lambda: bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "bf16",
    ),
    # Rounds a token by the outliers of the tokens beside it, which must not pass for mixing them.
    "llm_int8": (lambda: bitsandbytes(load_in_8bit=True), "fp32"),
    "torchao_int8": (int8_weights, "fp32"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_base(kind, tmp_path):
    make_config, tolerance = KINDS[kind]
    config = make_config()
    tiny("llama", hidden_size=64).save_pretrained(tmp_path)

    def load():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        return with_lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))

    inputs = batch(2, 61, padding="both")
    expected = step(load(), inputs)
    model = load()
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter
    lemo_fx.transform(model, plan(1.0, score="random"))
    assert_same_step(step(model, inputs), expected, tolerance)
    for treatment in ("skip", "exact"):
        lemo_fx.transform(model, plan(eliminated=treatment))
        sparse = step(model, inputs)
        assert sparse[1].keys() == expected[1].keys()
        assert {site.kept_tokens for site in lemo_fx.report(model).sites} == {29}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(model, inputs), sparse, tolerance)
    model.gradient_checkpointing_disable()
    assert_same_step(step(lemo_fx.revert(model), inputs), expected, tolerance)


def reads_of_a_step(folder, config, treatment, compiled, checkpointing=True):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = with_lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if treatment:
        lemo_fx.transform(model, plan(eliminated=treatment, score="random"))
    (layer,) = model.get_base_model().model.layers
    model.enable_input_require_grads()
    if compiled:
        torch.compiler.reset()
        layer.compile(fullgraph=True, backend="aot_eager")
        step(model, batch(2, 61))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(model, batch(2, 61))
    torch.compiler.reset()
    # On the CPU a product de-quantises too.
    return sum(event.count for event in profiler.key_averages() if event.key == "bitsandbytes::dequantize_4bit")


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.slow
def test_weights_are_read_no_more_often_than_by_lora(compiled, tmp_path):
    """Checkpointed: forward, recompute, backward; `exact` uncompiled once more, for its dropped tokens' values."""
    config = bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tiny("llama", 1, hidden_size=64).save_pretrained(tmp_path)
    found = {treatment: reads_of_a_step(tmp_path, config, treatment, compiled) for treatment in (None, "skip", "exact")}
    # A compiler needs no recompute of a product that nothing but the branch's result comes from.
    assert found[None] == 3 * 7 - compiled
    assert found["skip"] <= found[None]
    assert found["exact"] <= (3 if compiled else 4) * 7
