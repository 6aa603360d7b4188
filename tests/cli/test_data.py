"""Reading, tokenising, holding out and packing documents."""

import dataclasses
import json
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, TOLERANCE, packed, step, tiny, with_lora
from training import plan
from transformers import AutoTokenizer

import lemo_fx
from lemo_fx.cli.data import TEMPLATE as SHIPPED_TEMPLATE
from lemo_fx.cli.data import Document, Reader, Unmarked, hold_out, tokenise, windows
from lemo_fx.cli.demo import ASSETS
from lemo_fx.cli.prepare import Windows, keeps_documents_apart, one_window
from lemo_fx.cli.rows import Chat, Completion, Ids, Instruction, Row, Text, read_rows
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
    asked = {"messages": [{"role": "user", "content": "?"}]}
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028line", "id": 1}\n\n' + json.dumps(asked) + "\n")
    jsonl(tmp_path / "c.jsonl", {"text": "told", "input_ids": [3, 4]})
    rows = read_rows(tmp_path)
    assert [row.content for row in rows] == [
        Text("one\u2028line"),
        Chat([{"role": "user", "content": "?"}]),
        Text("whole\nfile"),
        Ids([3, 4]),
        Text("# Title"),
    ]
    assert rows[1].where.endswith("a.jsonl:3")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
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


def row(content, source="data"):
    return Row("data:1", source, ("field",), content)


def read(content, tokenizer, assistant_only=False):
    (made,) = tokenise([row(content)], Reader(tokenizer, assistant_only), 2048)
    return made


def learnt(made, tokenizer):
    return tokenizer.decode(made.labels[made.labels >= 0])


def test_texts_end_with_the_end_token_once(tokenizer):
    end = tokenizer.eos_token_id
    rows = [row(c) for c in (Text("One."), Text("One.<|endoftext|>"), Text(""), Ids([]), Ids([7, 8]))]
    ticks = []
    found = [d.ids.tolist() for d in tokenise(rows, Reader(tokenizer, False), 2048, ticks.append)]
    once = [*tokenizer("One.")["input_ids"], end]
    assert found == [once, once, [end], [7, 8]]
    assert sum(ticks) == 5
    with pytest.raises(InputError, match="outside the model's vocabulary of 8"):
        tokenise(rows[-1:], Reader(None, False), 8)
    with pytest.raises(InputError, match="needs a tokenizer"):
        tokenise(rows[:1], Reader(None, False), 2048)


