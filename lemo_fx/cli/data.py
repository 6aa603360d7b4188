"""Rows -> documents of tokens -> those that are held out -> windows to train on."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lemo_fx.cli.rows import Chat, Completion, Ids, Instruction, Row, Text
from lemo_fx.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 64
"""Texts that a tokenizer gets at once."""
TEMPLATE = Path(__file__).parents[1] / "demo_assets" / "chat_template.jinja"
"""One for models that have none; it marks what the assistant says."""
IGNORED = -100
"""Label of a token that is not learnt, as everywhere in transformers."""


@dataclass(frozen=True)
class Document:
    """A document or a piece of one: its tokens [N] and labels [N] (IGNORED: not learnt), both int32, and its source."""

    ids: np.ndarray
    labels: np.ndarray
    source: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Document:
        return replace(self, ids=self.ids[part], labels=self.labels[part])


Window = Sequence[Document]
"""Documents that are read together, one after another, none seeing another."""


class Unmarked(InputError):
    """What the assistant says cannot be found in a rendered chat."""


class Reader:
    """Rows -> (tokens, which of them are learnt; None for all), by a model's tokenizer.

    Of chats, what the assistant says is marked by the template itself ({% generation %}), as TRL has it; where it marks
    nothing, it is what a longer beginning of the chat adds to a shorter one.

    Args:
        tokenizer: None is enough where every row has `input_ids`.
        assistant_only: of chats, learn only what the assistant says; prompts are never learnt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, assistant_only: bool) -> None:
        self.tokenizer: Any = tokenizer
        self.assistant_only = assistant_only
        template = tokenizer.chat_template if tokenizer else None
        self.template = template.get("default") if isinstance(template, dict) else template

    def read(self, rows: Sequence[Row]) -> list[tuple[Sequence[int], Sequence[bool] | None]]:
        """All rows; texts at once, which is quicker."""
        if self.tokenizer is None and not all(isinstance(row.content, Ids) for row in rows):
            row = next(row for row in rows if not isinstance(row.content, Ids))
            raise InputError(f"{row.where}: `{row.fields[0]}` needs a tokenizer in the model's folder")
        texts = [row.content.text for row in rows if isinstance(row.content, Text)]
        encoded = iter(self.tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        return [(self._ended(next(encoded)), None) if isinstance(row.content, Text) else self._one(row) for row in rows]

    def _one(self, row: Row) -> tuple[Sequence[int], Sequence[bool] | None]:
        content = row.content
        if isinstance(content, Instruction):
            content = content.chat if self.template else content.plain
        if isinstance(content, Ids):
            labels = content.labels
            return content.ids, None if labels is None else [label != IGNORED for label in labels]
        if isinstance(content, Completion):
            ids, learnt = self._learnt(
                content.prompt + content.completion, [(len(content.prompt), math.inf)], special=True
            )
            ended = self._ended(ids)
            # The end belongs to the completion, whoever put it there.
            ends = ended[-1:] == [self.tokenizer.eos_token_id]
            return ended, [*learnt[: len(ended) - 1], True] if ends else learnt
        assert isinstance(content, Chat)
        return self._chat(row.where, content)

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _learnt(
        self, text: str, spans: Sequence[tuple[float, float]], special: bool
    ) -> tuple[list[int], Sequence[bool]]:
        """Tokens of a text, and whether each has a part in one of the spans of characters."""
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{type(self.tokenizer).__name__} does not say where its tokens stand in a text, so a part of one "
                "cannot be learnt by itself: give `text`, or `input_ids` with `labels`"
            )
        made = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        learnt = [
            any(first < end and start < last and first < last for start, end in spans)
            for first, last in made["offset_mapping"]
        ]
        return made["input_ids"], learnt

    def _chat(self, where: str, chat: Chat) -> tuple[list[int], Sequence[bool] | None]:
        if not self.template:
            raise InputError(
                f"{where}: the model's tokenizer has no chat template for messages: put one into the model's folder, "
                f"such as {TEMPLATE}, or give `text`"
            )
        if chat.given:
            return self._by_beginnings(where, chat, [(chat.given, len(chat.messages))])
        if not self.assistant_only:
            return self._render(where, chat.messages, chat.tools, tokenize=True)["input_ids"], None
        if "endgeneration" in self.template:
            made = self._render(where, chat.messages, chat.tools, tokenize=True, return_assistant_tokens_mask=True)
            return made["input_ids"], [bool(said) for said in made["assistant_masks"]]
        said = [(n, n + 1) for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return self._by_beginnings(where, chat, said)

    def _render(self, where: str, messages: Sequence[Any], tools: Any, tokenize: bool, **more: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=tokenize, return_dict=tokenize, **more
            )
        except (jinja2.TemplateError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where}: the chat template cannot render these messages: {error}") from error

    def _by_beginnings(
        self, where: str, chat: Chat, parts: Sequence[tuple[int, int]]
    ) -> tuple[list[int], Sequence[bool]]:
        """Each part is messages [from, to): what the chat up to `to` has more than the chat up to `from`.

        Raises:
            Unmarked: one is not the beginning of the other, nor of the whole chat.
        """

        def text(until: int, asked: bool) -> str:
            return self._render(
                where, chat.messages[:until], chat.tools, tokenize=False, add_generation_prompt=asked
            )  # fmt: skip

        whole, spans = text(len(chat.messages), False), []
        for first, last in parts:
            before, after = text(first, True), text(last, False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise Unmarked(
                    f"{where}: the chat template writes earlier messages otherwise once later ones follow, and does "
                    "not mark what the assistant says ({% generation %}): put a template that does into the model's "
                    "folder (pip install trl brings some), or train on whole chats"
                )
            spans.append((len(before), len(after.rstrip())))
        return self._learnt(whole, spans, special=False)

    def with_template_of_trl(self) -> Reader | None:
        """The same with TRL's training template for this one, which marks what the assistant says; None: has none."""
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError:
            return None
        try:
            template = get_training_chat_template(self.tokenizer)
        except (ValueError, TypeError):
            return None
        if template is None or template == self.template:
            return None
        other = Reader(self.tokenizer, self.assistant_only)
        other.template = template
        return other


def tokenise(
    rows: Sequence[Row], reader: Reader, vocabulary: int, tick: Callable[[int], None] = lambda done: None
) -> list[Document]:
    """Tokens of every row that has any. Texts get an end-of-sequence token; chats end as their template says.

    Args:
        vocabulary: of the model; a token outside it is an error.
        tick: called with the number of rows that were done.
    """
    documents = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row, (ids, learnt) in zip(chunk, reader.read(chunk), strict=True):
            if not ids:
                continue
            if max(ids) >= vocabulary:
                raise InputError(
                    f"{row.where}: token {max(ids)} is outside the model's vocabulary of {vocabulary}: was it made by "
                    "another model's tokenizer?"
                )
            array = np.asarray(ids, np.int32)
            labels = array if learnt is None else np.where(learnt, array, np.int32(IGNORED))
            documents.append(Document(array, labels, row.source))
        tick(len(chunk))
    return documents


@dataclass(frozen=True)
class Stratum:
    """Documents of one source and of about one length (from a power of two to the next), and what of them is held out.

    Attributes:
        tokens: of all `documents`. held: documents held out whole. cut: tokens cut off the end of one of them.
    """

    source: str
    shortest: int
    longest: int
    documents: int
    tokens: int
    held: int
    held_tokens: int
    cut: int

    def __str__(self) -> str:
        lengths = f"{self.shortest:,}" + (f" to {self.longest:,}" if self.longest > self.shortest else "")
        parts = [f"{self.held:,} of {self.documents:,}"] if self.held or not self.cut else []
        parts += [f"the last {self.cut:,} tokens of 1 of {self.documents:,}"] if self.cut else []
        return f"{' and '.join(parts)} documents of {lengths} tokens from {self.source}"


@dataclass(frozen=True)
class Documents:
    """What is trained on and what is held out of which strata, before it is cut into windows of `context` tokens."""

    train: Sequence[Document]
    heldout: Sequence[Document]
    context: int
    strata: Sequence[Stratum] = ()


def hold_out(documents: Sequence[Document], share: float, most: int, context: int, seed: int) -> Documents:
    """Hold out the same share of every stratum: by source, and by length in powers of two.

    Whole documents are held out, half of a stratum at most. Where those of a stratum are too long for its share, and
    longer than `context`, so that they are cut anyway, the end of one of them is held out. Where nothing is found so,
    the end of the longest document is.

    Args:
        share: of all tokens that is held out at most; most: tokens that are held out at most.
    """
    total = sum(map(len, documents))
    budget = int(min(share * total, most))
    strata: dict[tuple[str, int], list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
        document = documents[index]
        strata.setdefault((document.source, len(document).bit_length()), []).append(index)
    held: set[int] = set()
    cut: dict[int, int] = {}
    credit = 0.0
    for _, members in sorted(strata.items()):
        chosen, cut_off = _from_stratum(
            [(i, len(documents[i])) for i in members], budget / max(total, 1), credit, context
        )
        held.update(chosen)
        cut.update(cut_off)
        spent = sum(len(documents[i]) for i in chosen) + sum(cut_off.values())
        credit += budget / max(total, 1) * sum(len(documents[i]) for i in members) - spent
    if not held and not cut and budget >= 2:
        longest = max(range(len(documents)), key=lambda i: len(documents[i]))
        cut[longest] = min(budget, len(documents[longest]) - 2)
    cut = {i: n for i, n in cut.items() if n >= 2}
    train = [
        document[: len(document) - cut[i]] if i in cut else document
        for i, document in enumerate(documents)
        if i not in held
    ]
    heldout = [
        document[-cut[i] :] if i in cut else document for i, document in enumerate(documents) if i in held or i in cut
    ]
    split = [_stratum(documents, source, members, held, cut) for (source, _), members in sorted(strata.items())]
    return Documents(train, heldout, context, split)


def _from_stratum(
    members: Sequence[tuple[int, int]], share: float, credit: float, context: int
) -> tuple[list[int], dict[int, int]]:
    """(documents held out whole, {document: tokens cut off its end}) of one stratum's (document, tokens).

    Args:
        credit: tokens that the strata before it left over.
    """
    chosen: list[int] = []
    quota = share * sum(length for _, length in members)
    spent = 0
    for index, length in members:
        credit += share * length
        if credit - spent >= length and spent < quota and 2 * (len(chosen) + 1) <= len(members):
            chosen.append(index)
            spent += length
    longest, length = max(members, key=lambda member: member[1])
    own = int(min(credit, quota))
    return chosen, {longest: own} if not chosen and length > context and own >= 2 else {}


def _stratum(
    documents: Sequence[Document], source: str, members: Sequence[int], held: set[int], cut: dict[int, int]
) -> Stratum:
    lengths = [len(documents[i]) for i in members]
    whole = [len(documents[i]) for i in members if i in held]
    return Stratum(
        source, min(lengths), max(lengths), len(members), sum(lengths), len(whole), sum(whole),
        sum(cut.get(i, 0) for i in members),
    )  # fmt: skip


def windows(documents: Sequence[Document], context: int, pack: bool) -> list[Window]:
    """Windows of at most `context` tokens. Longer documents are cut; with `pack`, shorter pieces share a window.

    Pieces are packed whole, each into the fullest window that has room, the longest first (best fit decreasing). A
    piece without a token to learn (a single one, or none of a chat that the assistant says) is dropped.
    """
    pieces = [d[at : at + context] for d in documents for at in range(0, len(d), context)]
    pieces = [piece for piece in pieces if (piece.labels[1:] != IGNORED).any()]
    if not pack:
        return [[piece] for piece in pieces]
    packed: list[list[Document]] = []
    room: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect.bisect_left(room, (len(piece), -1))
        free, index = room.pop(at) if at < len(room) else (context, len(packed))
        if index == len(packed):
            packed.append([])
        packed[index].append(piece)
        bisect.insort(room, (free - len(piece), index))
    return [*packed]
