"""Tasks whose answers depend on tokens far away, in the manner of RULER (arXiv 2404.06654), as data to fine-tune on.

Every sequence is a context of one-line statements, then questions with their answers. Statements that no question asks
for are distractors of the same form. The last token of a sequence is the end of its last answer, and what is left over
of the length is a few unlabelled line ends at its beginning.

    keys       The code of item 4821 is 73915.            one value of many keys
    lookalikes the same beside price, size and mass of the same items: the attribute counts as well as the number
    values     three codes of one item, far apart; all are asked for, in their order
    variables  VAR 4821 = 73915 and VAR 1177 = VAR 4821: chains of three, whose end is asked for
    counting   a list of words; how often does one of them occur (one to nine times)?
    quotes     a conversation about a real document, in the model's chat template; only the assistant's turns, which
               quote what follows a paragraph's first words, are answers
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

QUESTIONS = 8
"""In one sequence."""
ATTRIBUTES = ("code", "price", "size", "mass")
HOPS = 3
_WORDS = (
    "apple bridge candle desert engine feather garden hammer island jacket kettle ladder mirror needle orange pencil "
    "quarry ribbon saddle tunnel velvet window yellow anchor basket copper dragon forest guitar harbor insect jungle"
)
WORDS = tuple(_WORDS.split())
Draw = Callable[[np.random.Generator, int], tuple[list[str], list[tuple[str, str]]]]
"""(random, number of statements) -> statements, (question, answer)s."""


@dataclass
class Task:
    """Sequences of one kind and length, of questions and the answers to them."""

    name: str
    tokenizer: Any
    length: int

    def sequence(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(ids [S], question [S]: 0 or the number, from one, of the question that a token answers)."""
        raise NotImplementedError

    def _fill(self, texts: list[str], owner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts and the owner of each, filled up to the length from the left."""
        parts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = np.concatenate([np.array(part, dtype=np.int64) for part in parts])
        owners = np.repeat(owner, [len(part) for part in parts])
        filler = self.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
        missing = max(self.length - len(ids), 0)
        return np.concatenate([np.full(missing, filler), ids]), np.concatenate([np.zeros(missing, int), owners])

    def batch(self, random: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S] ids and [B, S] questions, as of `sequence`."""
        ids, owners = zip(*(self.sequence(random) for _ in range(rows)), strict=True)
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(owners))