def test_chats_follow_the_template(tokenizer, monkeypatch):
    with pytest.raises(InputError, match="no chat template") as refused:
        read(Chat(CHAT), tokenizer)
    # What the error names can be put there.
    assert str(SHIPPED_TEMPLATE) in str(refused.value)
    monkeypatch.setattr(tokenizer, "chat_template", SHIPPED_TEMPLATE.read_text())
    assert learnt(read(Chat(CHAT), tokenizer, assistant_only=True), tokenizer) == "Two miles.<|endoftext|>"
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    whole = read(Chat(CHAT), tokenizer)
    assert tokenizer.decode(whole.ids) == "<user>How far?<assistant>Two miles."
    assert np.array_equal(whole.ids, whole.labels)
    assert learnt(read(Chat(CHAT), tokenizer, assistant_only=True), tokenizer) == "Two miles."
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"data:1: the chat template cannot render .* roles must alternate"):
        read(Chat(CHAT), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")
    with pytest.raises(InputError, match="mark what the assistant says"):
        read(Chat(CHAT), tokenizer, assistant_only=True)


PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = [*CHAT, {"role": "user", "content": "And back?"}, {"role": "assistant", "content": "Four miles."}]


def test_what_the_assistant_says_is_found_where_the_template_marks_nothing(tokenizer, monkeypatch):
    """Its end token is learnt with it, so that the model learns to stop."""
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    made = read(Chat(LONG), tokenizer, assistant_only=True)
    assert learnt(made, tokenizer) == "Two miles.<|endoftext|>Four miles.<|endoftext|>"
    assert tokenizer.decode(made.ids).startswith("<user>How far?<|endoftext|>\n<assistant>Two miles.")
    said = "{{ m['content'] }}<|endoftext|>"
    by_role = (
        "{% if m['role'] == 'assistant' %}{% generation %}"
        + said
        + "{% endgeneration %}{% else %}"
        + said
        + "{% endif %}"
    )
    marked = PLAIN.replace(said, by_role)
    monkeypatch.setattr(tokenizer, "chat_template", marked)
    other = read(Chat(LONG), tokenizer, assistant_only=True)
    assert np.array_equal(other.ids, made.ids)
    assert np.array_equal(other.labels, made.labels)


def test_a_template_that_rewrites_earlier_turns_is_refused_or_replaced_by_that_of_trl(tokenizer, monkeypatch):
    """Qwen3's takes the thoughts of earlier turns away, so a shorter chat is no beginning of a longer one."""
    thinks = PLAIN.replace("<{{ m['role'] }}>", "<{{ m['role'] }}>{% if loop.last %}(thinks){% endif %}")
    monkeypatch.setattr(tokenizer, "chat_template", thinks)
    reader = Reader(tokenizer, True)
    with pytest.raises(Unmarked, match="data:1: the chat template writes earlier messages otherwise"):
        tokenise([row(Chat(LONG))], reader, 2048)
    utils = pytest.importorskip("trl.chat_template_utils")
    assert reader.with_template_of_trl() is None
    monkeypatch.setattr(tokenizer, "chat_template", utils.qwen3_chat_template)
    with pytest.raises(Unmarked):
        tokenise([row(Chat(LONG))], Reader(tokenizer, True), 2048)
    (made,) = tokenise([row(Chat(LONG))], Reader(tokenizer, True).with_template_of_trl(), 2048)
    assert learnt(made, tokenizer).count("miles.<|im_end|>") == 2
    assert "How far" not in learnt(made, tokenizer)


@pytest.mark.parametrize("prompt", ["How far? ", "How far?", ""])
def test_of_a_prompt_and_completion_the_completion_is_learnt(tokenizer, prompt):
    made = read(Completion(prompt, "Two miles."), tokenizer)
    assert tokenizer.decode(made.ids) == prompt + "Two miles.<|endoftext|>"
    # A token over the border is learnt: else the completion's beginning would not be.
    assert learnt(made, tokenizer).removeprefix(" ") == "Two miles.<|endoftext|>"


def test_of_a_conversational_prompt_all_that_follows_is_learnt(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    made = read(Chat(LONG, given=3), tokenizer)
    assert learnt(made, tokenizer) == "Four miles.<|endoftext|>"


def test_instructions_are_chats_where_there_is_a_template_and_else_the_text_of_alpaca(tokenizer, monkeypatch, tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Wait.", "input": "", "output": "."},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    found = read_rows(tmp_path / "alpaca.json")
    assert len(found) == 2
    first, second = tokenise(found, Reader(tokenizer, False), 2048)
    assert tokenizer.decode(first.ids) == (
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3<|endoftext|>"
    )
    assert learnt(first, tokenizer) == "3<|endoftext|>"
    assert "Input" not in tokenizer.decode(second.ids)
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    first, _ = tokenise(found, Reader(tokenizer, False), 2048)
    assert tokenizer.decode(first.ids) == "<user>Add.\n\n1, 2<|endoftext|>\n<assistant>3<|endoftext|>\n"
    assert learnt(first, tokenizer) == "3<|endoftext|>"


SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAPED = {
    "chat": ({"messages": SAID, "id": 3}, Chat(SAID)),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Be short."},
        Chat([{"role": "system", "content": "Be short."}, *SAID]),
    ),
    "prompt": ({"prompt": "Hi", "completion": "Ho"}, Completion("Hi", "Ho")),
    "conversational": ({"prompt": SAID[:1], "completion": SAID[1:]}, Chat(SAID, given=1)),
    "tools": ({"messages": SAID, "tools": '[{"name": "f"}]'}, Chat(SAID, [{"name": "f"}])),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, SAID[1]]}, Chat(SAID)),
    "text": ({"text": "Hi", "meta": {"a": 1}}, Text("Hi")),
    "ids": ({"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}, Ids([3, 4, 5], [-100, -100, 5])),
    "padded": ({"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0]}, Ids([3, 4])),
    "masked": ({"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}, Ids([3, 4, 5], [-100, -100, 5])),
    "history": (
        {"instruction": "b", "input": "", "output": "c", "history": [["Hi", "Ho"]]},
        Instruction(
            Chat([*SAID, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], given=3),
            Completion("### Instruction:\nHi\n\n### Response:\nHo\n\n### Instruction:\nb\n\n### Response:\n", "c"),
        ),
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", "_lines.json", ".parquet", "_saved"])
@pytest.mark.parametrize("kind", SHAPED)
def test_rows_are_what_their_fields_say_in_files_of_every_kind(tmp_path, kind, suffix):
    given, expected = SHAPED[kind]
    path, rows = tmp_path / f"data{suffix}", [given, given]
    if suffix in (".parquet", "_saved"):
        if kind == "parts":
            pytest.skip("columns of tables hold values of one kind")
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(path) if suffix == ".parquet" else table.save_to_disk(path)
    else:
        path.write_text(json.dumps(rows, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    said = []
    assert [found.content for found in read_rows(path, said.append)] == [expected, expected]
    assert said[-1].startswith(f"read from {path}: 2 x `")


@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".tsv", "\t")])
def test_tables_have_rows_too(tmp_path, suffix, comma):
    path = tmp_path / f"data{suffix}"
    path.write_text(f'prompt{comma}completion\n"a\nb"{comma}c\nd{comma}"{comma}"\n', encoding="utf-8-sig")
    assert [found.content for found in read_rows(path)] == [Completion("a\nb", "c"), Completion("d", comma)]
    path.write_text(f"text{comma}id\na{comma}1{comma}2\n")
    with pytest.raises(InputError, match=rf"data{suffix}:2: not as many cells"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", "x", "a.pdf: .pdf is not read: give a file or a folder of .json, .jsonl, .csv"),
        ("a.json", '{"data": [{"text": "a"}]}', "and has `data`: rename"),
        ("a.json", '{"question": "a", "answer": "b"}', "and has `question`, `answer`: rename"),
        ("a.json", "[1, 2]", "row 1: a row must be an object with fields, and this is a int"),
        ("a.json", '[{"text": "a"}', "a.json: not JSON"),
        ("a.jsonl", '{"chosen": "a", "rejected": "b"}', "are for preference training: see examples/trl_dpo.py"),
        ("a.jsonl", '{"messages": [{"role": "boss", "content": "a"}]}', "role 'boss' in `messages` is not known"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "`content` of a message in `messages` must be text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "pictures are not read"),
        ("a.jsonl", '{"prompt": "a", "completion": ["b"]}', "must both be strings, or both lists of messages"),
        ("a.jsonl", '{"input_ids": [1, 2], "labels": [1]}', "1 `labels` for 2 `input_ids`"),
        ("a.jsonl", '{"input_ids": [1, 2], "labels": [2, -100]}', "do not shift them"),
        ("a.jsonl", '{"instruction": "a", "output": 3}', "`output` must be a string"),
        ("a.csv", "prompt;completion\na;b\n", "and has `prompt;completion`: rename"),
        ("a.parquet", "not parquet", "a.parquet cannot be read"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(says)):
        read_rows(tmp_path / name)


def test_of_a_folder_what_is_left_out_is_said(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    jsonl(tmp_path / "test.jsonl", {"text": "b"})
    for name in ("README.md", "picture.png", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    said = []
    assert [found.content.text for found in read_rows(tmp_path, said.append)] == ["a"]
    assert "test.jsonl" in said[0]
    assert said[1] == "left out: 1 .md, 1 .png"


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


LENGTHS = st.sampled_from([1, 2, 3, 7, 20, 40, 500, 600, 900, 4000, 100_000])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), LENGTHS, st.integers(1, 60)), min_size=1, max_size=5),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.sampled_from([1 << 30, 30_000, 60]),
    st.integers(0, 3),
)
def test_the_same_share_of_every_stratum_is_held_out(mixture, share, most, seed):
    """Whatever is mixed: nothing lost, within the budget, and of each source and length about the same share."""
    lengths = [(source, length) for source, length, count in mixture for _ in range(count)]
    starts = np.cumsum([0, *(length for _, length in lengths)])
    documents = [
        dataclasses.replace(document(length, start), source=source)
        for (source, length), start in zip(lengths, starts, strict=False)
    ]
    split = hold_out(documents, share, most, 1024, seed)
    total = int(starts[-1])
    tokens = np.sort(np.concatenate([d.ids for d in (*split.train, *split.heldout)]))
    assert np.array_equal(tokens, np.arange(total))
    held = sum(map(len, split.heldout))
    budget = int(min(share * total, most))
    assert held <= budget
    if budget >= 2 and max(length for _, length in lengths) >= 4:
        assert held
    assert sum(stratum.documents for stratum in split.strata) == len(documents)
    for stratum in split.strata:
        quota = budget / total * stratum.tokens
        of_it = stratum.held_tokens + stratum.cut
        assert of_it <= quota + stratum.longest
        if stratum.held:
            assert 2 * stratum.held <= stratum.documents
        # Long enough to be cut, or enough of them to give one: then the share is met, but for less than a document.
        if stratum.documents > 1 and budget >= 2:
            assert of_it > quota - stratum.longest - 1


def test_short_documents_are_not_all_held_out_beside_long_ones():
    documents = [document(100_000) for _ in range(10)] + [document(500) for _ in range(200)]
    for seed in range(5):
        split = hold_out(documents, 0.1, 1 << 30, 8192, seed)
        assert [(s.longest, s.held, s.documents) for s in split.strata] == [(500, 20, 200), (100_000, 1, 10)]


def test_one_document_gives_its_end():
    split = hold_out([document(100)], 0.1, 1000, 4096, seed=0)
    assert [*map(len, split.train), *map(len, split.heldout)] == [90, 10]
    assert split.heldout[0].ids[0] == 90
    assert "the last 10 tokens of 1 of 1 documents" in str(split.strata[0])


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
