"""`keys="every"`: the gradient of kept queries knows every key. Its numbers are proven at every transform."""

import pytest
import torch
from tiny import ARCHITECTURES, assert_same_step, batch, packed, step, tiny, with_lora
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import lemo_fx
from lemo_fx import ConfigError, Elimination, LemoConfig, UnsupportedModelError
from lemo_fx.passes import insert_elimination
from lemo_fx.planning import proof
from lemo_fx.runtime import keys
from lemo_fx.runtime.keys import causal_block_mask, causal_blocks, query_rows
from lemo_fx.runtime.twin import function_of

SITE = Elimination(keep=0.5, eliminated="exact")
EVERY = Elimination(keep=0.5, eliminated="exact", keys="every")


def plan(attention=EVERY, **settings):
    return LemoConfig(**({"attention": attention, "mlp": SITE, "block_size": 8, "dense_layers": ()} | settings))


def notes(model):
    return {row.site: row.note for row in lemo_fx.report(model).sites}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_proven_and_checkpointed(architecture):
    model = lemo_fx.transform(tiny(architecture), plan())
    assert notes(model)["attention"] == "every key"
    inputs = batch(2, 61, padding="both")
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(model, inputs), expected, "same")


@pytest.mark.parametrize("inputs", [packed([29, 35]), batch(2, 61, padding="both")], ids=["packed", "padded"])
def test_eager_attention_gives_the_same(inputs):
    found = []
    for name in ("sdpa", "eager"):
        model = tiny("llama", attention=name)
        found.append(step(lemo_fx.transform(model, plan()), inputs))
    assert_same_step(found[1], found[0], "fp32")


def test_a_block_mask_follows_the_kept_queries():
    tokens = torch.tensor([[3, 4, 70, 200]])
    window = create_block_mask(lambda b, h, q, kv: (q >= kv) & (q - kv < 50), 1, None, 256, 256, device="cpu")
    rows = query_rows(window, tokens, 256, "flex_attention", torch.float32)
    expected = torch.tensor([[(q >= kv) and (q - kv < 50) for kv in range(256)] for q in tokens[0].tolist()])
    query, key, value = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 256, 16), torch.randn(1, 2, 256, 16)
    right = scaled_dot_product_attention(query, key, value, attn_mask=expected)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=rows), right)


def test_gradients_of_dropped_keys_reach_their_layers_adapters():
    inputs = batch(1, 64)
    found = {}
    for name, site in {"kept": SITE, "every": EVERY}.items():
        # The step keeps the same blocks: the choice hashes the stream.
        found[name] = step(lemo_fx.transform(with_lora(tiny("llama", layers=1)), plan(site)), inputs)[1]
    for own in ("k_proj.lora_B", "v_proj.lora_B"):
        pairs = [(found["kept"][name], found["every"][name]) for name in found["every"] if own in name]
        assert pairs
        assert not any(torch.allclose(one, other, rtol=1e-2) for one, other in pairs)


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda patch: patch.setattr(insert_elimination, "gradient_at", through), "gradients are off"),
        (lambda patch: patch.setattr(keys, "query_rows", one_more), "gradients are off"),
        (lambda patch: patch.setattr(keys, "function_of", scaled), "gradients are off"),
    ],
    ids=["gradient_through_every_row", "mask_off_by_one", "scaled_keys"],
)
def test_the_proof_sees_it_broken(monkeypatch, break_it, word):
    break_it(monkeypatch)
    proof._known.clear()
    try:
        model = lemo_fx.transform(tiny("qwen3"), plan())
        assert word in notes(model)["attention"]
    finally:
        proof._known.clear()


def through(stream, tokens):
    return stream * 1


def one_more(mask, tokens, length, *others):
    return query_rows(mask, (tokens + 1).clamp_max(length - 1), length, *others)


def scaled(attention):
    original = function_of(attention)
    return lambda m, query, key, *args, **kwargs: original(m, query, key * 1.1, *args, **kwargs)


