"""The accuracy study's own sums: tokens of any tokenizer, key tokens, gaps and speeds."""

import json

import numpy as np
import pytest
import study_accuracy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from train_small_model import WindowSampler, encode_documents
from transformers import PreTrainedTokenizerFast


def tokenizer(extra):
    """A byte-level tokenizer with so many more entries, the last of which is a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([f"<{i}>" for i in range(extra)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(("extra", "dtype"), [(10, np.int16), (40_000, np.int32)])
def test_tokens_of_large_vocabularies_survive(extra, dtype):
    large = tokenizer(extra)
    text = f"one <{extra - 1}> two"
    (ids,) = encode_documents(large, [text])
    assert ids.dtype == dtype
    assert ids.max() == len(large) - 1
    assert large.decode(ids) == text
    separator = len(large) - 1
    sampler = WindowSampler([ids, ids], len(ids), separator, torch.device("cpu"), 0)
    window = sampler.batch(1)[0]
    assert window.min() >= 0
    assert separator in window


class Copies(torch.nn.Module):
    """Knows a token well once it has occurred, and nothing otherwise."""

    def forward(self, input_ids):
        """[B, S] -> [B, S, V] logits."""
        logits = torch.zeros(*input_ids.shape, 64)
        for at in range(input_ids.shape[1]):
            for row, ids in enumerate(input_ids):
                logits[row, at, ids[: at + 1]] = 6.0 / len(set(ids[: at + 1].tolist())) ** 0.5
        return type("Output", (), {"logits": logits})


def test_key_tokens_are_those_that_need_the_long_context(monkeypatch):
    monkeypatch.setattr(study_accuracy, "SHORT_CONTEXT", 8)
    ids = torch.full((1, 32), 5)
    # Planted at the beginning, wanted at the end: too far for windows of eight.
    ids[0, 1], ids[0, 30] = 9, 9
    texts = study_accuracy.Texts([], ids, {}, 0)
    texts.look_at(Copies(), 1)
    assert texts.key.shape == (1, 31)
    assert texts.key.nonzero().tolist() == [[0, 29]]


def test_questions_are_cut_at_the_beginning_and_text_at_the_end():
    x = torch.arange(8)[None]
    assert study_accuracy.Questions.cut(x, 3).tolist() == [[5, 6, 7]]
    assert study_accuracy.Texts.cut(x, 3).tolist() == [[0, 1, 2]]


def test_labels_of_half_the_blocks_count_and_others_in_the_next_step():
    labels, random = torch.arange(200).repeat(3, 1), torch.Generator().manual_seed(0)
    first, second = (study_accuracy.some_labels(labels, 0.5, random) for _ in range(2))
    counted = first != -100
    assert torch.equal(first[counted], labels[counted])
    # Four blocks a row, the last of eight tokens: two of them count, each as a whole.
    assert all(
        sum(block.all().item() for block in row.split(64)) == sum(block.any().item() for block in row.split(64)) == 2
        for row in counted
    )
    assert not torch.equal(first, second)


def test_gaps_are_of_text_and_of_the_same_seed(tmp_path):
    rows = [
        {"plan": plan, "context": 64, "seed": seed, "perplexity": value, "perplexity_last_quarter": value}
        for plan, seed, value in (("lora", 0, 10.0), ("lora", 1, 20.0), ("plain-0.25-kept", 1, 21.0))
    ]
    rows.append({"plan": "lora", "context": 64, "seed": 1, "task": "keys", "match": 1.0, "nats": 0.0})
    (summary,) = [s for s in study_accuracy.summarise(rows) if s.plan != "lora"]
    assert summary.gaps == [pytest.approx(5.0)]
    assert summary.key_gaps == []
    bench = tmp_path / "bench.json"
    run = {"variant": "lora-checkpointed", "tokens": 32768, "step_ms": 5.0, "peak_allocated_gb": 1.0}
    bench.write_text(json.dumps({"runs": [run]}))
    # What was written without regard to time has no speed.
    assert study_accuracy.speeds([bench], ["lora", "plain-0.25-kept"]) == {"lora": (1.0, 1.0)}
