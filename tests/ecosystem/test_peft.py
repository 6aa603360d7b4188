"""PEFT: every kind of adapter trains as without lemo_fx when everything is kept, and saves what plain PEFT loads."""

import dataclasses

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import TOLERANCE, assert_same_step, batch, step, tiny, with_lora
from training import plan

import lemo_fx
from lemo_fx import LemoConfig

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank_stabilised": {"use_rslora": True},
    "dropout": {"dropout": 0.1},
    "attention_only": {"targets": ["q_proj", "v_proj"]},
    "modules_to_save": {"targets": ["q_proj", "up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms_to_save": {"targets": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "tokens": {"targets": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
}


def trained(model, inputs, steps=2):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs["input_ids"]).logits


@pytest.mark.parametrize("before", [False, True], ids=["adapted_first", "transformed_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, before, tmp_path):
    inputs = batch(2, 61, padding="both")
    torch.manual_seed(5)
    expected = step(with_lora(tiny("llama"), **KINDS[kind]), inputs)
    for keep in (1.0, 0.5):
        config = plan(keep, score="random")
        model = tiny("llama")
        if before:
            lemo_fx.transform(model, config)
        model = with_lora(model, **KINDS[kind])
        if not before:
            lemo_fx.transform(model, config)
        if keep == 1.0 and kind != "dropout":
            assert_same_step(step(model, inputs), expected, "fp32")
        else:
            trained(model, inputs)
        assert {site.kept_tokens for site in lemo_fx.report(model).sites} == {61 if keep == 1.0 else 29}

    after = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), after, **TOLERANCE["fp32"])
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), after, **TOLERANCE["compiled"])
    # What is left is a transformed plain model: it trains, and reverts.
    assert lemo_fx.report(merged).sites
    merged.requires_grad_(True)
    trained(merged.train(), inputs, 1)
    assert not lemo_fx.revert(merged).state_dict().keys() ^ tiny("llama").state_dict().keys()


def test_several_adapters(tmp_path):
    def make():
        model = with_lora(tiny("llama"))
        torch.manual_seed(7)
        second = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model.add_adapter("second", second)
        return model

    original, inputs = make(), batch(2, 61, padding="both")
    model = lemo_fx.transform(make(), plan(1.0, score="random"))
    for name in ("default", "second", "default"):
        for one in (original, model):
            one.set_adapter(name)
        assert_same_step(step(model, inputs), step(original, inputs), "fp32")
    with model.disable_adapter(), original.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, original(**inputs).loss, **TOLERANCE["fp32"])

    lemo_fx.transform(model, plan())
    model.set_adapter("second")
    trained(model, inputs)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    step(model, inputs)
    model.delete_adapter("default")
    model.set_adapter("second")
    after = logits(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "second")
    torch.testing.assert_close(logits(loaded, inputs), after, **TOLERANCE["fp32"])
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    torch.testing.assert_close(logits(model, inputs), after, **TOLERANCE["fp32"])
    assert torch.equal(logits(lemo_fx.revert(model), inputs), logits(model, inputs))


OTHERS = {
    # Eight virtual tokens in front of 64: five of nine blocks.
    "prompt": (lambda: PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), 40 / 72),
    # Its prefix is a filled cache, with which the original code runs.
    "prefix": (lambda: PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), None),
    "ia3": (lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), 0.5),
    "vera": (lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"]), 0.5),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods(kind):
    config, share = OTHERS[kind]

    def make():
        torch.manual_seed(1)
        return get_peft_model(tiny("llama"), config()).train()

    inputs = batch(2, 64)
    expected = step(make(), inputs)
    model = lemo_fx.transform(make(), plan(1.0, score="random"))
    assert_same_step(step(model, inputs), expected, "fp32")
    step(lemo_fx.transform(model, plan()), inputs)
    assert {site.kept_share for site in lemo_fx.report(model).sites} == {share}


@pytest.mark.parametrize("base", ["model", "float8"])
@pytest.mark.parametrize("config", [AdaLoraConfig(total_step=10), C3AConfig(block_size=8)], ids=["adalora", "c3a"])
def test_methods_that_add_to_the_base_in_place(config, base):
    """Autograd lets nobody write to a view that a Function made."""
    settings = dataclasses.replace(config, target_modules={"q_proj", "down_proj"})
    model, inputs = get_peft_model(tiny("llama"), settings).train(), batch(2, 64)
    float8 = LemoConfig.preset("balanced", block_size=8, dense_layers=(), base=base)
    lemo_fx.set_dense(lemo_fx.transform(model, float8))
    dense = step(model, inputs)
    lemo_fx.set_dense(model, False)
    torch.testing.assert_close(step(model, inputs)[0], dense[0], rtol=0.02, atol=0)
