"""QLoRA under plans in float8: frozen layers in bitsandbytes' 4 bits, unpacked and rounded for each product."""

import copy

import pytest
import torch
import torch.nn.functional as F
from bases import dequantised, four_bits, linears
from peft import PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training
from tiny import assert_same_step, batch, fix_choice, step, tiny, with_lora
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from training import plan

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.runtime import branch

bnb = pytest.importorskip("bitsandbytes")

SITE = Elimination(keep=0.5, eliminated="exact", score="random")
BOTH = {"forward": "float8", "backward": "float8"}
FLOAT8 = LemoConfig(SITE, SITE, block_size=8, dense_layers=(), **BOTH)
SIDES = [0, 2, 3, 7]


@pytest.fixture
def base(tmp_path):
    """Loads the same tiny model in 4 bits every time, frozen as PEFT prepares it."""

    def load(layers=2, prepare=True, **settings):
        model = four_bits(tiny("llama", layers, hidden_size=64, intermediate_size=128), tmp_path, **settings)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if prepare else model

    return load


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def classes(model):
    return [(type(m), type(m.weight), m.weight.data_ptr()) for m in linears(model).values()]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_float8_plans_multiply_with_the_unpacked_weights(base, compute):
    """As a base of the same weights that never was in 4 bits, and no more than by rounding apart from bfloat16's."""
    settings = {"compute": compute, "nested": compute is torch.bfloat16}
    inputs, model = batch(2, 64), with_lora(base(**settings))
    before, expected = classes(model), step(model, inputs)
    steps = {}
    for name, one in (("plain", dequantised(with_lora(base(**settings)))), ("packed", model)):
        lemo_fx.transform(one, FLOAT8)
        fix_choice(one, SIDES)
        steps[name] = step(one, inputs)
    assert_same_step(steps["packed"], steps["plain"], "fp32")
    report = lemo_fx.report(model)
    assert {site.note for site in report.sites} == {"in float8"}
    assert "14 frozen linear layers are in 4 bits (bitsandbytes)" in str(report)

    model.gradient_checkpointing_enable()
    assert_same_step(step(model, inputs), steps["packed"], "fp32")
    model.gradient_checkpointing_disable()
    lemo_fx.transform(model, plan(eliminated="exact", score="random"))
    fix_choice(model, SIDES)
    model_precision = step(model, inputs)
    assert classes(model) == before
    assert "in 4 bits" not in str(lemo_fx.report(model))
    torch.testing.assert_close(steps["packed"][0], model_precision[0], rtol=0.02, atol=0)
    assert 0.9 < F.cosine_similarity(flat(steps["packed"][1]), flat(model_precision[1]), dim=0) < 0.9999
    lemo_fx.revert(model)
    assert classes(model) == before
    assert_same_step(step(model, inputs), expected, "fp32")


def test_adapters_may_come_after_and_base_float8_holds_nothing(base):
    inputs, steps = batch(2, 64), []
    for config in (FLOAT8, LemoConfig(SITE, SITE, block_size=8, dense_layers=(), base="float8", **BOTH)):
        for order in ("before", "after"):
            model = base(prepare=False)
            model = with_lora(model) if order == "before" else model
            lemo_fx.transform(model, config)
            model = model if order == "before" else with_lora(model)
            fix_choice(model, SIDES)
            steps.append(step(model, inputs))
            assert_same_step(steps[-1], steps[0], "fp32")
            report = str(lemo_fx.report(model))
            assert "14 frozen linear layers are in 4 bits" in report
            assert "held" not in report


def test_the_adapter_saved_is_the_same_and_a_copy_is_that_of_the_base(base, tmp_path):
    model, inputs = with_lora(base()), batch(2, 64)
    expected, kinds = step(model, inputs), [kind[:2] for kind in classes(model)]
    keys = get_peft_model_state_dict(model).keys()
    lemo_fx.transform(model, FLOAT8)
    step(model, inputs)
    assert get_peft_model_state_dict(model).keys() == keys
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True).train()
    assert_same_step(step(loaded, inputs), expected, "fp32")
    twin = lemo_fx.revert(copy.deepcopy(model))
    assert [kind[:2] for kind in classes(twin)] == kinds
    assert_same_step(step(twin, inputs), expected, "fp32")


def test_no_unpacked_weight_is_kept_for_the_backward(base):
    model, inputs = with_lora(base()), batch(1, 40)
    lemo_fx.transform(model, FLOAT8)
    sizes, kept = {m.in_features * m.out_features for m in linears(model).values()}, []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        model(**inputs)
    assert [t.shape for t in kept if t.numel() in sizes and t.is_floating_point()] == []


def unpacked(graph):
    """How often a graph unpacks a weight."""
    return sum(node.target is torch.ops.lemo_fx.unpack_4bit.default for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_compiled_pieces_share_what_is_unpacked_and_none_is_kept(base, checkpointing, monkeypatch):
    """Seven weights: once for the values of all rows, at most once for kept rows, and once for gradients."""
    # In pieces of eight tokens.
    monkeypatch.setattr(branch, "SEGMENT", 8)
    model, inputs = with_lora(base(layers=1)), batch(1, 80)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lemo_fx.transform(model, FLOAT8)
    fix_choice(model, [0, 2, 3, 7, 8])
    model.enable_input_require_grads()
    eager, graphs = step(model, inputs), {}
    collect = aot_autograd(
        fw_compiler=lambda graph, _: graphs.setdefault("forward", graph) and make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: graphs.setdefault("backward", graph) and make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compiler.reset()
    model.get_decoder().layers[0].compile(fullgraph=True, backend=collect)
    assert_same_step(step(model, inputs), eager, "compiled")
    torch.compiler.reset()
    # Kept rows need no last product of a branch: its values come from all rows.
    assert unpacked(graphs["forward"]) == 7 or not checkpointing
    assert sum(map(unpacked, graphs.values())) <= 7 + 6 + 7
    placeholders = [n for n in graphs["backward"].graph.nodes if n.op == "placeholder" and "primals" not in n.name]
    saved = [n.meta["val"] for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor)]
    sizes = {m.in_features * m.out_features for m in linears(model).values()}
    assert [v.shape for v in saved if v.numel() in sizes] == []
    assert [v for v in saved if v.dtype is torch.float8_e4m3fn] == []
