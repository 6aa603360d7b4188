"""The plain `exact` of the studies is the package's where they do the same, and what it adds is what it says."""

import itertools
import json
import re
from pathlib import Path

import float8_attention
import plain_exact
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from plain_exact import Exact, Float8
from tiny import tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig

ROOT = Path(__file__).parents[2]
IDS = torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(0))
ANSWERS = torch.where(torch.arange(128) >= 122, IDS, -100)


@pytest.fixture
def model():
    return tiny("llama", layers=4)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    model = get_peft_model(
        tiny("llama", layers=4), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    return model.train()


def gradients(model, labels=IDS):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("keys", "name"), [("kept", "kept"), ("complete", "every")])
def test_it_is_the_packages_exact_on_the_same_tokens(adapted, keys, name):
    site = Elimination(keep=0.25, slope=0.3, eliminated="exact")
    attention = Elimination(keep=0.25, slope=0.3, eliminated="exact", keys=name)
    tokens = {}
    lemo_fx.transform(adapted, LemoConfig(attention=attention, mlp=site, block_size=8, loss_segments=None))
    for index, layer in enumerate(adapted.base_model.model.model.layers):
        if hasattr(layer, "lemo_attention_select"):
            layer.lemo_attention_select.register_forward_hook(lambda m, a, out, i=index: tokens.__setitem__(i, out))
    loss, theirs = gradients(adapted)
    lemo_fx.revert(adapted)
    with plain_exact.exact(adapted, Exact(0.25, 0.3, block=8, keys=keys), choose=tokens.get):
        same, ours = gradients(adapted)
    assert sorted(tokens) == [1, 2]
    assert tokens[1].shape[1] < tokens[2].shape[1]
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keys", ["kept", "every", "complete"])
def test_the_forward_is_the_models_and_everything_kept_is_the_models_gradient(model, keys):
    loss, dense = gradients(model)
    with plain_exact.exact(model, Exact(1.0, block=8, keys=keys, dense=())):
        same, ours = gradients(model)
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)
    with plain_exact.exact(model, Exact(0.25, block=8, keys=keys, dense=())):
        assert gradients(model)[0] == pytest.approx(loss, rel=1e-6)
    assert gradients(model)[0] == pytest.approx(loss, rel=1e-6)


def test_every_key_completes_the_gradient_of_a_kept_query(adapted):
    # With all layers but the last dense in effect (the loss reads kept rows only), the last layer's q hears all it can.
    settings = {"block": 8, "dense": (0, 1, 2)}
    _, dense = gradients(adapted, ANSWERS)
    found = {}
    for keys in ("kept", "every", "complete"):
        with plain_exact.exact(adapted, Exact(0.25, keys=keys, **settings)):
            found[keys] = gradients(adapted, ANSWERS)[1]
    name = "base_model.model.model.layers.3.self_attn.{}_proj.lora_B.default.weight"
    for projection, right in {"q": {"every", "complete"}, "k": {"complete"}, "v": {"complete"}}.items():
        for keys, grads in found.items():
            close = torch.allclose(grads[name.format(projection)], dense[name.format(projection)], rtol=1e-3, atol=1e-7)
            assert close == (keys in right), (projection, keys)


def test_compensated_gradients_are_right_on_average(adapted):
    """Over all choices of two of four blocks, the gradient of a layer's keys and values is the dense one."""
    settings = {"block": 32, "dense": (0, 1, 2), "keys": "every"}
    own = re.compile(r"layers\.3\.self_attn\.[kv]_proj\.lora_B")
    _, dense = gradients(adapted)
    pairs = list(itertools.combinations(range(4), 2))
    off = {}
    for compensated in (False, True):
        total = {name: torch.zeros_like(grad) for name, grad in dense.items() if own.search(name)}
        for pair in pairs:
            tokens = torch.cat([torch.arange(32 * block, 32 * block + 32) for block in pair]).expand(2, -1)
            how = Exact(0.5, compensated=compensated, **settings)
            with plain_exact.exact(adapted, how, choose=lambda index, tokens=tokens: tokens):
                for name, grad in gradients(adapted)[1].items():
                    if name in total:
                        # A block's own queries are kept every second time.
                        total[name] += 2 * grad / len(pairs)
        off[compensated] = max(((total[n] - dense[n]).norm() / dense[n].norm()).item() for n in total)
    assert len(total) == 2
    assert off[True] < 1e-4, off
    assert off[False] > 0.1, off


