"""Texts, chats and token ids on disk -> documents of tokens -> windows to train on."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lemo_fx.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("text", "messages", "input_ids")
SUFFIXES = (".jsonl", ".txt", ".md")
CHUNK = 64
"""Texts that a tokenizer gets at once."""
IGNORED = -100
"""Label of a token that is not learnt, as everywhere in transformers."""


@dataclass(frozen=True)
class Row:
    """One document as it was read: where it stands, which of `FIELDS` it has, and what that holds."""

    where: str
    kind: str
    content: Any


@dataclass(frozen=True)
class Document:
    """Tokens [N] of one document, or of a piece of it, and the labels [N] (IGNORED: not learnt), both int32."""

    ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Document:
        return Document(self.ids[part], self.labels[part])


Window = Sequence[Document]
"""Documents that are read together, one after another, none seeing another."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl file, a text file as one row, or all .jsonl, .txt and .md files under a folder, by name.

    Raises:
        InputError: nothing there, or a line that cannot be used; names the file and the line.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .jsonl file, a text file, or a folder of them")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    rows = [row for file in files for row in _rows_of(file)]
    if not rows:
        raise InputError(
            f"{path} holds no text: give a .jsonl file, a text file, or a folder of them ({', '.join(SUFFIXES)})"
        )
    return rows


def _rows_of(file: Path) -> Iterator[Row]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if file.suffix != ".jsonl":
        if content.strip():
            yield Row(str(file), "text", content)
        return
    # Not splitlines: JSON strings may hold other line separators than this one.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _parsed(f"{file}:{number}", line)


def _parsed(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    kinds = [name for name in FIELDS if name in row] if isinstance(row, dict) else []
    if not kinds:
        raise InputError(f"{where}: needs a field `text`, `messages` or `input_ids`")
    kind, content = kinds[-1], row[kinds[-1]]
    if kind == "text" and not isinstance(content, str):
        raise InputError(f"{where}: `text` must be a string")
    if kind == "messages" and not (content and isinstance(content, list) and all(isinstance(m, dict) for m in content)):
        raise InputError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    if kind == "input_ids" and not (isinstance(content, list) and all(type(i) is int and i >= 0 for i in content)):
        raise InputError(f"{where}: `input_ids` must be a list of token numbers")
    return Row(where, kind, content)


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    *,
    assistant_only: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Document]:
    """Tokens of every row that has any. Texts get an end-of-sequence token; chats end as their template says.

    Args:
        tokenizer: None is enough where every row has `input_ids`.
        vocabulary: of the model; a token outside it is an error.
        assistant_only: learn only what the assistant says in `messages`.
        tick: called with the number of rows that were done.

    Raises:
        InputError: a row cannot be tokenised; names it.
    """
    documents = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        texts = [row.content for row in chunk if row.kind == "text"]
        encoded = iter(tokenizer(texts, verbose=False)["input_ids"] if tokenizer and texts else [])
        for row in chunk:
            learnt = None
            if row.kind == "input_ids":
                ids = row.content
            elif tokenizer is None:
                raise InputError(f"{row.where}: `{row.kind}` needs a tokenizer in the model's folder")
            elif row.kind == "text":
                ids = next(encoded)
                end = tokenizer.eos_token_id
                ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
            else:
                ids, learnt = _chat(row, tokenizer, assistant_only)
            if not ids:
                continue
            if max(ids) >= vocabulary:
                raise InputError(
                    f"{row.where}: token {max(ids)} is outside the model's vocabulary of {vocabulary}: was it made by "
                    "another model's tokenizer?"
                )
            array = np.asarray(ids, np.int32)
            documents.append(Document(array, array if learnt is None else np.where(learnt, array, np.int32(IGNORED))))
        tick(len(chunk))
    return documents


def _chat(row: Row, tokenizer: Any, assistant_only: bool) -> tuple[list[int], list[int] | None]:
    """(tokens, which of them are learnt; None for all) of a row with messages."""
    import jinja2

    template = tokenizer.chat_template
    if not template:
        raise InputError(
            f"{row.where}: the model's tokenizer has no chat template for `messages`: put a chat_template.jinja into "
            "the model's folder, or give `text`"
        )
    if assistant_only and "generation" not in str(template):
        raise InputError(
            "the model's chat template does not mark what the assistant says ({% generation %}): train on whole chats, "
            "or put a template that does into the model's folder"
        )
    try:
        made = tokenizer.apply_chat_template(
            row.content, tokenize=True, return_dict=True, return_assistant_tokens_mask=assistant_only
        )
    except (jinja2.TemplateError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{row.where}: the chat template cannot render these messages: {error}") from error
    return made["input_ids"], made["assistant_masks"] if assistant_only else None


def hold_out(
    documents: Sequence[Document], share: float, most: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out): whole documents, or the end of the longest one where all are too long.

    Args:
        share: of all tokens that is held out at most; most: tokens that are held out at most.
    """
    budget = int(min(share * sum(map(len, documents)), most))
    train, heldout = [], []
    for index in np.random.default_rng(seed).permutation(len(documents)):
        document = documents[index]
        if len(document) <= budget:
            heldout.append(document)
            budget -= len(document)
        else:
            train.append(document)
    if not heldout and budget >= 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        heldout = [train[longest][-budget:]]
        train[longest] = train[longest][:-budget]
    return train, heldout


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
