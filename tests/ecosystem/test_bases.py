"""Bases that come quantised, in float8 above all: used as they are, without a second copy."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from bases import BASES, UNTRAINABLE, dequantised, finegrained, finegrained_product, in_blocks, linears, out_of_blocks
from peft import PeftModel, get_peft_model_state_dict
from tiny import anatomy, assert_same_step, batch, fix_choice, step, tiny, with_lora
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from training import plan
from transformers.integrations import finegrained_fp8

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.errors import UnsupportedModelError
from lemo_fx.kernels.float8_linear import as_it_comes
from lemo_fx.kernels.float8_linear.op import held_layers

SITE = Elimination(keep=0.5, eliminated="exact", score="random")
FLOAT8 = LemoConfig(SITE, SITE, block_size=8, dense_layers=(), forward="float8", backward="float8")
HELD = LemoConfig(SITE, SITE, block_size=8, dense_layers=(), forward="float8", backward="float8", base="float8")
SIDES = [0, 2, 3, 7]
CHOSEN = ("torchao_float8_rows", "torchao_int8", "finegrained")
IN_FLOAT8 = ("torchao_float8_rows", "torchao_float8_tensor", "finegrained")


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Transformers' own product needs a GPU."""
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", finegrained_product)


def base(kind, dtype=torch.float32, layers=2, **sizes):
    return BASES[kind](tiny("qwen3", layers, hidden_size=64, intermediate_size=128, **sizes).to(dtype))


def tensors(model):
    """What a model's weights are made of, by name, as bytes."""
    found = {}
    for name, p in model.named_parameters():
        parts = {"": p} if not hasattr(p, "qdata") else {".qdata": p.qdata, ".scale": p.scale}
        found |= {name + part: value.detach().clone() for part, value in parts.items()}
    return {name: value.view(torch.uint8) if value.itemsize == 1 else value for name, value in found.items()}


@pytest.mark.parametrize("adapters_first", [True, False])
def test_a_step_is_that_of_the_dequantised_weights(adapters_first):
    inputs = batch(2, 64, padding="both")
    for kind in BASES:
        expected = step(dequantised(with_lora(base(kind))), inputs)
        model = base(kind)
        model = with_lora(model) if adapters_first else model
        before = tensors(model)
        lemo_fx.transform(model, plan(1.0, score="random"))
        assert all(torch.equal(value, before[name]) for name, value in tensors(model).items()), kind
        model = model if adapters_first else with_lora(model)
        assert_same_step(step(model, inputs), expected, "fp32")
        assert "not proven" not in str(lemo_fx.report(model))
        lemo_fx.revert(model)
        assert_same_step(step(model, inputs), expected, "fp32")


@pytest.mark.parametrize("kind", CHOSEN)
def test_exact_on_some_tokens_and_back(kind):
    inputs, steps = batch(2, 64), []
    model, plain = with_lora(base(kind)), dequantised(with_lora(base(kind)))
    before = [(type(m), type(m.weight)) for m in linears(model).values()]
    for one in (plain, model):
        lemo_fx.transform(one, plan(eliminated="exact", score="random"))
        fix_choice(one, SIDES)
        steps.append(step(one, inputs))
    assert_same_step(steps[1], steps[0], "fp32")
    model.gradient_checkpointing_enable()
    assert_same_step(step(model, inputs), steps[0], "fp32")
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(model.eval()(**inputs).loss, plain.eval()(**inputs).loss)
    lemo_fx.revert(model.train())
    assert [(type(m), type(m.weight)) for m in linears(model).values()] == before


def weights_kept(model, inputs):
    """How many weights, de-quantised or in bfloat16, a forward keeps for the backward."""
    sizes = {m.in_features * m.out_features for m in linears(model).values()}
    kept = []

    def keep(tensor):
        if type(tensor) is torch.Tensor and tensor.itemsize > 1 and tensor.numel() in sizes:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return len(kept)


@pytest.mark.parametrize("kind", CHOSEN)
def test_no_dequantised_weight_is_kept_for_the_backward(kind):
    if kind == "finegrained" and not hasattr(finegrained_fp8, "FP8LinearFunction"):
        pytest.skip("of a transformers whose product has no backward, this test's stand-in keeps them")
    model, inputs = with_lora(base(kind, num_key_value_heads=4)), batch(1, 40)
    # Torchao's own product keeps one.
    assert weights_kept(model, inputs) == (11 if kind.startswith("torchao") else 0)
    for config in (plan(1.0, score="random"), plan(eliminated="exact", score="random"), FLOAT8, HELD):
        lemo_fx.transform(model, config)
        assert weights_kept(model, inputs) == 0
        assert held_layers(model) == []


@pytest.mark.parametrize("kind", IN_FLOAT8)
def test_float8_plans_multiply_with_the_weights_that_came(kind):
    """As with the de-quantised weights, which are rounded anew: to what came, where each row has its scale."""
    inputs, steps = batch(2, 64), []
    for model in (dequantised(with_lora(base(kind))), with_lora(base(kind))):
        lemo_fx.transform(model, FLOAT8)
        fix_choice(model, SIDES)
        steps.append(step(model, inputs))
    report = str(lemo_fx.report(model))
    assert "in float8" in report
    assert "14 linear layers came in float8, and are used as they are" in report
    assert torch.equal(steps[1][0], steps[0][0]) or kind != "torchao_float8_rows"
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=0.01, atol=0)
    flat = [torch.cat([g.flatten() for g in found[1].values()]).float() for found in steps]
    assert F.cosine_similarity(*flat, dim=0) > (0.98 if kind == "torchao_float8_rows" else 0.95)
    lemo_fx.transform(model, HELD)
    fix_choice(model, SIDES)
    assert_same_step(step(model, inputs), steps[1], "fp32")
    assert "nothing is held" not in str(lemo_fx.report(model))


