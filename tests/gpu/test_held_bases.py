"""Bases that come quantised, on a real GPU: a step is the original's, float8 plans use the weights that came."""

import pytest
import torch
import torch.nn.functional as F
from bases import BASES, UNTRAINABLE, dequantised, finegrained, linears, peak
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import finegrained_fp8

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.errors import UnsupportedModelError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# "random" would hash what a layer is handed, whose last bits differ between a base that came in float8 and a plain one.
SITE = Elimination(keep=0.5, eliminated="exact", score="step")
FLOAT8 = LemoConfig(SITE, SITE, dense_layers=(), forward="float8", backward="float8")
QUANTISERS = BASES | {"finegrained": lambda model: finegrained(model, 128)}
IN_FLOAT8 = ("torchao_float8_rows", "torchao_float8_tensor", "finegrained")


def base(kind):
    """Two layers whose weights, 12 MiB in bfloat16, are most of the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=128, vocab_size=500)
    model = QUANTISERS[kind](Qwen3ForCausalLM(config).cuda().bfloat16())
    if kind == "finegrained":
        if not hasattr(finegrained_fp8, "FP8LinearFunction"):
            pytest.skip("FP8Linear of this transformers has no backward, so that its base is refused")
        layer = next(iter(linears(model).values()))
        try:
            layer(torch.zeros(16, layer.in_features, device="cuda", dtype=torch.bfloat16))
        except ImportError as error:
            pytest.skip(str(error))
    torch.manual_seed(1)
    settings = LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(model, settings).train()


def batch(length=1024):
    ids = torch.randint(0, 500, (2, length), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def step(model):
    model.zero_grad()
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def weights(model):
    """What the model's parameters are made of, in all."""
    parts = [q for p in model.parameters() for q in ((p.qdata, p.scale) if hasattr(p, "qdata") else (p,))]
    return sum(p.untyped_storage().nbytes() for p in parts)


@pytest.mark.parametrize("kind", BASES)
def test_every_token_kept_is_the_original(kind):
    model = base(kind)
    expected = step(model)
    lemo_fx.transform(model, LemoConfig(Elimination(1.0), Elimination(1.0), dense_layers=()))
    assert "not proven" not in str(lemo_fx.report(model))
    found = step(model)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-3, atol=0)
    assert F.cosine_similarity(found[1], expected[1], dim=0) > 0.995


# A compilation takes a minute.
WAYS = pytest.mark.parametrize(
    ("kind", "compiled"), [*((kind, False) for kind in IN_FLOAT8), ("torchao_float8_rows", True)]
)


@WAYS
def test_float8_plans_use_what_came(kind, compiled):
    steps = []
    for model in (dequantised(base(kind)), base(kind)):
        lemo_fx.transform(model, FLOAT8)
        if compiled:
            torch.compiler.reset()
            for layer in model.get_decoder().layers:
                layer.compile(fullgraph=True)
        steps.append(step(model))
        torch.compiler.reset()
    assert "14 linear layers came in float8" in str(lemo_fx.report(model))
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=1e-2, atol=0)
    assert F.cosine_similarity(steps[1][1], steps[0][1], dim=0) > 0.95


@WAYS
def test_no_second_copy(kind, compiled):
    """Weights stay the bytes that came, and a step takes no more than with bfloat16 ones, but for one layer's."""
    plain, model = dequantised(base(kind)), base(kind)
    for one in (plain, model):
        one.gradient_checkpointing_enable()
        before = weights(one)
        lemo_fx.transform(one, FLOAT8)
        if compiled:
            torch.compiler.reset()
            for layer in one.get_decoder().layers:
                layer.compile(fullgraph=True)
        one.taken = peak(step, one)
        assert weights(one) == before
    print(kind, compiled, "weights", weights(plain), weights(model), "a step", plain.taken, model.taken)
    assert weights(model) < 0.65 * weights(plain)
    largest = max(m.in_features * m.out_features for m in linears(model).values())
    assert model.taken <= plain.taken + 8 * largest


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_what_gives_no_gradient_is_refused(kind):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, head_dim=64
    )
    model = UNTRAINABLE[kind](Qwen3ForCausalLM(config).cuda().bfloat16())
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    with pytest.raises(UnsupportedModelError, match="gradient"):
        lemo_fx.transform(model, FLOAT8)
