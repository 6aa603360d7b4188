"""Linear layers in float8: the rounding, what is left alone, the gradient, and `exact` in a whole model."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import assert_same_step, batch, fix_choice, step, tiny, with_lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lemo_fx
from lemo_fx import Elimination, LemoConfig, reporting
from lemo_fx.kernels.float8_linear import as_it_comes, reference
from lemo_fx.kernels.float8_linear.op import DTYPE, SWITCH, Float8Linear, Float8Switch, SwitchedLinear, float8_linear
from lemo_fx.planning.plans import SitePlan
from lemo_fx.reporting import in_float8


@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 32), (1, 1, 32)])
def test_the_error_is_that_of_the_rounding(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * 30, torch.randn(48, 32) / 100
    found, exact = reference.float8_linear(x, weight), F.linear(x, weight)
    assert found.shape == exact.shape
    # float8_e4m3 keeps 3 bits after the leading one: each operand errs by at most 1/16, and errors add up in squares.
    bound = (x.abs() @ weight.abs().T) * (2 / 16 + 1 / 256)
    assert ((found - exact).abs() <= bound + 1e-6).all()
    assert 0.001 < (found - exact).norm() / exact.norm() < 0.06


def test_zero_rows_and_huge_ones_stay_finite():
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e30), torch.full((16,), 1e-30)])
    found = float8_linear(x, torch.eye(16))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:2], x[:2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 32)])
def test_the_gradient_errs_by_the_rounding_alone(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(48, 32)
    grad = torch.randn(*shape[:-1], 48)
    Float8Linear.apply(x, weight).backward(grad)
    exact = grad @ weight
    assert x.grad.shape == x.shape
    assert ((x.grad - exact).abs() <= (grad.abs() @ weight.abs()) * (2 / 16 + 1 / 256) + 1e-6).all()
    assert 0.001 < (x.grad - exact).norm() / exact.norm() < 0.06


class Saved:
    """What an autograd function saves, where no autograd engine runs."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "rows", "blocks"])
def test_a_gpu_is_handed_rows_and_columns_that_it_takes(kind, transposed):
    """Of tensors that know their layout and hold nothing: torch checks the matmul as a GPU would."""

    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def stream(width):
        return make(1, width, 16).transpose(1, 2) if transposed else make(1, 16, width)

    with FakeTensorMode():
        rounded = make(48, 32, dtype=torch.float8_e4m3fn)
        function, weight = {
            "plain": (Float8Linear, (make(48, 32),)),
            "rows": (as_it_comes.Float8Product, (rounded, make(48, 1), (1, 32))),
            "blocks": (as_it_comes.Float8Product, (rounded, make(3, 2), (16, 16))),
        }[kind]
        saved = Saved()
        out = function.forward(saved, stream(32), *weight)
        gradient = function.backward(saved, stream(48))[0]
    assert (out.shape, gradient.shape) == ((1, 16, 48), (1, 16, 32))
    assert out.dtype is gradient.dtype is torch.bfloat16


def test_only_frozen_layers_with_fitting_sides_change():
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    trained, frozen, odd = nn.Linear(32, 32), nn.Linear(32, 32).requires_grad_(False), nn.Linear(32, 9)
    odd.requires_grad_(False)
    for layer, changes in ((trained, False), (frozen, True), (odd, False)):
        before, switch = layer(x), Float8Switch()
        switch.connect(layer)
        assert repr(layer) == repr(nn.Linear(*layer.weight.shape[::-1]))
        assert torch.equal(layer(x), before)
        assert torch.equal(switch.run(layer, x), before) != changes
        switch.disconnect()
        assert type(layer) is nn.Linear
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_adapters_multiply_in_bfloat16_where_the_model_is_in_it(dtype):
    torch.manual_seed(0)
    adapter = nn.Linear(32, 16)
    layers = nn.ModuleList([adapter, nn.Linear(32, 32, dtype=dtype).requires_grad_(False)])
    x, grad = torch.randn(5, 32), torch.randn(5, 16)
    switch = Float8Switch()
    switch.connect(layers)
    switch.run(adapter, x).backward(grad)
    rounded, adapter.weight.grad = adapter.weight.grad, None
    adapter(x).backward(grad)
    assert rounded.dtype == switch.run(adapter, x).dtype == torch.float32
    if dtype is torch.float32:
        assert torch.equal(switch.run(adapter, x), adapter(x))
        return
    expected = F.linear(x.bfloat16(), adapter.weight.bfloat16(), adapter.bias.bfloat16()).float()
    assert torch.equal(switch.run(adapter, x), expected)
    assert torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, adapter.weight.grad, rtol=2**-6, atol=2**-4)


