"""What trains densely says so, once."""

import logging

import pytest
import torch
from tiny import batch, step, tiny, with_lora
from training import plan

import lemo_fx
from lemo_fx.runtime.layer import warn_once


@pytest.fixture
def said(caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lemo_fx"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("lemo_fx")]
    warn_once.cache_clear()


@pytest.fixture
def model():
    return lemo_fx.transform(with_lora(tiny("llama")), plan(score="random")).train()


def test_a_loop_in_eval_mode_is_told_so_once(model, said):
    model.eval()
    for _ in range(2):
        step(model, batch())
    assert said() == ["a model in eval mode runs its original layers: if this is training, call model.train()"]


def test_sequences_under_one_block_are_told_so_once(model, said):
    ids = torch.arange(3, 8)[None]
    for _ in range(2):
        step(model, {"input_ids": ids, "labels": ids})
    (words,) = said()
    assert words.startswith("sequences under one block of 8 tokens run the original layers: nothing is eliminated")


def test_what_is_meant_to_be_dense_is_not_remarked_on(model, said):
    step(model, batch())
    lemo_fx.set_dense(model)
    step(model, batch())
    lemo_fx.set_dense(model, False)
    with torch.no_grad():
        model.eval()(**batch())
        model.generate(torch.arange(3, 20)[None], max_new_tokens=2, do_sample=False)
    assert said() == []