def test_the_gradient_of_unkept_keys_stops_in_their_layer(adapted):
    # Layer 3 keeps the same tokens either way; what layers below hear of its unkept keys is nothing.
    found = {}
    for keys in ("every", "complete"):
        with plain_exact.exact(adapted, Exact(0.25, block=8, keys=keys, dense=(0, 1, 2))):
            found[keys] = gradients(adapted, ANSWERS)[1]
    for name, grad in found["every"].items():
        if ".layers.3." not in name:
            torch.testing.assert_close(found["complete"][name], grad)


def test_labelled_tokens_are_kept_and_the_choice_is_redrawn(adapted):
    seen = []
    original = plain_exact._sparse_layer

    def spy(layer, step, hidden, tokens, rotary):
        seen.append(tokens)
        return original(layer, step, hidden, tokens, rotary)

    plain_exact._sparse_layer = spy
    try:
        with plain_exact.exact(adapted, Exact(0.25, block=8, dense=(0, 1, 3))):
            for _ in range(2):
                gradients(adapted, ANSWERS)
    finally:
        plain_exact._sparse_layer = original
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    for tokens in seen:
        assert all(set(range(120, 128)) <= set(row) for row in tokens.tolist())


@pytest.mark.parametrize("part", ["forward", "recompute", "gradient", "dense"])
def test_each_part_is_rounded_alone(adapted, part):
    plain = Exact(0.5, block=8)
    with plain_exact.exact(adapted, plain):
        loss, exact = gradients(adapted)
    none = {"forward": False, "recompute": False, "gradient": False, "dense": False}
    with plain_exact.exact(adapted, Exact(0.5, block=8, float8=Float8(**none))):
        same, unrounded = gradients(adapted)
    assert same == loss
    torch.testing.assert_close(unrounded, exact)
    with plain_exact.exact(adapted, Exact(0.5, block=8, float8=Float8(**none | {part: True}))):
        other, rounded = gradients(adapted)
    assert (other != loss) == (part in ("forward", "dense"))
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)


def test_a_forward_in_float8_is_the_packages(adapted):
    site = Elimination(keep=0.5, eliminated="exact")
    tokens = {}
    config = LemoConfig(
        attention=site, mlp=site, block_size=8, loss_segments=None, forward="float8", dense_layers=(0, 3)
    )
    lemo_fx.transform(adapted, config)
    for index, layer in enumerate(adapted.base_model.model.model.layers):
        if hasattr(layer, "lemo_attention_select"):
            layer.lemo_attention_select.register_forward_hook(lambda m, a, out, i=index: tokens.__setitem__(i, out))
    loss, _ = gradients(adapted)
    lemo_fx.revert(adapted)
    forward = Float8(recompute=False, gradient=False, dense=False)
    with plain_exact.exact(adapted, Exact(0.5, block=8, float8=forward), choose=tokens.get):
        assert gradients(adapted)[0] == pytest.approx(loss, rel=2e-3)


def test_weights_are_rounded_otherwise_in_every_step(adapted):
    how = Float8(inputs=False, redraw=True)
    x = torch.randn(4, 32)
    weight = torch.randn(64, 32)
    right = x @ weight.T
    errors = [plain_exact.product(x, weight, how, 2 ** (i / 16)) - right for i in range(16)]
    assert torch.stack(errors).mean(0).norm() < 0.6 * errors[0].norm()
    with plain_exact.exact(adapted, Exact(0.5, block=8, float8=how)):
        assert gradients(adapted)[0] != gradients(adapted)[0]
    with plain_exact.exact(adapted, Exact(0.5, block=8, float8=Float8(until=0.5)), steps=2):
        rounded = gradients(adapted)[0]
        plain = gradients(adapted)[0]
    assert plain == pytest.approx(gradients(adapted)[0], rel=1e-6)
    assert rounded != plain


@pytest.mark.parametrize("how", [Float8(weights_to="int8", inputs_to="int8"), Float8(weights_to="int8")])
def test_products_with_int8_are_those_of_the_rounded_operands(how):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(32, 64)
    rows, row_scale = plain_exact.quantise(x, to=how.inputs_to)
    columns, column_scale = plain_exact.quantise(weight, to="int8")
    expected = (rows.float() * row_scale) @ (columns.float() * column_scale).T
    torch.testing.assert_close(plain_exact.product(x, weight, how, 1.0), expected)
    assert columns.dtype is torch.int8
    assert columns.abs().amax(1).eq(127).all()
    float8, scale = plain_exact.quantise(weight)
    assert (columns * column_scale - weight).norm() < 0.5 * (float8.float() * scale - weight).norm()


