"""`base="float8"`: frozen weights held in float8 in the place of their own."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import (
    LoHaConfig,
    LoraConfig,
    ShiraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny import anatomy, assert_same_step, batch, fix_choice, saved_bytes, step, tiny, with_lora
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.errors import ConfigError, UnsupportedModelError
from lemo_fx.kernels.float8_linear import held, reference
from lemo_fx.kernels.float8_linear.op import Float8Linear, Float8Switch, HeldLinear, float8_linear, held_layers

SITE = Elimination(keep=0.5, eliminated="exact", score="random")
DYNAMIC = LemoConfig(SITE, SITE, block_size=8, dense_layers=(), forward="float8", backward="float8")
HELD = LemoConfig(SITE, SITE, block_size=8, dense_layers=(), forward="float8", backward="float8", base="float8")
SIDES = [0, 2, 3, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_packing_again_gives_the_same_bytes(dtype):
    torch.manual_seed(0)
    weight = torch.randn(48, 32, dtype=dtype) * torch.logspace(-4, 1, 48)[:, None].to(dtype)
    weight[3] = 0
    packed = held.pack(weight)
    assert packed.shape == (48 * (32 + 4), 1)
    rounded, scale = held.unpack(packed, 32)
    assert rounded.untyped_storage().data_ptr() == scale.untyped_storage().data_ptr() == packed.data_ptr()
    assert all(map(torch.equal, (rounded.float(), scale), (t.float() for t in reference.quantise(weight))))
    found = held.dequantise(packed, 32, dtype)
    assert ((found - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 2**16).all()
    assert torch.equal(held.pack(found), packed)


@pytest.mark.parametrize("size", [1.0, 1e-14])
def test_a_held_weight_multiplies_as_one_that_is_rounded_anew(size):
    """The same numbers forward; backward those of the same rounded weight, however small the gradients are."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 7, 48) * size
    weight = torch.randn(48, 32) * torch.logspace(-2, 1, 48)[:, None]
    packed = held.pack(weight)
    out = held.Float8Product.apply(x, packed, 32)
    assert torch.equal(out, float8_linear(x, weight))
    out.backward(grad)
    exact = grad @ held.dequantise(packed, 32, torch.float32)
    assert 0.001 < (x.grad - exact).norm() / exact.norm() < 0.06
    error, x.grad = (x.grad - grad @ weight).norm(), None
    Float8Linear.apply(x, weight).backward(grad)
    assert error < 1.2 * (x.grad - grad @ weight).norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_float8_it_is_the_linear_layer_of_the_rounded_weight(dtype, autocast):
    torch.manual_seed(0)
    layer, switch = nn.Linear(32, 48, dtype=dtype), Float8Switch()
    layer.weight.requires_grad_(False)
    switch.connect(layer)
    switch.hold()
    x = torch.randn(5, 32, dtype=torch.float32 if autocast else dtype, requires_grad=True)
    rounded = held.dequantise(layer.weight, 32, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, product = layer(x), F.linear(x, rounded)
        # Like every product's here: rounded first, so that a bias that is trained gets its gradient.
        expected = product + layer.bias.to(product.dtype)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(out, (x, layer.bias), grad) for out in (found, expected))
    torch.testing.assert_close(ours, theirs)
    if not autocast:
        assert saved_bytes(layer, {"x": x}) <= 4 * x.numel()


def model_with(plan, architecture="llama", layers=3, dtype=torch.float32, checkpointing=False):
    model = with_lora(tiny(architecture, layers).to(dtype))
    if checkpointing:
        model.gradient_checkpointing_enable()
    lemo_fx.transform(model, plan)
    fix_choice(model, SIDES)
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "phi3"])
def test_a_step_is_that_of_weights_rounded_anew(architecture, checkpointing):
    inputs = batch(2, 64)
    expected = step(model_with(DYNAMIC, architecture, checkpointing=checkpointing), inputs)
    found = step(model_with(HELD, architecture, checkpointing=checkpointing), inputs)
    assert torch.equal(found[0], expected[0])
    flat, reference_flat = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in (found, expected))
    assert found[1].keys() == expected[1].keys()
    assert F.cosine_similarity(flat, reference_flat, dim=0) > 0.99


def test_the_weights_it_had_are_freed_and_the_parameters_stay():
    model = with_lora(tiny("llama", 2).bfloat16())
    before = dict(model.named_parameters())
    storages = [weakref.ref(layer.weight.untyped_storage()) for layer in linears(model)]
    sizes = {name: p.nbytes for name, p in before.items()}
    lemo_fx.transform(model, HELD)
    step(model, batch(2, 64))
    gc.collect()
    assert [s for s in storages if s() is not None] == []
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    layers = held_layers(model)
    assert len(layers) == len(storages) == 14
    for name, p in model.named_parameters():
        if p.dtype is torch.uint8:
            rows = p.numel() - sizes[name] // 2
            assert 0 < rows <= sizes[name] // 8
    assert "14 frozen linear layers are held in float8" in str(lemo_fx.report(model)).replace("\n", " ")


