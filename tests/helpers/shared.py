"""What tests/behaviour/test_sequence.py runs on each of several CPU ranks that share every sequence.

python tests/helpers/shared.py FOLDER [CHECK ...]   (RANK, WORLD_SIZE and so on set as torchrun does)
"""

import copy
import dataclasses
import datetime
import os
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import TOLERANCE, Recorder, batch, packed, step, tiny, with_lora
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.runtime import offload

ROOT = Path(__file__).parents[2]
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def config(keep=0.5, treatment="exact", score="step", **more) -> LemoConfig:
    site = Elimination(keep=keep, eliminated=treatment, score=score)
    return LemoConfig(site, site, **{"block_size": 8, "dense_layers": (), **more})


def make(architecture="llama", lora=True, checkpointing=False, layers=3, **settings):
    model = tiny(architecture, layers, **settings)
    model = with_lora(model) if lora else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def averaged(gradients):
    """Of all ranks, as DDP averages them."""
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradients


def shared(model, settings, group=None, **more):
    return lemo_fx.transform(model, settings, sequence_group=group or dist.group.WORLD, **more)


def assert_as_one_process(inputs, settings, label, tolerance="fp32", compiled=False, predictors=None, **made):
    """Loss, every gradient and every choice of blocks are those of one process with as many parts."""
    size = dist.get_world_size()
    alone = lemo_fx.transform(make(**made), dataclasses.replace(settings, sequence_parts=size), predictors=predictors)
    with Recorder(alone) as one:
        expected = step(alone, inputs)
    model = shared(make(**made), settings, predictors=predictors)
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.compile(backend=compiled)
        found = step(model, lemo_fx.shard_sequence(model, inputs))
    else:
        with Recorder(model) as several:
            found = step(model, lemo_fx.shard_sequence(model, inputs))
        length = inputs["input_ids"].shape[1] // size
        first = dist.get_rank() * length
        for name, choices in one.tokens.items():
            for tokens, own in zip(choices, several.tokens[name], strict=True):
                within = tokens[(tokens >= first) & (tokens < first + length)].view(len(tokens), -1)
                assert torch.equal(within - first, own), f"{label} {name}"
    assert_equal(expected, (found[0], averaged(found[1])), label, tolerance)
    return model


def assert_equal(expected, found, label, tolerance="fp32"):
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE[tolerance], msg=lambda text: f"{label}: {text}")
    assert found[1].keys() == expected[1].keys(), label
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, **TOLERANCE[tolerance], msg=lambda text, name=name: f"{label} {name}: {text}"
        )


def raises(text, function, *args, **kwargs):
    with pytest.raises(lemo_fx.LemoError, match=re.escape(text)):
        function(*args, **kwargs)


@check
def losses_and_gradients_equal_those_of_one_process():
    """Without documents, packed, with padding at the end and on both sides, with dense first and last layers."""
    batches = {
        "plain": batch(2, 96),
        "packed": packed([40, 30, 58]),
        "padded": batch(2, 96, padding="right"),
        "padded on both sides": batch(2, 96, padding="both"),
        "labels on padding": {**batch(2, 96, padding="both"), "labels": batch(2, 96)["labels"]},
    }
    for architecture in ("llama", "qwen3", "gemma3"):
        for name, inputs in batches.items():
            label = f"{architecture}, {name}"
            assert_as_one_process(inputs, config(), label, architecture=architecture, checkpointing=name == "packed")
        assert_as_one_process(batches["plain"], config(0.5, "skip"), f"{architecture}, skip", architecture=architecture)
        made = {"architecture": architecture, "layers": 4, "lora": False, "checkpointing": True}
        assert_as_one_process(batch(2, 128), LemoConfig(block_size=8), f"{architecture}, default", **made)
        assert_as_one_process(batches["packed"], config(1.0), f"{architecture}, everything", architecture=architecture)


