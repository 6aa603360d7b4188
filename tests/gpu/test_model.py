"""A rewritten model on a real GPU: equal to the original at keep=1.0, recomputed or not, compiled or not."""

import dataclasses
import gc
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.errors import LemoError
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.runtime import offload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def model_and_batch(layers: int = 3, length: int = 700):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    model = LlamaForCausalLM(config).cuda()
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).train()
    ids = torch.randint(0, 1000, (2, length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -90:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def both(**settings) -> LemoConfig:
    site = Elimination(**settings)
    return LemoConfig(attention=site, mlp=site, dense_layers=())


@pytest.mark.parametrize("eliminated", ["skip", "exact"])
@pytest.mark.parametrize("padded", [False, True])
def test_keep_one_is_the_original(eliminated, padded):
    model, batch = model_and_batch()
    if not padded:
        del batch["attention_mask"]
    loss, gradient = step(model, batch)
    lemo_fx.transform(model, both(keep=1.0, eliminated=eliminated))
    new_loss, new_gradient = step(model, batch)
    torch.testing.assert_close(new_loss, loss, rtol=1e-5, atol=0)
    assert float((new_gradient - gradient).norm() / gradient.norm()) < 1e-3


@pytest.mark.parametrize("score", ["measured", "random"])
@pytest.mark.parametrize("recompute", ["all", "projections", "elementwise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_gradients_equal_saved_ones(score, recompute, compiled):
    # Random scores hash the exact bits of a layer's input. Compiled layers round differently from eager ones, so only
    # the first layer's choices are the same in both.
    model, batch = model_and_batch(layers=1 if compiled and score == "random" else 3)
    del batch["attention_mask"]
    config = dataclasses.replace(both(keep=0.5, score=score), recompute=recompute)
    lemo_fx.transform(model, config)
    if compiled:
        # Before both runs: a random choice is hashed from bits that compiling may change.
        torch.compiler.reset()
        for _, layer in decoder_layers(model):
            layer.compile(fullgraph=True)
    loss, gradient = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    new_loss, new_gradient = step(model, batch)
    torch.testing.assert_close(new_loss, loss, rtol=1e-4, atol=0)
    assert float((new_gradient - gradient).norm() / gradient.norm()) < 1e-2
    assert lemo_fx.report(model).sites[0].kept_share == pytest.approx(0.55, abs=0.05)


def long_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=100,
        max_position_embeddings=1 << 16,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    model = get_peft_model(model, LoraConfig(r=4)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, torch.randint(0, 100, (1, 32768), device="cuda")


def test_memory_under_checkpointing_follows_the_kept_rows():
    model, ids = long_model()
    stream = ids.numel() * 512 * 2

    def held() -> int:
        # What other tests have left would be freed in the middle of it.
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        during = torch.cuda.memory_allocated() - before
        loss.backward()
        model.zero_grad()
        return during

    held()
    dense = held()
    attention = Elimination(keep=0.5, score="random")
    shared = LemoConfig(attention=attention, mlp=Elimination(keep=0.5, score="shared"), dense_layers=())
    lemo_fx.transform(model, shared)
    held()
    sparse = held()
    assert dense >= 16 * stream
    # What remains beside the rows does not shrink: embeddings, the last stream, the loss's gradient.
    assert dense - sparse >= 0.35 * 16 * stream


@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_rows_leave_the_device_and_change_nothing(compiled):
    model, ids = long_model()
    stream = ids.numel() * 512 * 2
    attention = Elimination(keep=0.5, score="random")
    found = []
    for offloads in (False, False, True):
        config = LemoConfig(attention, Elimination(keep=0.5, score="shared"), dense_layers=(), offload=offloads)
        lemo_fx.transform(model, config)
        torch.compiler.reset()
        for _, layer in decoder_layers(model):
            layer._compiled_call_impl = None
            if compiled:
                layer.compile()
        for _ in range(3):
            model.zero_grad()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            during = torch.cuda.memory_allocated() - before
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((during, loss.detach(), gradient))
    (kept, loss, gradient), (_, _, again), (left, new_loss, new_gradient) = found
    # Of 16 layers' rows (half a stream each), two stay.
    assert kept - left >= 0.8 * 14 * stream / 2
    torch.testing.assert_close(new_loss, loss, rtol=1e-5, atol=0)
    # Flash attention's backward adds in no fixed order: the same model differs from itself by a few thousandths.
    noise = float((again - gradient).norm() / gradient.norm())
    assert float((new_gradient - gradient).norm() / gradient.norm()) <= 2 * noise + 1e-6


def test_a_host_buffer_is_pinned_as_long_as_it_lives_and_takes_what_it_holds():
    buffer = torch.empty((1 << 20) + 4096, dtype=torch.uint8)
    assert not buffer.is_pinned()
    offload.pin(buffer)
    assert buffer.is_pinned()
    ptr = buffer.data_ptr()
    with pytest.raises(LemoError, match="1 MiB of pinned memory"):
        offload.pin(buffer)  # Registered twice, which the driver refuses as it does what the host does not hold.
    assert torch.ones(4, device="cuda").sum().item() == 4
    del buffer
    # Unpinned: the same memory can be registered again.
    assert int(torch.cuda.cudart().cudaHostUnregister(ptr)) != 0
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("eliminated", [None, "skip"])
def test_cuda_graphs(eliminated):
    """`layer.compile(mode="reduce-overhead")`: the same loss and gradients, also on new data of the same shape."""
    model, _ = model_and_batch()
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 1000, (4, 1, 640), device="cuda")]
    if eliminated is not None:
        lemo_fx.transform(model, both(keep=0.5, eliminated=eliminated, score="measured"))
    found = []
    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        for _, layer in decoder_layers(model):
            layer._compiled_call_impl = None
            layer.compile(mode=mode)
        results = []
        for each in batches:
            torch.compiler.cudagraph_mark_step_begin()
            loss, gradient = step(model, each)
            results.append((loss.clone(), gradient.clone()))
        found.append(results)
    for (loss, gradient), (new_loss, new_gradient) in zip(*found, strict=True):
        torch.testing.assert_close(new_loss, loss, rtol=1e-4, atol=0)
        assert float((new_gradient - gradient).norm() / gradient.norm()) < 1e-2


def test_float8_backward_keeps_no_weights():
    """Compiled and checkpointed, the float8 weights of the forward are rounded again, not kept for the recompute."""
    held = {}
    for backward in ("model", "float8"):
        model, batch = model_and_batch(6)
        model.to(torch.bfloat16).gradient_checkpointing_enable({"use_reentrant": False})
        config = both(keep=0.375, eliminated="exact")
        lemo_fx.transform(model, dataclasses.replace(config, forward="float8", backward=backward))
        for _, layer in decoder_layers(model):
            layer.compile()
        step(model, batch)
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(**batch, use_cache=False).loss
        held[backward] = torch.cuda.memory_allocated() - before
        loss.backward()
        torch.compiler.reset()
    assert held["float8"] < 1.02 * held["model"], held


def test_a_base_held_in_float8_takes_half_and_is_not_copied():
    """Compiled and checkpointed: neither the step's peak above the weights nor what a forward keeps grows."""
    weights, kept = {}, {}
    for base in ("model", "float8"):
        model, batch = model_and_batch(6)
        model.to(torch.bfloat16).gradient_checkpointing_enable({"use_reentrant": False})
        config = dataclasses.replace(
            both(keep=0.375, eliminated="exact"), forward="float8", backward="float8", base=base
        )
        lemo_fx.transform(model, config)
        weights[base] = sum(p.nbytes for _, layer in decoder_layers(model) for p in layer.parameters())
        for _, layer in decoder_layers(model):
            layer.compile()
        step(model, batch)
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(**batch, use_cache=False).loss
        kept[base] = torch.cuda.memory_allocated() - before
        loss.backward()
        torch.compiler.reset()
    assert weights["float8"] < 0.75 * weights["model"], weights
    assert kept["float8"] < 1.02 * kept["model"], kept


@pytest.mark.parametrize("length", [700, 1024])
@pytest.mark.parametrize("padded", [False, True])
def test_every_key_compiled_is_every_key(padded, length):
    model, batch = model_and_batch(length=length)
    if not padded:
        del batch["attention_mask"]
    site = Elimination(keep=0.5, eliminated="exact")
    every = dataclasses.replace(site, keys="every")
    lemo_fx.transform(model, LemoConfig(attention=every, mlp=site, dense_layers=()))
    assert all(row.note == "every key" for row in lemo_fx.report(model).sites if row.site == "attention")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss, gradient = step(model, batch)
    torch.compiler.reset()
    for _, layer in decoder_layers(model):
        layer.compile()
    # Unpadded, flex_attention takes the place of a mask.
    new_loss, new_gradient = step(model, batch)
    torch.testing.assert_close(new_loss, loss, rtol=1e-5, atol=0)
    assert float((new_gradient - gradient).norm() / gradient.norm()) < 2e-3