def test_weights_in_integers_compute_in_their_own_way_under_float8_plans():
    model, inputs = with_lora(base("torchao_int8")), batch(2, 64)
    steps = []
    for config in (plan(eliminated="exact", score="random"), FLOAT8):
        lemo_fx.transform(model, config)
        fix_choice(model, SIDES)
        steps.append(step(model, inputs))
    assert_same_step(steps[1], steps[0], "fp32")
    assert {site.note for site in lemo_fx.report(model).sites} == {"no frozen linear layer that float8 takes"}


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", ["torchao_float8_rows", "finegrained"])
def test_copies_and_saved_adapters_are_those_of_the_base_that_came(kind, tmp_path):
    model, inputs = with_lora(base(kind)), batch(2, 64)
    expected = step(model, inputs)
    classes = [type(m) for m in linears(model).values()]
    lemo_fx.transform(model, FLOAT8)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path, is_trainable=True)
    assert get_peft_model_state_dict(loaded).keys() == get_peft_model_state_dict(model).keys()
    assert_same_step(step(loaded.train(), inputs), expected, "fp32")
    twin = lemo_fx.revert(copy.deepcopy(model))
    # Torchao's configs are not pickled.
    for other in (twin, saved_and_loaded(model)) if kind == "finegrained" else (twin,):
        assert [type(m) for m in linears(other).values()] == classes
        assert_same_step(step(other, inputs), expected, "fp32")


def test_bases_that_pass_no_gradient_are_refused_by_name():
    for kind, quantise in UNTRAINABLE.items():
        model = with_lora(quantise(tiny("qwen3", hidden_size=64).bfloat16()))
        before = anatomy(model)
        words = (
            r"layers\.\d\.self_attn\.q_proj\.base_layer: Linear .*no gradient.*use weights alone .*Int8WeightOnlyConfig"
        )
        with pytest.raises(UnsupportedModelError, match=words):
            lemo_fx.transform(model, plan())
        assert anatomy(model) == before, kind


def test_so_they_are_when_a_part_of_the_gradient_is_lost(monkeypatch):
    """As by a product of older transformers, or an activation that is rounded without a straight way through."""
    model = with_lora(finegrained(tiny("qwen3", hidden_size=64)))
    own = finegrained_fp8.FP8Linear.forward
    monkeypatch.setattr(finegrained_fp8.FP8Linear, "forward", lambda self, x: own(self, x.detach()))
    with pytest.raises(UnsupportedModelError, match=r"gives its input no gradient, .*dequantize=True"):
        lemo_fx.transform(model, FLOAT8)
    half = lambda self, x: own(self, torch.cat([x[..., :32], x[..., 32:].detach()], -1))  # noqa: E731
    monkeypatch.setattr(finegrained_fp8.FP8Linear, "forward", half)
    with pytest.raises(UnsupportedModelError, match="gives its input a wrong gradient"):
        lemo_fx.transform(model, FLOAT8)


def test_a_kernel_that_is_missing_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("finegrained-fp8 kernel unavailable: `kernels` is not installed")

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", missing)
    model = with_lora(finegrained(tiny("qwen3", hidden_size=64)))
    with pytest.raises(UnsupportedModelError, match=r"FP8Linear .*does not run, .*`kernels` is not installed; use"):
        lemo_fx.transform(model, plan())


def test_blocks_that_do_not_divide_a_weight():
    weight = torch.randn(40, 56)
    weight[16:32] = 0
    rounded, scale = in_blocks(weight, 16)
    assert scale.shape == (3, 4)
    expected = out_of_blocks(rounded, scale, 16)
    columns, row_scale = as_it_comes.by_rows(rounded, scale, (16, 16))
    assert row_scale.shape == (40, 1)
    assert (columns.float() * row_scale - expected).norm() < 0.04 * expected.norm()
    for turn in (1, 2):
        again = as_it_comes.by_rows(rounded, scale, (16, 16), turn)
        assert torch.equal(again[0].float(), columns.float())
        assert torch.equal(again[1], row_scale)
    x, grad = torch.randn(5, 56, requires_grad=True), torch.randn(5, 40)
    out = as_it_comes.float8_product(x, (rounded, scale, (16, 16)))
    assert (out - x @ expected.T).norm() < 0.06 * out.norm()
    out.backward(grad)
    assert (x.grad - grad @ expected).norm() < 0.06 * x.grad.norm()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("config", [plan(eliminated="exact", score="random"), FLOAT8], ids=["bf16", "float8"])
def test_compiled_without_a_break_and_no_copy_is_kept(config, checkpointing):
    for kind in ("torchao_float8_rows", "torchao_int8", "finegrained"):
        # The kernel's stand-in de-quantises where a compiler sees it.
        if kind == "finegrained" and config.forward != "float8":
            continue
        model, inputs = with_lora(base(kind, layers=1)), batch(1, 80)
        if checkpointing:
            model.gradient_checkpointing_enable()
        lemo_fx.transform(model, config)
        fix_choice(model, [0, 2, 3, 7, 8])
        if checkpointing:
            model.enable_input_require_grads()
        eager, backwards = step(model, inputs), []
        collect = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            bw_compiler=lambda graph, _, found=backwards: found.append(graph) or make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
        )
        torch.compiler.reset()
        model.get_decoder().layers[0].compile(fullgraph=True, backend=collect)
        assert_same_step(step(model, inputs), eager, "compiled")
        torch.compiler.reset()
        (graph,) = backwards
        saved = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder" and "primals" not in n.name]
        sizes = {m.in_features * m.out_features for m in linears(model).values()}
        assert [v.shape for v in saved if isinstance(v, torch.Tensor) and v.numel() in sizes] == []