@check
def uneven_sequences():
    """Padded to whole blocks of every part, as one process that is given the padded batch."""
    size = dist.get_world_size()
    inputs = batch(2, 16 * size - 3)
    pad = torch.nn.functional.pad
    padded = {
        "input_ids": pad(inputs["input_ids"], (0, 3)),
        "labels": pad(inputs["labels"], (0, 3), value=-100),
        "attention_mask": pad(torch.ones_like(inputs["input_ids"]), (0, 3)),
    }
    for treatment in ("exact", "skip"):
        expected = step(lemo_fx.transform(make(), config(0.5, treatment, sequence_parts=size)), padded)
        model = shared(make(), config(0.5, treatment))
        loss, found = step(model, inputs)
        assert_equal(expected, (loss, averaged(found)), treatment)


@check
def other_models():
    """Windows that the attention's config alone names, learned positions, parallel branches, experts, soft caps."""
    for architecture in ("mistral", "gpt2", "gpt_neox", "mixtral", "gemma2", "phi3"):
        for inputs in (batch(2, 96), packed([40, 30, 26])):
            assert_as_one_process(inputs, config(0.5), architecture, architecture=architecture, lora=False)
    for keys in (1, 2, 8):
        made = {"num_attention_heads": 8, "num_key_value_heads": keys}
        for attention in ("sdpa", "eager"):
            assert_as_one_process(batch(1, 64), config(), f"{keys} heads of keys", attention=attention, **made)


@check
def every_way_to_compute_a_layer():
    inputs = batch(2, 96)
    exact = {
        "nothing eliminated": LemoConfig(attention=None, mlp=None, block_size=8),
        "MLP alone": LemoConfig(attention=None, mlp=Elimination(0.5, eliminated="exact"), block_size=8),
        "shared": LemoConfig(Elimination(0.5, score="step"), Elimination(0.5, score="shared"), block_size=8),
        "slope": LemoConfig(block_size=8, dense_layers=()),
        "balanced": config(score="step", dense_layers=(1,)),
        "projections": config(recompute="projections"),
        "elementwise": config(recompute="elementwise"),
        "twice as many parts": config(0.5, sequence_parts=2 * dist.get_world_size()),
    }
    for name, settings in exact.items():
        length = 16 * 2 * dist.get_world_size()
        inputs = batch(2, length)
        for checkpointing in (True, False):
            assert_as_one_process_with_its_parts(inputs, settings, name, checkpointing)
    measured = LemoConfig(Elimination(0.5, score="step"), Elimination(0.5, score="measured"), block_size=8)
    assert_as_one_process(batch(2, 96), dataclasses.replace(measured, dense_layers=()), "measured MLP")


def assert_as_one_process_with_its_parts(inputs, settings, name, checkpointing):
    parts = settings.sequence_parts if settings.sequence_parts > 1 else dist.get_world_size()
    alone = lemo_fx.transform(make(checkpointing=checkpointing), dataclasses.replace(settings, sequence_parts=parts))
    expected = step(alone, inputs)
    model = shared(make(checkpointing=checkpointing), settings)
    loss, found = step(model, lemo_fx.shard_sequence(model, inputs))
    assert_equal(expected, (loss, averaged(found)), name)


@check
def compiled_layers():
    """With documents under checkpointing, and without either; a dense layer each."""
    made = {"tolerance": "compiled", "compiled": "aot_eager", "layers": 2}
    settings = config(0.5, dense_layers=(1,))
    assert_as_one_process(packed([40, 24]), settings, "compiled, checkpointed", checkpointing=True, **made)
    torch.compiler.reset()
    assert_as_one_process(batch(1, 64), settings, "compiled", **made)


@check
def float8_and_offload():
    """float8 rounds rows of other lengths alike; what is offloaded comes back as it was."""
    for checkpointing in (True, False):
        settings = config(0.5, forward="float8", backward="float8")
        assert_as_one_process(batch(2, 96), settings, "float8", "bf16", checkpointing=checkpointing)
    before = offload.DEVICES, offload.LEAST_BYTES
    offload.DEVICES, offload.LEAST_BYTES = {"cpu"}, 0
    try:
        assert_as_one_process(batch(2, 96), config(offload=True), "offload", checkpointing=True)
    finally:
        offload.DEVICES, offload.LEAST_BYTES = before