def linears(model):
    return [m for name, m in model.named_modules() if name.endswith("proj.base_layer")]


def test_evaluation_and_revert_use_the_rounded_weights():
    model, inputs = with_lora(tiny("llama", 2).bfloat16()), batch(2, 64)
    lemo_fx.transform(model, HELD)
    step(model, inputs)
    held_logits = model.eval()(inputs["input_ids"]).logits
    generated = model.generate(inputs["input_ids"][:, :8], max_new_tokens=4, do_sample=False)
    packed = [layer.weight.clone() for layer in held_layers(model)]
    lemo_fx.revert(model)
    assert {type(layer) for layer in linears(model)} == {nn.Linear}
    assert {layer.weight.dtype for layer in linears(model)} == {torch.bfloat16}
    torch.testing.assert_close(model(inputs["input_ids"]).logits, held_logits)
    assert torch.equal(model.generate(inputs["input_ids"][:, :8], max_new_tokens=4, do_sample=False), generated)
    # Rounding a second time changes nothing, so plans may follow one another.
    lemo_fx.transform(model, HELD)
    assert all(map(torch.equal, packed, [layer.weight for layer in held_layers(model)]))


def test_the_adapter_is_saved_and_loaded_as_always():
    plain, model = with_lora(tiny("llama", 2)), with_lora(tiny("llama", 2))
    lemo_fx.transform(model, HELD)
    assert list(model.state_dict()) == list(plain.state_dict())
    saved, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    doubled = {name: 2 * value for name, value in saved.items()}
    set_peft_model_state_dict(model, doubled)
    assert all(torch.equal(get_peft_model_state_dict(model)[name], doubled[name]) for name in doubled)


def test_who_takes_the_bytes_for_a_weight_gets_an_error():
    model, plain = model_with(HELD), with_lora(tiny("llama", 3))
    packed = [layer.weight.clone() for layer in held_layers(model)]
    with pytest.raises(RuntimeError, match="size"):
        plain.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size"):
        model.load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).merge_and_unload()
    assert all(map(torch.equal, packed, [layer.weight for layer in held_layers(model)]))