@pytest.mark.parametrize(("count", "length"), [(128, 512), (200, 512), (70, 300)])
def test_the_block_mask_is_causal_order_at_the_kept_positions(count, length):
    tokens = torch.stack([torch.randperm(length)[:count].sort().values for _ in range(2)])
    query, key, value = torch.randn(2, 2, count, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
    seen = query_rows(None, tokens, length, "sdpa", torch.float32)
    mask = causal_block_mask(tokens, length)
    ends = torch.arange(0, length, 128)
    dense = torch.zeros(2, 1, -(-count // 128), len(ends), dtype=torch.bool)
    for sample, block in torch.cartesian_prod(torch.arange(2), torch.arange(dense.shape[2])).tolist():
        rows = seen[sample, 0, block * 128 : (block + 1) * 128]
        for column, start in enumerate(ends.tolist()):
            dense[sample, 0, block, column] = rows[:, start : start + 128].any()
    assert torch.equal(mask.to_dense().bool(), dense)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=seen)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=mask), expected)
    other = BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        seq_lengths=(count, length),
    )
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(mask, name), getattr(other, name))
        assert getattr(mask, name).is_contiguous()
    torch.library.opcheck(causal_blocks, (tokens, length))


@pytest.mark.parametrize(
    "score", ["step", pytest.param("random", marks=pytest.mark.slow), pytest.param("measured", marks=pytest.mark.slow)]
)
def test_compiled_it_is_the_same(score):
    site = Elimination(keep=0.5, eliminated="exact", keys="every", score=score)
    inputs, found = batch(2, 64), []
    torch.compiler.reset()
    for backend in (None, "aot_eager"):
        model = lemo_fx.transform(with_lora(tiny("llama")), plan(site, forward="float8", backward="float8"))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        for layer in model.get_decoder().layers if backend else ():
            # Before anything has run uncompiled.
            layer.compile(fullgraph=True, backend=backend)
        found.append(step(model, inputs))
    assert_same_step(found[1], found[0], "compiled")


@pytest.mark.slow
def test_compiled_flex_attention_stands_for_a_mask(monkeypatch):
    # On the CPU it has no backward, so only that a compiler takes it into the one graph of a checkpointed layer.
    private = torch.nn.attention.flex_attention
    if not hasattr(private, "_validate_device"):
        pytest.skip("this torch refuses gradients of flex_attention on the CPU elsewhere")
    monkeypatch.setattr(private, "_validate_device", lambda *args: None)
    monkeypatch.setattr(keys, "_flexible", lambda *args: torch.compiler.is_compiling())
    torch.compiler.reset()
    for settings in ({}, {"forward": "float8", "backward": "float8"}):
        model = lemo_fx.transform(with_lora(tiny("llama")), plan(**settings))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        for layer in model.get_decoder().layers:
            layer.compile(fullgraph=True, backend="eager")
        inputs = batch(2, 64)
        assert torch.isclose(model(**inputs).loss, step(with_lora(tiny("llama")), inputs)[0], rtol=5e-2)


def test_it_keeps_bits_when_everything_is_kept():
    inputs = batch(2, 64)
    site = Elimination(keep=1.0, eliminated="exact", keys="every")
    expected = step(lemo_fx.transform(tiny("llama"), plan(Elimination(keep=1.0), mlp=None)), inputs)
    assert_same_step(step(lemo_fx.transform(tiny("llama"), plan(site, mlp=None)), inputs), expected, "same")


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_where_the_attentions_is(training):
    model = lemo_fx.transform(tiny("llama", attention_dropout=0.9), plan())
    layer = model.get_decoder().layers[0]
    layer.self_attn.training = training
    drops = []
    twin = layer.lemo_attention_queries.twin[0]
    original = twin.lemo_function
    vars(twin)["lemo_function"] = lambda *args, dropout, **kwargs: [drops.append(dropout), original(*args, **kwargs)][1]
    step(model, batch(1, 64))
    assert set(drops) == {0.9 if training else 0.0}


def test_what_it_is_not_for_is_refused():
    with pytest.raises(ConfigError, match="which only eliminated='exact' computes, not 'skip'"):
        Elimination(keys="every")
    with pytest.raises(ConfigError, match="keys='all' is not one of 'kept', 'every'"):
        Elimination(keys="all")
    with pytest.raises(ConfigError, match="keys='every' is for attention"):
        LemoConfig(mlp=EVERY)
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    before = model.get_decoder().layers[0].__class__
    with pytest.raises(UnsupportedModelError, match="needs an attention that is told by a mask"):
        lemo_fx.transform(model, plan())
    assert model.get_decoder().layers[0].__class__ is before