SITE = Elimination(keep=0.5, eliminated="exact", score="random")


def config(block_size=8, **precision):
    return LemoConfig(SITE, SITE, block_size=block_size, dense_layers=(), **precision)


FORWARD = {"forward": "float8"}
BOTH = {"forward": "float8", "backward": "float8"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", [FORWARD, {"backward": "float8"}, BOTH], ids="+".join)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "phi3", "gpt2"])
def test_exact_in_a_model(architecture, precision, checkpointing):
    """The loss moves by float8's rounding, gradients point where they did, and the frozen model is not touched."""
    model = with_lora(tiny(architecture, 3))
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch(2, 64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    lemo_fx.transform(model, config())
    fix_choice(model, [0, 2, 3, 7])
    loss, gradients = step(model, inputs)
    lemo_fx.transform(model, config(**precision))
    fix_choice(model, [0, 2, 3, 7])
    rounded_loss, rounded = step(model, inputs)
    # GPT-2 has no linear layer of torch's: its Conv1D computes as always.
    assert (rounded_loss != loss) == (architecture != "gpt2")
    assert abs(rounded_loss - loss) < 0.05 * loss
    flat, flat_rounded = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, rounded))
    assert F.cosine_similarity(flat, flat_rounded, dim=0) > 0.9
    assert torch.equal(flat, flat_rounded) == (architecture == "gpt2")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    lemo_fx.revert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("treatment", ["skip", "shared", None], ids=["skip", "shared", "no_elimination"])
@pytest.mark.parametrize("precision", [FORWARD, {"backward": "float8"}, BOTH], ids="+".join)
def test_what_is_not_exact_takes_part_where_all_is_in_float8(treatment, precision):
    site = treatment and Elimination(keep=0.5)
    mlp = Elimination(keep=0.5, score="shared") if treatment == "shared" else site
    model, inputs = with_lora(tiny("llama", 4)), batch(2, 64)
    kinds = [type(module) for module in model.modules()]
    losses = {}
    for name, settings in (("model", {}), ("float8", precision)):
        lemo_fx.transform(model, LemoConfig(site, mlp, block_size=8, **settings))
        assert count_switched(model) == (4 if settings == BOTH else 0)
        assert all(("in float8" in site.note) == (settings == BOTH) for site in lemo_fx.report(model).sites)
        if site:
            fix_choice(model, [0, 2, 3, 7])
        losses[name], gradients = step(model, inputs)
        assert all(g.isfinite().all() for g in gradients.values())
        lemo_fx.revert(model)
    assert (losses["float8"] != losses["model"]) == (precision == BOTH)
    assert abs(losses["float8"] - losses["model"]) < 0.05 * losses["model"]
    assert [type(module) for module in model.modules()] == kinds


