"""Which tokens matter: told by the model's labels, a classifier's, or `lemo_fx.labels` where the loss is outside."""

import logging

import pytest
import torch
import transformers
from tiny import LLAMA_LIKE, Recorder, batch, tiny, with_lora
from torch.nn import functional
from training import arguments

import lemo_fx
from lemo_fx import Elimination, InputError, LemoCallback, LemoConfig

ANSWER = slice(300, 340)
SITE = Elimination(keep=0.3, eliminated="exact", score="random")
CONFIG = LemoConfig(SITE, SITE, block_size=8, dense_layers=())


def row(seed=0):
    ids = torch.randint(3, 97, (512,), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[ANSWER] = ids[ANSWER]
    return {"input_ids": ids, "labels": labels}


def kept(seen):
    """Whether every selection kept every block of the answer."""
    blocks = set(range((ANSWER.start - 1) // 8, (ANSWER.stop - 1) // 8 + 1))
    choices = [{int(t) // 8 for t in row} for tokens in seen.tokens.values() for choice in tokens for row in choice]
    assert choices
    return all(blocks <= choice for choice in choices)


def outside(outputs, labels, num_items_in_batch=None):
    loss = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_loss_outside_the_model(lora, mask):
    model = lemo_fx.transform(with_lora(tiny("llama")) if lora else tiny("llama"), CONFIG)
    inputs = row()
    ids, labels = inputs["input_ids"][None], inputs["labels"][None]
    with Recorder(model) as seen:
        model(input_ids=ids)
    assert not kept(seen)
    with Recorder(model) as seen, lemo_fx.labels(model, labels != -100 if mask else labels):
        model(input_ids=ids)
        model(input_ids=ids)
    assert kept(seen)
    with Recorder(model) as seen, lemo_fx.labels(model, None):
        model(input_ids=ids)
    assert not kept(seen)


@pytest.mark.parametrize("how", ["compute_loss_func", "label_smoothing_factor", "own_method"])
def test_the_callback_tells_what_the_trainer_takes_out_of_a_batch(how, tmp_path):
    model = lemo_fx.transform(with_lora(tiny("llama")), CONFIG)
    settings = {how: 0.1} if how == "label_smoothing_factor" else {}
    more = {"compute_loss_func": outside} if how == "compute_loss_func" else {}
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, max_steps=2, **settings),
        train_dataset=[row(seed) for seed in range(4)],
        **more,
    )
    if how == "own_method":
        trainer.compute_loss = lambda model, inputs, **_: outside(model(inputs["input_ids"]), inputs["labels"], 9)
    before = dict(vars(trainer))
    trainer.add_callback(LemoCallback(trainer))
    with Recorder(model) as seen:
        trainer.train()
        assert kept(seen)
        assert vars(trainer).get("compute_loss") is before.get("compute_loss")


@pytest.mark.parametrize("lora", ["none", "before", "after"])
def test_a_token_classifier_tells_its_labels(lora):
    config = transformers.LlamaConfig(**LLAMA_LIKE, vocab_size=97, num_hidden_layers=2, num_labels=3)
    model = transformers.LlamaForTokenClassification(config).train()
    adapted = {"task_type": "TOKEN_CLS", "targets": ["q_proj"]}
    model = with_lora(model, **adapted) if lora == "before" else model
    model = lemo_fx.transform(model, CONFIG)
    model = with_lora(model, **adapted) if lora == "after" else model
    inputs = row()
    labels = torch.where(inputs["labels"] == -100, -100, inputs["labels"] % 3)[None]
    with Recorder(model) as seen:
        model(input_ids=inputs["input_ids"][None], labels=labels).loss.backward()
    assert kept(seen)
    with Recorder(model) as seen:
        model(input_ids=inputs["input_ids"][None])
    assert not kept(seen), "labels of an earlier call"


def test_labels_of_another_shape_and_kind():
    model = tiny("llama")
    with pytest.raises(lemo_fx.NotTransformedError), lemo_fx.labels(model, row()["labels"][None]):
        pass
    lemo_fx.transform(model, CONFIG)
    for wrong in ([1, 2], torch.zeros(4), torch.zeros(2, 3)):
        with pytest.raises(InputError, match="labels must be a tensor"), lemo_fx.labels(model, wrong):
            pass
    with lemo_fx.labels(model, row()["labels"][None]), pytest.raises(InputError, match=r"\[1, 512\].*\[2, 48\] tokens"):
        model(batch()["input_ids"])
    model(**batch())


def test_a_step_without_labels_is_noted(caplog):
    model = lemo_fx.transform(tiny("llama"), CONFIG)
    ids = batch()["input_ids"]

    def notes():
        return [note for note in lemo_fx.report(model).notes if "lemo_fx.labels" in note]

    with caplog.at_level(logging.WARNING, logger="lemo_fx"):
        model.eval()(ids)
        assert not notes()
        model.train()
        for _ in range(2):
            model(ids)
    assert len([r for r in caplog.records if "lemo_fx.labels" in r.message]) == 1
    assert notes()
    model(ids, labels=ids)
    assert not notes()