ADAPTERS = {
    "dora": lambda: LoraConfig(r=4, target_modules=["down_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(r=4, target_modules=["down_proj"]),
    "shira": lambda: ShiraConfig(r=2, target_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_read_the_weight_are_refused_and_nothing_is_rounded(kind):
    model = get_peft_model(tiny("llama", 2), ADAPTERS[kind]())
    before, was = {name: p.clone() for name, p in model.named_parameters()}, anatomy(model)
    with pytest.raises(UnsupportedModelError, match=r"down_proj: its adapter reads the weight .* use base='model'"):
        lemo_fx.transform(model, HELD)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert anatomy(model) == was
    step(lemo_fx.transform(model, DYNAMIC), batch(2, 64))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_come_later_and_read_the_weight_are_refused_before_any_is_rounded(kind):
    model = lemo_fx.transform(tiny("llama", 2), HELD)
    adapted = get_peft_model(model, ADAPTERS[kind]())
    before, was = {name: p.clone() for name, p in model.named_parameters()}, anatomy(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"0\.mlp\.down_proj: its adapter reads .* use base='model'"):
            step(adapted, batch(2, 64))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert anatomy(model) == was
    assert held_layers(model) == []
    step(lemo_fx.transform(adapted, DYNAMIC), batch(2, 64))


@pytest.mark.parametrize("kind", ["loha", "shira"])
def test_adapters_that_read_a_weight_which_is_held_already_are_refused(kind):
    model = lemo_fx.transform(with_lora(tiny("llama", 2), targets=["q_proj"]), HELD)
    packed = [layer.weight.clone() for layer in held_layers(model)]
    inject_adapter_in_model(ADAPTERS[kind](), model)
    with pytest.raises(UnsupportedModelError, match=r"down_proj: its adapter reads the weight .* use base='model'"):
        step(model, batch(2, 64))
    assert all(map(torch.equal, packed, [layer.weight for layer in held_layers(model)]))


def test_a_cast_of_the_model_leaves_the_bytes_alone():
    model, inputs = model_with(HELD, dtype=torch.bfloat16), batch(2, 64)
    packed = [layer.weight.clone() for layer in held_layers(model)]
    step(model.float(), inputs)
    assert all(map(torch.equal, packed, [layer.weight for layer in held_layers(model)]))
    for cast in ("half", "double", "bfloat16"):
        dense = step(lemo_fx.set_dense(getattr(model, cast)()), inputs)
        twin = lemo_fx.revert(copy.deepcopy(model))
        assert {p.dtype for p in twin.parameters()} == {getattr(torch, cast)}
        assert_same_step(step(twin, inputs), dense, "fp32" if cast == "double" else "bf16")
        lemo_fx.set_dense(model, False)
    layer = held_layers(model)[0]
    layer.weight.data = layer.weight.data.bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"held in float8 .* cast to torch.bfloat16"):
        step(model, inputs)


def test_adapters_multiply_in_float32_once_the_model_is_cast_to_it():
    """And in bfloat16 in a bfloat16 model, whatever it was when it was transformed."""
    inputs, found = batch(2, 64), {}
    for first, then in (("float", "float"), ("bfloat16", "float"), ("float", "bfloat16")):
        model = with_lora(tiny("llama", 2))
        lemo_fx.transform(getattr(model, first)(), DYNAMIC)
        step(getattr(model, then)(), inputs)
        found[first, then] = {s.in_bfloat16 for s in model.modules() if isinstance(s, Float8Switch)}
    assert found == {("float", "float"): {False}, ("bfloat16", "float"): {False}, ("float", "bfloat16"): {True}}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(how):
    model, inputs = model_with(HELD), batch(2, 64)
    twin = how(model)
    if how is copy.deepcopy:
        assert len(held_layers(twin)) == len(held_layers(model)) == 21
        assert_same_step(step(twin, inputs), step(model, inputs), "fp32")
        lemo_fx.revert(twin)
    assert held_layers(twin) == []
    assert len(held_layers(model)) == 21
    expected = lemo_fx.revert(model).eval()(inputs["input_ids"]).logits
    torch.testing.assert_close(twin.eval()(inputs["input_ids"]).logits, expected)


def test_adapters_may_come_after_the_transform():
    model, inputs = tiny("llama", 2), batch(2, 64)
    lemo_fx.transform(model, HELD)
    assert "nothing is held in float8" in str(lemo_fx.report(model))
    model = with_lora(model)
    step(model, inputs)
    assert len(held_layers(model)) == 14
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_adapter("second")
    adapters = [m for n, m in model.named_modules() if n.endswith("second")]
    assert all(m.weight.dtype.is_floating_point for m in adapters if isinstance(m, nn.Linear))
    assert all(g.isfinite().all() for g in step(model, inputs)[1].values())


def test_a_transform_that_fails_leaves_the_weights_as_they_were(monkeypatch):
    model = with_lora(tiny("llama", 2))
    before = {name: p.clone() for name, p in model.named_parameters()}

    def fails(*_, **__):
        raise ArithmeticError

    monkeypatch.setattr("lemo_fx.install.add_teller", fails)
    with pytest.raises(ArithmeticError):
        lemo_fx.transform(model, HELD)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_set_dense_computes_with_the_rounded_weights():
    model, inputs = model_with(HELD), batch(2, 64)
    lemo_fx.set_dense(model)
    dense = step(model, inputs)
    assert_same_step(step(lemo_fx.revert(model), inputs), dense, "fp32")


def test_plans_that_do_not_multiply_in_float8_are_refused():
    for precision in ({}, {"forward": "float8"}, {"backward": "float8"}):
        with pytest.raises(ConfigError, match="base='float8' is for plans"):
            LemoConfig(SITE, SITE, base="float8", **precision)
    with pytest.raises(ConfigError, match="base"):
        LemoConfig(base="bfloat16")


def test_one_frozen_layer_of_each_kind_is_held():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 9), nn.Linear(32, 32)]).requires_grad_(False)
    layers[2].weight.requires_grad_(True)
    before = [layer.weight.clone() for layer in layers]
    switch = Float8Switch()
    switch.connect(layers)
    switch.hold()
    assert [type(layer) is HeldLinear for layer in layers] == [True, False, False]
    assert repr(layers[0]) == repr(nn.Linear(32, 32))
    switch.disconnect()
    assert {type(layer) for layer in layers} == {nn.Linear}
    assert [torch.equal(layer.weight, w) for layer, w in zip(layers, before, strict=True)] == [False, True, True]


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "checkpointing"]
)
def test_compiled_without_a_break_and_no_copy_is_kept(checkpointing):
    model = model_with(HELD, layers=1, checkpointing=checkpointing)
    fix_choice(model, [0, 2, 3, 7, 8])
    if checkpointing:
        model.enable_input_require_grads()
    inputs = batch(1, 80)
    eager = step(model, inputs)
    backwards = []
    collect = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: backwards.append(graph) or make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compiler.reset()
    model.get_decoder().layers[0].compile(fullgraph=True, backend=collect)
    compiled = step(model, inputs)
    torch.compiler.reset()
    if checkpointing:
        assert_same_step(compiled, eager, "compiled")
    (graph,) = backwards
    saved = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder" and not n.name.startswith("primals")]
    sizes = {m.in_features * m.out_features for m in held_layers(model)}
    assert [v.shape for v in saved if isinstance(v, torch.Tensor) and v.numel() in sizes] == []
    assert not any(v.dtype in (torch.float8_e4m3fn, torch.uint8) for v in saved if isinstance(v, torch.Tensor))
