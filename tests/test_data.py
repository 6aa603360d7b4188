"""Reading, tokenising, holding out and packing documents."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, TOLERANCE, packed, step, tiny, with_lora
from training import plan
from transformers import AutoTokenizer

import lemo_fx
from lemo_fx.cli.data import Document, hold_out, read_rows, tokenise, windows
from lemo_fx.cli.demo import ASSETS
from lemo_fx.cli.train import Windows, keeps_documents_apart, one_window
from lemo_fx.errors import InputError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Two miles."}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model")


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def document(length, start=0):
    ids = np.arange(start, start + length, dtype=np.int32)
    return Document(ids, ids)


def test_a_folder_is_read_by_name_and_kind(tmp_path):
    (tmp_path / "b.txt").write_text("whole\nfile")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "deep").mkdir()
    # A JSON string may hold what str.splitlines takes for a line's end.
    (tmp_path / "deep" / "z.md").write_text("# Title")
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028line", "id": 1}\n\n{"messages": [{"role": "user"}]}\n')
    jsonl(tmp_path / "c.jsonl", {"text": "told", "input_ids": [3, 4]})
    rows = read_rows(tmp_path)
    assert [(row.kind, row.content) for row in rows] == [
        ("text", "one\u2028line"),
        ("messages", [{"role": "user"}]),
        ("text", "whole\nfile"),
        ("input_ids", [3, 4]),
        ("text", "# Title"),
    ]
    assert rows[1].where.endswith("a.jsonl:3")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "needs a field"),
        ('{"words": 1}', "needs a field"),
        ('{"text": 1}', "must be a string"),
        ('{"messages": []}', "must be a list of objects"),
        ('{"input_ids": [1.5]}', "token numbers"),
        ('{"input_ids": [true]}', "token numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(InputError, match=says) as caught:
        read_rows(path)
    assert "data.jsonl:2" in str(caught.value)


def test_texts_end_with_the_end_token_once(tokenizer):
    end = tokenizer.eos_token_id
    rows = [("text", "One."), ("text", "One.<|endoftext|>"), ("text", ""), ("input_ids", []), ("input_ids", [7, 8])]
    rows = [lemo_fx.cli.data.Row(str(i), *row) for i, row in enumerate(rows)]
    ticks = []
    found = [d.ids.tolist() for d in tokenise(rows, tokenizer, 2048, tick=ticks.append)]
    once = [*tokenizer("One.")["input_ids"], end]
    assert found == [once, once, [end], [7, 8]]
    assert sum(ticks) == 5
    with pytest.raises(InputError, match="outside the model's vocabulary of 8"):
        tokenise(rows[-1:], None, 8)
    with pytest.raises(InputError, match="needs a tokenizer"):
        tokenise(rows[:1], None, 2048)


def test_chats_follow_the_template(tokenizer, monkeypatch):
    rows = [lemo_fx.cli.data.Row("data:1", "messages", CHAT)]
    with pytest.raises(InputError, match="no chat template"):
        tokenise(rows, tokenizer, 2048)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    (whole,) = tokenise(rows, tokenizer, 2048)
    assert tokenizer.decode(whole.ids) == "<user>How far?<assistant>Two miles."
    assert np.array_equal(whole.ids, whole.labels)
    (part,) = tokenise(rows, tokenizer, 2048, assistant_only=True)
    assert tokenizer.decode(part.labels[part.labels >= 0]) == "Two miles."
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"data:1: the chat template cannot render .* roles must alternate"):
        tokenise(rows, tokenizer, 2048)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")
    with pytest.raises(InputError, match="does not mark what the assistant says"):
        tokenise(rows, tokenizer, 2048, assistant_only=True)


@pytest.mark.parametrize("pack", [False, True])
def test_a_piece_without_anything_to_learn_is_dropped(pack):
    ids = np.arange(40, dtype=np.int32)
    # Learnt: the first token of the second piece, which nothing predicts, and one of the last piece.
    labels = np.where((ids == 16) | (ids == 35), ids, np.int32(lemo_fx.cli.data.IGNORED))
    (window,) = windows([Document(ids, labels)], 16, pack)
    assert [piece.ids.tolist() for piece in window] == [[*range(32, 40)]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 16), st.booleans())
def test_every_token_is_in_one_window(lengths, context, pack):
    starts = np.cumsum([0, *lengths])
    documents = [document(n, s) for n, s in zip(lengths, starts, strict=False)]
    made = windows(documents, context, pack)
    sizes = [sum(map(len, window)) for window in made]
    assert all(1 < size <= context for size in sizes)
    tokens = sorted(int(i) for window in made for piece in window for i in piece.ids)
    # A last piece of one token has nothing to learn.
    lost = [starts[i] + n - 1 for i, n in enumerate(lengths) if n % context == 1]
    assert tokens == sorted({*range(starts[-1])} - {int(i) for i in lost})
    if pack:
        # Best fit: no two windows could have been one, but for what was placed before a window was there.
        assert sum(2 * size <= context for size in sizes) <= 1
    else:
        assert all(len(window) == 1 for window in made)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 60))
def test_holding_out_loses_nothing_and_keeps_its_budget(lengths, most):
    starts = np.cumsum([0, *lengths])
    documents = [document(n, s) for n, s in zip(lengths, starts, strict=False)]
    train, heldout = hold_out(documents, 0.5, most, seed=0)
    assert sorted(int(i) for d in (*train, *heldout) for i in d.ids) == [*range(starts[-1])]
    assert sum(map(len, heldout)) <= min(most, sum(lengths) / 2)
    if sum(lengths) >= 4:
        assert heldout
        assert train


def test_one_document_gives_its_end():
    train, heldout = hold_out([document(100)], 0.1, 1000, seed=0)
    assert [*map(len, train), *map(len, heldout)] == [90, 10]
    assert heldout[0].ids[0] == 90


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_is_chosen_where_the_model_keeps_documents_apart(architecture):
    """OPT makes its mask without position_ids, and so gets one document a window."""
    model = tiny(architecture)
    assert keeps_documents_apart(model) == (not architecture.startswith("opt"))
    assert model.training


def test_a_packed_window_has_the_loss_of_its_documents():
    model = tiny("llama")
    pieces = [document(20, 3), document(17, 30), document(9, 50)]
    together = one_window([Windows([pieces])[0]])
    apart = [one_window([Windows([[piece]])[0]]) for piece in pieces]
    assert "position_ids" not in apart[0]
    expected = sum(model(**row).loss * (row["labels"].numel() - 1) for row in apart) / (20 + 17 + 9 - 3)
    torch.testing.assert_close(model(**together, use_cache=False).loss, expected, **TOLERANCE["fp32"])


@pytest.mark.parametrize("treatment", ["skip", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox", "gpt2"])
def test_no_gradient_crosses_documents_in_rewritten_layers(architecture, treatment):
    inputs = packed([40, 41])
    inputs["input_ids"][0, :40] = inputs["input_ids"][0, :40] % 40 + 3
    inputs["input_ids"][0, 40:] = inputs["input_ids"][0, 40:] % 40 + 50
    inputs["labels"][0, :41] = -100
    model = lemo_fx.transform(
        with_lora(tiny(architecture, tie_word_embeddings=False)), plan(eliminated=treatment, score="random")
    )
    embedding = model.get_input_embeddings().weight.requires_grad_()
    step(model, inputs)
    assert embedding.grad[50:90].abs().max() > 0
    assert not embedding.grad[3:43].any()
