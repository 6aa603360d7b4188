"""Hugging Face Trainer: whatever its arguments ask for, keeping every block trains as the original model does."""

import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import TOLERANCE, anatomy, tiny, with_lora
from training import Rows, losses, plan, run

import lemo_fx
from lemo_fx.graph.anatomy import decoder_layers

NEW_NAMES = Version(transformers.__version__) >= Version("5.20")
CHECKPOINTING = "activation_checkpointing" if NEW_NAMES else "gradient_checkpointing"


def padding(rows):
    """Right-padded batches with an attention mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = row["input_ids"]
        missing = longest - len(ids)
        out["input_ids"].append(torch.nn.functional.pad(ids, (0, missing)))
        out["labels"].append(torch.nn.functional.pad(ids, (0, missing), value=-100))
        out["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(ids), (0, missing)))
    return {name: torch.stack(values) for name, values in out.items()}


def out_of_memory(model):
    """Two rows at a time do not fit: the last layer says so."""

    def raises(module, args):
        if len(args[0]) > 1:
            raise RuntimeError("CUDA out of memory.")

    decoder_layers(model)[-1][1].register_forward_pre_hook(raises)
    return model


def lora(**settings):
    return with_lora(tiny("llama", **settings))


def full(**settings):
    return tiny("llama", **settings)


CASES = {
    "old_name": (lora, {"gradient_checkpointing": True}),
    "checkpointed": (lora, {CHECKPOINTING: True}),
    "not_reentrant": (full, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}),
    "reentrant": (lora, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}),
    "every_second_layer": (full, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"every_n_layers": 2}}),
    # Rows of two lengths: the loss of a step is divided by the number of labels in all of its batches.
    "accumulated": (lora, {"gradient_accumulation_steps": 2}),
    "label_smoothing": (full, {"label_smoothing_factor": 0.1}),
    "bf16": (full, {"bf16": True, "eval_strategy": "steps", "eval_steps": 2, "bf16_full_eval": True}),
    "bf16_lora": (lora, {"bf16": True}),
    "neftune": (lora, {"neftune_noise_alpha": 5.0}),
    "evaluated": (lora, {"eval_strategy": "steps", "eval_steps": 2, CHECKPOINTING: True}),
    "find_batch_size": (lambda: out_of_memory(full()), {"auto_find_batch_size": True}),
    "determinism": (lora, {"full_determinism": True}),
}


@pytest.fixture(autouse=True)
def nondeterministic_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_arguments(case, tmp_path):
    make, settings = CASES[case]
    settings = {"data": Rows(ragged=True), "collator": padding, "max_steps": 2} | settings
    original = run(make(), tmp_path, None, **settings)
    model = make()
    before = anatomy(model)
    complete = run(model, tmp_path, plan(keep=1.0, score="random"), **settings)
    tolerance = TOLERANCE["bf16" if "bf16" in case else "compiled"]
    assert len(losses(original)) == 2
    for name in ("loss", "eval_loss"):
        assert losses(complete, name) == pytest.approx(losses(original, name), rel=tolerance["rtol"])
    inputs = {"input_ids": torch.arange(40)[None] + 5}
    expected = model.eval()(**inputs).logits
    # What the Trainer left on the model (autocast, say) goes on working without us.
    assert torch.equal(lemo_fx.revert(model)(**inputs).logits, expected)
    for what in ("classes", "keys", "buffers"):
        assert anatomy(model)[what] == before[what]

    model = make()
    half = run(model, tmp_path, plan(), **settings)
    assert {site.kept_share for site in lemo_fx.report(model).sites} == {0.5}
    assert set(losses(half)) == set(losses(original))
    assert losses(half) != losses(complete)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    """`torch_compile=True` compiles the whole model; one program for all steps."""
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    original = run(lora(), tmp_path, None, max_steps=3)
    complete = run(lora(), tmp_path, plan(keep=1.0, score="random"), **settings)
    assert losses(complete) == pytest.approx(losses(original), rel=TOLERANCE["compiled"]["rtol"])
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    expected = run(lora(), tmp_path, plan(), max_steps=3)
    found = run(lora(), tmp_path, plan(), **settings)
    assert losses(found) == pytest.approx(losses(expected), rel=TOLERANCE["compiled"]["rtol"])
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("score", "treatment"), [("random", "skip"), ("measured", "exact")])
def test_resumed_training_equals_uninterrupted_training(tmp_path, score, treatment):
    def train(resume=None):
        model = with_lora(tiny("llama"), dropout=0.1)
        config = plan(score=score, eliminated=treatment)
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, CHECKPOINTING: True}
        settings |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        trainer = run(model, tmp_path, config, resume, **settings)
        return losses(trainer), losses(trainer, "eval_loss"), model.state_dict()

    expected = train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    found = train(str(tmp_path / "checkpoint-2"))
    assert len(found[0]) == len(found[1]) == 4
    assert found[:2] == expected[:2]
    for name, weight in expected[2].items():
        assert torch.equal(found[2][name], weight), name
