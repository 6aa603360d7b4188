"""Tasks of long contexts: the answers are right, labelled, and far from where they stand."""

import long_tasks
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def solved(name, context, question):
    """The answer that a reader of the context finds."""
    lines = context.strip().split(".\n")
    lines = [line.rstrip(".") for line in lines]
    if name in ("keys", "lookalikes"):
        return [line.removeprefix(question).strip() for line in lines if line.startswith(question + " ")]
    subject = question.rsplit(" ", 2)[1]
    if name == "values":
        return [" ".join(line.split()[-1] for line in lines if line.startswith(f"A code of item {subject} is"))]
    if name == "variables":
        told = dict(line.removeprefix("VAR ").split(" = ") for line in lines)
        value = told[subject]
        while value.startswith("VAR "):
            value = told[value.removeprefix("VAR ")]
        return [value]
    return [str(lines.count(f"One {subject}"))]


@pytest.mark.parametrize("name", long_tasks.TASKS)
def test_answers_are_in_the_context_and_only_they_are_marked(tokenizer, name):
    task = long_tasks.make(name, tokenizer, 4096)
    ids, owners = task.batch(np.random.default_rng(0), 2)
    assert ids.shape == owners.shape == (2, 4096)
    for row, owner in zip(ids, owners, strict=True):
        assert (owner > 0).any()
        first = int((owner > 0).nonzero()[0])
        text = tokenizer.decode(row[:first])
        context, _, question = text.strip("\n").rpartition("\n")
        assert len(context) > 0.8 * 4096
        for number in range(1, long_tasks.QUESTIONS + 1):
            places = (owner == number).nonzero().flatten()
            before = tokenizer.decode(row[: int(places[0])])
            question = before.rpartition("\n")[2]
            assert solved(name, context, question) == [tokenizer.decode(row[places]).strip()]


def test_only_what_the_assistant_quotes_is_marked(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    random = np.random.default_rng(0)
    lines = [" ".join(str(n) for n in random.integers(100, 10000, 24)) for _ in range(400)]
    task = long_tasks.Quotes("quotes", tokenizer, 8192, ["\n".join(lines)], room=2500)
    row, owner = task.sequence(random)
    assert row.shape == owner.shape == (8192,)
    for number in range(1, long_tasks.QUESTIONS + 1):
        places = (owner == number).nonzero()[0]
        opening = tokenizer.decode(row[: places[0]]).rpartition('begins with "')[2].partition('"')[0]
        (line,) = (line for line in lines if line.startswith(opening))
        assert tokenizer.decode(row[places]) == " ".join(line.split()[8:20]) + "</>"
        assert tokenizer.decode(row[: places[0]]).endswith("<assistant>")
    short = long_tasks.make("quotes", tokenizer, 8192, ["one short line"])
    with pytest.raises(ValueError, match="no document"):
        short.sequence(random)


def test_same_seed_same_task_other_seed_another(tokenizer):
    task = long_tasks.make("keys", tokenizer, 2048)
    one, again, other = (task.batch(np.random.default_rng(seed), 1)[0] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_exact_match_wants_every_token(tokenizer):
    ids = torch.randint(0, 50, (1, 12))
    owners = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 50).float() * 100
    nats, right = long_tasks.exact_match(logits, ids, owners)
    assert right.tolist() == [[True, True]]
    assert nats.shape == (4,)
    assert nats.max() < 1e-6
    logits[0, 7] = logits[0, 7].roll(1)
    logits[0, 9] = logits[0, 9].roll(1)
    assert long_tasks.exact_match(logits, ids, owners)[1].tolist() == [[True, False]]


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no task: keys, lookalikes.*quotes with a corpus"):
        long_tasks.make("riddles", tokenizer, 2048)
    with pytest.raises(ValueError, match="too few"):
        long_tasks.make("values", tokenizer, 512)