@dataclass
class Statements(Task):
    """A context of statements on one line each.

    Attributes:
        draw: makes statements and questions.
        statements: as many as fit in a sequence.
    """

    draw: Draw
    statements: int = 0

    def sequence(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As of `Task`.

        Raises:
            ValueError: what was drawn does not fit.
        """
        lines, asked = self.draw(random, self.statements)
        texts = ["\n".join(lines) + "\n"]
        owner = [0]
        for number, (question, answer) in enumerate(asked, 1):
            texts += [question, f" {answer}", ".\n"]
            owner += [0, number, 0]
        ids, owners = self._fill(texts[:-1], owner[:-1])
        if len(ids) > self.length:
            raise ValueError(f"{self.name}: {len(ids)} tokens do not fit into {self.length}")
        return ids, owners


def _numbers(random: np.random.Generator, count: int) -> list[int]:
    """Different ones of four digits."""
    return random.choice(np.arange(1000, 10000), count, replace=False).tolist()


def _value(random: np.random.Generator) -> str:
    return str(random.integers(10000, 100000))


def _asked(random: np.random.Generator, count: int) -> list[int]:
    """Which of `count` are asked for: one in every part of the context, in random order."""
    edges = np.linspace(0, count, QUESTIONS + 1).astype(int)
    return random.permutation([random.integers(a, b) for a, b in itertools.pairwise(edges)]).tolist()


def keys(random: np.random.Generator, statements: int) -> tuple[list[str], list[tuple[str, str]]]:
    """One value of many keys."""
    items = _numbers(random, statements)
    values = [_value(random) for _ in items]
    lines = [f"The code of item {item} is {value}." for item, value in zip(items, values, strict=True)]
    return lines, [(f"The code of item {items[i]} is", values[i]) for i in _asked(random, statements)]


def lookalikes(random: np.random.Generator, statements: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Every item has four attributes with a value each, far apart."""
    items = _numbers(random, max(statements // len(ATTRIBUTES), 1))
    pairs = [(attribute, item) for attribute in ATTRIBUTES for item in items]
    pairs = [pairs[i] for i in random.permutation(len(pairs))]
    values = [_value(random) for _ in pairs]
    lines = [f"The {a} of item {item} is {value}." for (a, item), value in zip(pairs, values, strict=True)]
    asked = [(pairs[i], values[i]) for i in _asked(random, len(pairs))]
    return lines, [(f"The {a} of item {item} is", value) for (a, item), value in asked]


def values(random: np.random.Generator, statements: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Every item has three codes, which are asked for together, in the order of the context."""
    items = _numbers(random, max(statements // 3, 1))
    order = [items[i] for i in random.permutation(np.repeat(np.arange(len(items)), 3))]
    codes = [_value(random) for _ in order]
    lines = [f"A code of item {item} is {code}." for item, code in zip(order, codes, strict=True)]
    found: dict[int, list[str]] = {}
    for item, code in zip(order, codes, strict=True):
        found.setdefault(item, []).append(code)
    chosen = [items[i] for i in random.choice(len(items), QUESTIONS)]
    return lines, [(f"The codes of item {item} are", " ".join(found[item])) for item in chosen]


def variables(random: np.random.Generator, statements: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Chains of three variables; their order is that of assignment, other chains between them."""
    chains = max(statements // HOPS, 1)
    names = _numbers(random, chains * HOPS)
    codes = [_value(random) for _ in range(chains)]
    # The place of a statement: which chain is next; its first variable gets a number, the next ones their forerunner.
    order = random.permutation(np.repeat(np.arange(chains), HOPS)).tolist()
    seen, lines = [0] * chains, []
    for chain in order:
        name = names[chain * HOPS + seen[chain]]
        value = f"VAR {names[chain * HOPS + seen[chain] - 1]}" if seen[chain] else codes[chain]
        lines.append(f"VAR {name} = {value}.")
        seen[chain] += 1
    chosen = random.choice(chains, QUESTIONS)
    return lines, [(f"The number in VAR {names[c * HOPS + HOPS - 1]} is", codes[c]) for c in chosen]


def counting(random: np.random.Generator, statements: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Eight words occur one to nine times each; the other lines hold the other words."""
    chosen = random.permutation(WORDS)
    asked, others = chosen[:QUESTIONS].tolist(), chosen[QUESTIONS:].tolist()
    counts = random.integers(1, 10, QUESTIONS)
    lines = [word for word, count in zip(asked, counts, strict=True) for _ in range(count)]
    lines += random.choice(others, max(statements - len(lines), 0)).tolist()
    lines = [f"One {lines[i]}." for i in random.permutation(len(lines))]
    return lines, [(f"The number of lines with {word} is", str(n)) for word, n in zip(asked, counts, strict=True)]


TASKS: dict[str, Draw] = {f.__name__: f for f in (keys, lookalikes, values, variables, counting)}


@dataclass
class Quotes(Task):
    """A document, then a conversation about it: the user names a paragraph's first words, the assistant goes on.

    Attributes:
        documents: texts to draw from, each of more tokens than a sequence.
        room: tokens that the conversation takes at most.
    """

    documents: list[str]
    room: int = 500
    _OPENING, _QUOTED = 8, 12
    """Words that the user names, and that the assistant quotes."""

    def sequence(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As of `Task`; a document that lacks long paragraphs, or tokens, is passed over.

        Raises:
            ValueError: so do a thousand.
        """
        for _ in range(1000):
            text = self._excerpt(random)
            asked = self._paragraphs(random, text)
            if len(asked) == QUESTIONS:
                found = self._fill(*self._conversation(text, asked))
                if len(found[0]) == self.length:
                    return found
        raise ValueError(f"{self.name}: no document holds a conversation of {self.length} tokens")

    def _excerpt(self, random: np.random.Generator) -> str:
        """Whole lines of a document, from anywhere in it."""
        document = self.documents[random.integers(len(self.documents))]
        start = random.integers(max(len(document) - 4 * self.length, 1))
        part = document[start : start + 6 * self.length]
        budget = self.length - self.room
        ends = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = ends[budget][0] if len(ends) > budget else 0
        return part[part.find("\n") + 1 : part.rfind("\n", 0, end) + 1]

    def _paragraphs(self, random: np.random.Generator, text: str) -> list[tuple[str, str]]:
        """(first words, the next words) of a paragraph in every part of the text, in random order."""
        lines = [line.split() for line in text.splitlines()]
        long = [words for words in lines if len(words) >= self._OPENING + self._QUOTED]
        openings = [" ".join(words[: self._OPENING]) for words in long]
        once = [i for i, opening in enumerate(openings) if text.count(opening) == 1]
        if len(once) < 2 * QUESTIONS:
            return []
        chosen = [once[i] for i in _asked(random, len(once))]
        return [(openings[i], " ".join(long[i][self._OPENING :][: self._QUOTED])) for i in chosen]

    def _conversation(self, text: str, asked: list[tuple[str, str]]) -> tuple[list[str], list[int]]:
        """Pieces of text, and the number of the question that each answers."""
        turns, pieces, owner, done = [], [], [], ""
        for number, (opening, quoted) in enumerate(asked, 1):
            question = f'How does the paragraph go on that begins with "{opening}"?'
            turns.append({"role": "user", "content": question if turns else f"{text}\n{question}"})
            before = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            turns.append({"role": "assistant", "content": quoted})
            after = self.tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
            pieces += [before[len(done) :], after[len(before) :]]
            owner += [0, number]
            done = after
        return pieces, owner


def make(name: str, tokenizer: Any, length: int, documents: list[str] | None = None) -> Task:
    """A task that fills sequences of `length` tokens.

    Args:
        documents: what "quotes" is about.

    Raises:
        ValueError: there is no such task, or it does not fit into the length.
    """
    if name == "quotes" and documents:
        return Quotes(name, tokenizer, length, documents)
    if name not in TASKS:
        raise ValueError(f"{name!r} is no task: {', '.join(TASKS)}, and quotes with a corpus")
    task = Statements(name, tokenizer, length, TASKS[name])
    # As many statements as leave a little room: their lengths vary with how words are cut.
    sizes = {}
    for count in (100, 200):
        lines, asked = task.draw(np.random.default_rng(0), count)
        text = "\n".join(lines) + "\n" + "".join(f"{q} {a}.\n" for q, a in asked)
        sizes[count] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    each = (sizes[200] - sizes[100]) / 100
    task.statements = int((0.97 * length - (sizes[100] - 100 * each)) / each)
    if task.statements < 2 * QUESTIONS:
        raise ValueError(
            f"{name}: {length} tokens hold {task.statements} statements, too few for {QUESTIONS} questions"
        )
    return task


@torch.no_grad()
def exact_match(logits: torch.Tensor, ids: torch.Tensor, owners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model knows of the answers.

    Args:
        logits: [B, S, V] of a forward over `ids`.
        ids, owners: [B, S] of a task.

    Returns:
        [answer tokens] nats, and [B, questions] bool: every token of the answer is the likeliest one, which is what
        greedy decoding would write.
    """
    target, owner = ids[:, 1:], owners[:, 1:]
    counted = owner > 0
    picked = logits[:, :-1][counted].float()
    nats = torch.nn.functional.cross_entropy(picked, target[counted], reduction="none")
    wrong = torch.zeros(ids.shape[0], int(owners.max()) + 1, device=ids.device)
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(target)
    miss = (picked.argmax(-1) != target[counted]).float()
    wrong.index_put_((rows[counted], owner[counted]), miss, accumulate=True)
    return nats, wrong[:, 1:] == 0