def test_gradients_stay_in_float8_where_the_forward_is_in_int8():
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    found = []
    for how in (Float8(weights_to="int8", inputs_to="int8"), Float8()):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = plain_exact._Product.apply(x, weight, how, True, True, 1.0)
        out.backward(torch.ones_like(out))
        found.append((out.detach(), x.grad))
    assert not torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_mean_input_loses_nothing_to_rounded_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64) * 0.1 + torch.randn(64), torch.randn(32, 64)
    errors = {}
    for mean in (False, True):
        out = plain_exact.product(x, weight, Float8(inputs=False, mean=mean), 1.0)
        errors[mean] = (out - x @ weight.T).norm()
        torch.testing.assert_close(out.mean(0), x.mean(0) @ weight.T, rtol=0, atol=1e-5 if mean else 1.0)
    assert errors[True] < 0.2 * errors[False]
    centred = plain_exact.product(x, weight, Float8(inputs=False, mean=True, centred=True), 1.0)
    torch.testing.assert_close(centred.mean(0), x.mean(0) @ weight.T, rtol=0, atol=1e-5)
    unrounded = plain_exact.product(x, weight, Float8(inputs=False, weights=False, mean=True), 1.0)
    torch.testing.assert_close(unrounded, x @ weight.T)


def test_a_mean_that_was_measured_once_serves_later_inputs():
    model = tiny("llama", 2).requires_grad_(False)
    ids = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(0))
    how = Float8(mean=True, once=True)
    step = plain_exact._Step(Exact(1.0, float8=how), torch.Generator(), None, phase="forward")
    layer, found = model.model.layers[0].mlp.up_proj, []
    torch.manual_seed(0)
    x = torch.randn(1100, 32) + 5 * torch.randn(32)
    later = x.flip(0)[:20] + 1
    for step.phase, rows in (("forward", x), ("forward", later), ("recompute", later)):
        step.begin(model.train(), (), {"input_ids": ids})
        found.append(plain_exact._linear(step, 0, "up_proj", layer, rows))
    mean = x[:1024].mean(0)
    assert torch.equal(step.means[layer], mean)
    expected = plain_exact.product(later, layer.weight, how, 1.0, mean)
    torch.testing.assert_close(found, [plain_exact.product(x, layer.weight, how, 1.0, mean), expected, expected])
    with plain_exact.in_float8(model, how):
        assert model(input_ids=ids).logits.isfinite().all()


def test_what_rows_have_in_common_is_not_rounded():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 50, 64) + 5 * torch.randn(64), torch.randn(32, 64)
    x[0, 0] *= 1000
    exact = x @ weight.T
    free, found = (plain_exact.product(x, weight, Float8(centred=c), 1.0) - exact for c in (False, True))
    assert found.flatten(0, 1)[1:].norm() < 0.4 * free.flatten(0, 1)[1:].norm()
    # Of gradients, nothing is taken out.
    x.requires_grad_(True)
    plain_exact._Product.apply(x, weight, Float8(centred=True, mean=True), True, True, 1.0).sum().backward()
    torch.testing.assert_close(x.grad, plain_exact.product(torch.ones(2, 50, 32), weight.t(), Float8(), 1.0))


def test_attention_in_float8_is_attention_with_a_few_percent_of_rounding():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 96, 16) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    error = (float8_attention.reference(query, key, value) - expected).norm() / expected.norm()
    assert 0.02 < error < 0.08


def test_the_committed_figures_of_attention_in_float8_are_rows_of_the_tool():
    for row in json.loads((ROOT / "benchmarks/kernels/float8-attention.json").read_text())["rows"]:
        flops = 2 * 32 * row["tokens"] ** 2 * 128
        milliseconds = {name: flops / row[f"{name}_tflops"] / 1e9 for name in ("bf16", "float8")}
        found = float8_attention.row_of(row["tokens"], row["error"], {**milliseconds, "rounding": row["rounding_ms"]})
        assert list(found.items()) == list(row.items())


def test_attention_in_float8_changes_the_forward_alone(adapted, monkeypatch):
    found, within = {}, []
    reference = float8_attention.reference
    monkeypatch.setattr(
        float8_attention, "reference", lambda *heads: within.append(torch.is_grad_enabled()) or reference(*heads)
    )
    for attention in (False, True):
        float8 = Float8(forward=False, recompute=False, gradient=False, dense=False, attention=attention)
        with plain_exact.exact(adapted, Exact(0.5, block=8, float8=float8)):
            found[attention] = gradients(adapted)[0]
    assert found[True] != found[False]
    assert found[True] == pytest.approx(found[False], rel=0.02)
    assert within == [False, False]