@check
def stand_in():
    site = Elimination(0.5, eliminated="stand_in", score="step")
    settings = LemoConfig(site, site, block_size=8, dense_layers=())
    sequences = [batch(1, 96, seed=seed)["input_ids"][0].tolist() for seed in range(3)]
    predictors = lemo_fx.fit(make(), sequences, settings, progress=False)
    assert_as_one_process(batch(2, 96), settings, "stand_in", predictors=predictors)


@check
def predicted_mlp():
    """A predictor names tokens of each block, whose activations are measured on the rank that has them."""
    mlp = Elimination(0.5, score="predicted")
    settings = LemoConfig(Elimination(0.5, score="step"), mlp, block_size=8, dense_layers=())
    predictors = lemo_fx.Predictors.random(make().get_base_model(), settings)
    assert_as_one_process(batch(2, 96, padding="right"), settings, "predicted", predictors=predictors)


@check
def several_batches_before_one_backward():
    size = dist.get_world_size()
    batches = [batch(2, 96, seed=1), packed([50, 46], seed=2)]
    count = sum(int((one["labels"][:, 1:] != -100).sum()) for one in batches)
    settings = config(0.5, "skip", sequence_parts=size)
    alone = lemo_fx.transform(make(checkpointing=True), settings)
    model = shared(make(checkpointing=True), settings)
    alone.zero_grad()
    losses = [alone(**one, num_items_in_batch=count).loss for one in batches]
    sum(losses).backward()
    parts = [lemo_fx.shard_sequence(model, {**one, "num_items_in_batch": count}) for one in batches]
    found = [model(**part).loss for part in parts]
    sum(found).backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    gradients = averaged({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_equal((sum(losses), expected), (sum(found), gradients), "two batches")


@check
def data_parallel_wrappers_average_gradients():
    """DDP over all ranks, and FSDP2 over a mesh of samples x parts; the whole of a copied model, too."""
    inputs, settings = batch(2, 96), config()
    size = dist.get_world_size()
    alone = lemo_fx.transform(make(checkpointing=True), dataclasses.replace(settings, sequence_parts=size))
    expected = step(alone, inputs)
    model = shared(make(checkpointing=True), settings)
    loss, found = step(DistributedDataParallel(copy.deepcopy(model)), inputs)
    assert_equal(expected, (loss, {n.removeprefix("module."): g for n, g in found.items()}), "DDP")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss, found = step(model, inputs)
    assert_equal(expected, (loss, {n: g.full_tensor() for n, g in found.items()}), "FSDP2")


@check
def samples_and_parts_on_a_mesh():
    """Two samples of two parts each on four ranks, sharded over all of them."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("samples", "parts"))
    inputs = [batch(1, 64, seed=seed) for seed in (1, 2)]
    settings = config(0.5, sequence_parts=2)
    alone = lemo_fx.transform(make(), settings)
    count = sum(int((one["labels"][:, 1:] != -100).sum()) for one in inputs)
    alone.zero_grad()
    for one in inputs:
        alone(**one, num_items_in_batch=count).loss.backward()
    model = shared(make(), settings, mesh["parts"].get_group())
    own = {**inputs[mesh["samples"].get_local_rank()], "num_items_in_batch": count / 2}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    _, found = step(model, lemo_fx.shard_sequence(model, own))
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    zero = torch.zeros(())
    assert_equal((zero, expected), (zero, {n: g.full_tensor() for n, g in found.items()}), "samples x parts")


@check
def what_cannot_be_is_refused_on_every_rank():
    group = dist.group.WORLD
    measured = LemoConfig(Elimination(0.5), None, block_size=8)
    raises("use score='step'", shared, make(), measured)
    threshold = LemoConfig(None, Elimination(threshold=0.2), block_size=8)
    raises("give keep instead", shared, make(), threshold)
    every = LemoConfig(Elimination(0.5, eliminated="exact", keys="every"), None, block_size=8)
    raises("keys='kept'", shared, make(), every)
    raises("sequence_parts", shared, make(), config(sequence_parts=dist.get_world_size() + 1))
    raises("attn_implementation='sdpa'", shared, make(attention="flex_attention"), config())
    three = make(hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    raises(f"has 3 heads, which {dist.get_world_size()} ranks cannot share", shared, three, config())
    model = make()
    raises("share no sequence", lemo_fx.shard_sequence, lemo_fx.transform(model, config()), batch(1, 64))

    model = shared(make(), config())
    raises("hold different batches", model, **batch(1, 64, seed=dist.get_rank()))
    raises("hold different batches", lemo_fx.shard_sequence, model, batch(1, 64, seed=dist.get_rank()))
    rows, count = batch(2, 64, padding="both"), {"num_items_in_batch": 50 + dist.get_rank()}
    for names in (rows, ["labels"], ["attention_mask"]):
        turned = {name: value.flip(0) if name in names and dist.get_rank() else value for name, value in rows.items()}
        raises("hold different batches", model, **turned)
    raises("hold different batches", model, **rows, **count)
    raises("hold different batches", lemo_fx.shard_sequence, model, batch(1, 64 + 8 * dist.get_rank()))
    raises("known are", lemo_fx.shard_sequence, model, {**batch(1, 64), "pixel_values": torch.ones(1)})
    raises("does not fit", lemo_fx.shard_sequence, model, {**batch(1, 64), "position_ids": torch.ones(3, 1, 64)})
    part = lemo_fx.shard_sequence(model, batch(1, 64))
    raises("shift_labels", model, **{name: value for name, value in part.items() if name != "shift_labels"})
    raises("cannot run the layers' original code", lemo_fx.set_dense, model)
    begin = lemo_fx.DenseFinish(0.1).on_train_begin
    raises("cannot run the layers' original code", begin, None, None, None, model=model)
    model.eval()
    raises("whole sequences", model, **part)
    whole = batch(1, 64)
    expected = make().eval()(**whole).loss
    torch.testing.assert_close(model(**whole).loss, expected, **TOLERANCE["fp32"])
    model.train()
    model.get_base_model().model.layers[1].self_attn.q_proj.register_forward_hook(_hook)
    raises("a part of a sequence reached a layer that runs its original code", model, **part)
    assert group is not None


@check
def ranks_that_train_weights_of_their_own():
    """Adapters made from other seeds, and gradients that nobody averaged."""
    words = "train different weights"
    base = tiny("llama")
    torch.manual_seed(dist.get_rank())
    adapters = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = shared(get_peft_model(base, adapters), config())
    raises(words, lemo_fx.shard_sequence, model, batch(1, 64))
    model = shared(make(), config())
    part = lemo_fx.shard_sequence(model, batch(1, 64))
    for gradient in step(model, part)[1].values():
        assert gradient.abs().max() > 0
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter -= 0.1 * parameter.grad
    raises(words, lemo_fx.shard_sequence, model, batch(1, 64))


def _hook(*_):
    """Someone's."""


def the_example():
    """examples/sequence.py as torchrun starts it."""
    example = runpy.run_path(str(ROOT / "examples" / "sequence.py"))
    example["main"](out=Path(sys.argv[1]) / "example", tokens=500, steps=2)


def the_benchmark():
    """tools/bench_scaling.py under `--wraps sequence`."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_scaling

    out = Path(sys.argv[1]) / "scaling"
    bench_scaling.main("tiny", "256", "step-0.5-eager", "sequence", 0, "float32", 1, out, 1e9, 1)


def one_rank_fails():
    """The last rank ends in the middle of a step; the others are told so."""
    model = shared(make(), config())
    part = lemo_fx.shard_sequence(model, batch(1, 64))
    if dist.get_rank() == dist.get_world_size() - 1:
        model.get_base_model().model.layers[1].register_forward_hook(lambda *_: os._exit(7))
    began = time.perf_counter()
    with pytest.raises(RuntimeError):
        step(model, part)
    assert time.perf_counter() - began < TIMEOUT + 30
    os._exit(0)


TIMEOUT = 60
"""Seconds that a rank waits for the others."""

SCRIPTS = (the_example, the_benchmark)
"""They make a process group of their own: a second one at the same address may meet the first one's store."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    functions = [globals()[name] for name in sys.argv[2:]] or CHECKS
    if not set(functions) & set(SCRIPTS):
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    for function in functions:
        began = time.perf_counter()
        function()
        print(f"{function.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