def count_switched(model):
    """Decoder layers all of whose seven frozen linear layers are called with their switch on, in a forward."""
    on, forward = set(), SwitchedLinear.forward

    def note(layer, x):
        if vars(layer).get(SWITCH) and vars(layer)[SWITCH].on:
            on.add(layer)
        return forward(layer, x)

    layers = model.get_base_model().model.layers
    found = [[m for n, m in layer.named_modules() if n.endswith("proj.base_layer")] for layer in layers]
    # No hooks: a layer with one runs its original code.
    SwitchedLinear.forward = note
    try:
        model(**batch(2, 64))
    finally:
        SwitchedLinear.forward = forward
    return sum(len(linears) == 7 and on.issuperset(linears) for linears in found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_bias_that_is_trained_gets_its_gradient(checkpointing):
    model = with_lora(tiny("opt", 4), bias="lora_only")
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = step(lemo_fx.transform(model, config(block_size=16)), batch(2, 64))[1]
    found = step(lemo_fx.transform(model, config(block_size=16, **BOTH)), batch(2, 64))[1]
    assert found.keys() == expected.keys()
    assert any(name.endswith("bias") for name in found)
    # A key's bias adds the same to all scores of a query, which changes nothing.
    for name, gradient in ((name, g) for name, g in found.items() if "k_proj.base_layer" not in name):
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("order", ["before", "after", "second"])
def test_adapters_may_come_after_the_transform(order):
    plan = LemoConfig(SITE, SITE, block_size=8, **BOTH)
    model = tiny("llama", 4).bfloat16()
    if order == "before":
        model = lemo_fx.transform(with_lora(model), plan)
    else:
        notes = [site.note for site in lemo_fx.report(lemo_fx.transform(model, plan)).sites]
        assert all("no frozen linear layer" in note for note in notes)
        model = with_lora(model)
    if order == "second":
        step(model, batch(2, 64))
        model.delete_adapter("default")
        torch.manual_seed(1)
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model.add_adapter("default", settings)
        model.set_adapter("default")
    assert count_switched(model) == 4
    assert all("in float8" in site.note for site in lemo_fx.report(model).sites)
    adapters = [m for name, m in model.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))]
    assert {m.weight.dtype for m in adapters} == {torch.float32}
    assert len(adapters) == 4 * 7 * 2
    assert all(vars(m)[SWITCH].in_bfloat16 for m in adapters)
    lemo_fx.revert(model)
    assert {type(m) for m in adapters} == {nn.Linear}


def test_the_report_says_where_float8_has_nothing_to_do():
    only = LemoConfig(None, None, block_size=8, **BOTH)
    sites = lemo_fx.report(lemo_fx.transform(with_lora(tiny("gpt2", 2)), only)).sites
    # GPT-2's Conv1D is no linear layer of torch's.
    assert [site.note.split("; ")[-1] for site in sites] == ["no frozen linear layer that float8 takes"] * 4


def test_the_report_says_what_a_device_does_not_multiply(monkeypatch):
    row = SitePlan("mlp", "mlp", "exact", float8="in float8", called=("0", "1"))
    branch = nn.Sequential(nn.Linear(32, 64), nn.GELU()).requires_grad_(False)
    # The CPU rounds float32 as if it multiplied float8.
    assert in_float8(branch, row) == "in float8"
    branch.to("meta")
    assert in_float8(branch, row) == "not in float8, which meta does not multiply"
    monkeypatch.setattr(reporting, "has_float8", lambda device: True)
    for dtype in (torch.float32, torch.float16):
        said = in_float8(branch.to(dtype), row)
        assert said.startswith(f"in float8, {str(dtype)[6:]} layers only where autocast hands them bfloat16;")
    assert in_float8(branch.bfloat16(), row) == "in float8"
    # One layer of several is enough, and one that is held in float8 has the dtype that it had.
    held = nn.Linear(64, 32, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    vars(held)[DTYPE] = torch.float16
    assert in_float8(nn.Sequential(branch[0], held), row).startswith("in float8, float16 layers only where autocast")


def test_keep_one_stays_the_originals_arithmetic():
    model, inputs = with_lora(tiny("llama", 2)), batch(2, 64)
    expected = step(model, inputs)
    for treatment in ("skip", "exact"):
        site = Elimination(keep=1.0, eliminated=treatment)
        lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=(), **BOTH))
        assert_same_step(step(model, inputs), expected, "fp32")


# Compiled and checkpointed, the kept rows' values come from the forward in float8; eager, from their own branch: with
# checkpointing, equal only where both are in float8.
@pytest.mark.parametrize(
    ("precision", "checkpointing", "recompute"),
    [(FORWARD, False, "all"), (BOTH, True, "all"), (BOTH, True, "elementwise")],
    ids=["forward", "both", "elementwise"],
)
@pytest.mark.slow
def test_compiled_without_a_break(precision, checkpointing, recompute):
    model = with_lora(tiny("llama", 2))
    if checkpointing:
        model.gradient_checkpointing_enable()
    lemo_fx.transform(model, config(recompute=recompute, **precision))
    inputs = batch(2, 64)
    loss, gradients = step(model, inputs)
    torch.compiler.reset()
    model.base_model.model.model.layers[1].compile(fullgraph=True, backend="aot_eager")
    compiled_loss, compiled = step(model, inputs)
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient)
