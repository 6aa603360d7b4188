"""From data and a model's config to windows to train on and windows held out; and a look at the first of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from rich.text import Text as Shown
from torch import nn

from lemo_fx.cli import data
from lemo_fx.cli.console import bars
from lemo_fx.cli.data import Document, Documents, Stratum, Window
from lemo_fx.cli.load import load_tokenizer
from lemo_fx.cli.options import Job, Settings
from lemo_fx.cli.rows import Ids, Instruction, Row, read_rows
from lemo_fx.config import LemoConfig
from lemo_fx.errors import ConfigError, InputError
from lemo_fx.graph.anatomy import has_rope, longest_context
from lemo_fx.graph.capture import modes_kept

Say = Callable[[str], None]
USUAL_CONTEXT = 4096
"""Tokens of a window where neither an option nor the documents ask for more."""
SHOWN_STRATA = 12
SHOWN_TOKENS = 240
"""Tokens of a stretch of text that a preview shows; what is between its ends is counted."""
SHOWN_DOCUMENTS = 4
"""Documents of a window that a preview shows."""


def documents_of(job: Job, settings: Settings, folder: Path, config: Any, say: Say) -> Documents:
    """Read and tokenise a job's data, for the model in a folder, and hold a part of it out."""
    rows = read_rows(job.data, say)
    heldout_rows = None if job.heldout is None else read_rows(job.heldout, say)
    documents = tokenised(rows, folder, config, settings.assistant_only, say)
    context = context_of(documents, settings.context, config, say)
    if heldout_rows is not None:
        return Documents(documents, tokenised(heldout_rows, folder, config, settings.assistant_only, say), context)
    split = data.hold_out(documents, settings.eval_share, settings.eval_windows * context, context, settings.seed)
    for line in described(split.strata):
        say(line)
    return split


def described(strata: Sequence[Stratum]) -> list[str]:
    """What was held out of which documents, the largest strata first."""
    held = sum(stratum.held_tokens + stratum.cut for stratum in strata)
    lines = [f"held out: {held:,} of {sum(stratum.tokens for stratum in strata):,} tokens"]
    largest = sorted(strata, key=lambda stratum: -stratum.tokens)[:SHOWN_STRATA]
    lines += [f"  {stratum}" for stratum in largest]
    if len(strata) > SHOWN_STRATA:
        lines.append(f"  and the like of {len(strata) - SHOWN_STRATA} more lengths or sources")
    return lines


def tokenised(
    rows: Sequence[Row], folder: Path, config: Any, assistant_only: bool = False, say: Say = lambda line: None
) -> list[Document]:
    """The rows as the tokenizer in a model's folder reads them, with a progress bar."""
    needed = any(not isinstance(row.content, Ids) for row in rows)
    reader = data.Reader(load_tokenizer(folder) if needed else None, assistant_only)
    try:
        documents = _read(rows, reader, config)
    except data.Unmarked:
        other = reader.with_template_of_trl()
        if other is None:
            raise
        say("the chat template does not mark what the assistant says: TRL's training template for it is used")
        reader, documents = other, _read(rows, other, config)
    if not documents:
        raise InputError(f"{rows[0].where}: every text is empty")
    if any(isinstance(row.content, Instruction) for row in rows):
        say("instructions are read " + ("as chats" if reader.template else "in Alpaca's format: no chat template here"))
    learnt = sum(int((document.labels != data.IGNORED).sum()) for document in documents)
    say(f"{learnt / sum(map(len, documents)):.0%} of the tokens are learnt")
    return documents


def _read(rows: Sequence[Row], reader: data.Reader, config: Any) -> list[Document]:
    with bars(transient=True) as (bar, _):
        task = bar.add_task("reading", total=len(rows))
        vocabulary = config.get_text_config().vocab_size
        return data.tokenise(rows, reader, vocabulary, lambda n: bar.advance(task, n))


def context_of(documents: Sequence[Document], asked: int | None, config: Any, say: Say) -> int:
    """Tokens of a window: as asked, else what the longest document takes and the model reads."""
    longest, reads = max(map(len, documents)), longest_context(config) or math.inf
    context = asked or int(min(max(longest, USUAL_CONTEXT), reads))
    cut = sum(len(document) > context for document in documents)
    if asked is None:
        say(f"windows of up to {context:,} tokens: the longest document has {longest:,}, the model reads {reads:,}")
    if cut:
        say(f"{cut:,} of {len(documents):,} documents are longer than a window and are cut into several")
    return context


def check_context(model_config: Any, plan: LemoConfig, context: int) -> None:
    """Raise InputError or ConfigError where a model does not read as many tokens, or a plan has nothing to choose."""
    longest = longest_context(model_config)
    if longest is not None and context > longest:
        more = (
            ", or set rope scaling in the model's config.json"
            if has_rope(model_config)
            else ": its positions are learned"
        )
        raise InputError(
            f"context={context}: this {model_config.model_type} model reads up to {longest} tokens: choose --context "
            f"{longest} or less{more}"
        )
    if plan.eliminations and context < 4 * plan.block_size:
        raise ConfigError(f"context={context} is under four blocks of {plan.block_size} tokens: nothing to choose from")


@dataclass(frozen=True)
class Prepared:
    """Windows to train on and windows held out, of at most `context` tokens."""

    train: Sequence[Window]
    heldout: Sequence[Window]
    context: int

    @property
    def is_running_text(self) -> bool:
        """Whether every token is learnt."""
        return all((piece.labels != data.IGNORED).all() for window in self.train for piece in window)

    def __str__(self) -> str:
        tokens = sum(len(piece) for window in self.train for piece in window)
        documents, together = sum(map(len, self.train)), max(map(len, self.train))
        full = tokens / (len(self.train) * self.context)
        packed = f", up to {together} documents together" if together > 1 else ""
        return (
            f"to train on: pieces of documents {documents:,}, tokens {tokens:,}, windows of up to {self.context:,} "
            f"{len(self.train):,} ({full:.0%} full{packed}); windows held out: {len(self.heldout)}"
        )


def windows_of(documents: Documents, settings: Settings, apart: bool, say: Say) -> Prepared:
    """Cut, and pack where the model keeps documents `apart`."""
    pack = settings.pack and apart
    if settings.pack and not apart:
        say("the model does not keep packed documents apart: one document a window")
    made = [data.windows(part, documents.context, pack) for part in (documents.train, documents.heldout)]
    unlearnt = sum(not (document.labels[1:] != data.IGNORED).any() for document in documents.train)
    if unlearnt:
        say(f"left out: {unlearnt:,} documents of which nothing is learnt")
    if not all(made):
        raise InputError(
            "there is too little text to train on and to hold some out, or nothing of it is learnt: give more "
            "(--preview shows what is learnt)"
        )
    train, heldout = made
    if len(heldout) > settings.eval_windows:
        # Windows come in the order of their length.
        drawn = np.random.default_rng(settings.seed).permutation(len(heldout))[: settings.eval_windows]
        say(f"{settings.eval_windows} of the {len(heldout):,} windows held out are used (--eval-windows)")
        heldout = [heldout[i] for i in sorted(drawn)]
    return Prepared(train, heldout, documents.context)


def cut(prepared: Prepared, parts: int) -> Prepared:
    """Windows to train on cut into `parts` of equal length, in the place of the whole; held-out ones as they are."""
    most = -(-prepared.context // parts)
    train = []
    for window in prepared.train:
        pieces: dict[int, list[Document]] = {}
        at = 0
        for document in window:
            for number in range(at // most, -(-(at + len(document)) // most)):
                start = number * most - at
                pieces.setdefault(number, []).append(document[max(start, 0) : start + most])
            at += len(document)
        train += [piece for piece in pieces.values() if any((d.labels[1:] != data.IGNORED).any() for d in piece)]
    return replace(prepared, train=train)


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether position_ids that start again keep packed documents from seeing each other: shown by running it.

    The logits of a second document must not change with the first one, by more than a hundredth of what they change
    by where the positions go on. transformers makes such masks for eager, sdpa and flex attention, and flash attention
    reads the positions itself; a model that drops position_ids on the way fails here.
    """
    length = 16
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(0)).to(device)
    going_on = torch.arange(2 * length, device=device)[None]
    starting_again = torch.arange(length, device=device).repeat(2)[None]

    def change(positions: torch.Tensor) -> float:
        rows = [torch.cat([first, ids[2]])[None] for first in ids[:2]]
        one, other = (model(input_ids=row, position_ids=positions, use_cache=False).logits[0, length:] for row in rows)
        return float((one.float() - other.float()).abs().max())

    with modes_kept(model):
        model.eval()
        try:
            return change(starting_again) <= change(going_on) / 100
        except TypeError:
            return False


class Windows(torch.utils.data.Dataset):
    """Windows as the Trainer takes them: [N] input_ids and labels, and position_ids where documents share one."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = self.windows[index]
        labels = [torch.from_numpy(piece.labels).long() for piece in pieces]
        for label in labels:
            # What a document begins with cannot be told from the end of the one before it.
            label[0] = data.IGNORED
        row = {
            "input_ids": torch.cat([torch.from_numpy(piece.ids).long() for piece in pieces]),
            "labels": torch.cat(labels),
        }
        if len(pieces) > 1:
            row["position_ids"] = torch.cat([torch.arange(len(piece)) for piece in pieces])
        return row


def one_window(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator: [1, N]."""
    return {name: value[None] for name, value in rows[0].items()}


def preview(prepared: Prepared, settings: Settings, folder: Path) -> Shown:
    """The windows of the first step, decoded; what is learnt stands in brackets, and is coloured."""
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer_config.json").exists() else None
    order = SeedableRandomSampler(range(len(prepared.train)), data_seed=settings.seed)
    shown = Shown()
    for number, index in zip(range(settings.batch or 1), order, strict=False):
        row = Windows(prepared.train)[index]
        learnt = row["labels"] != data.IGNORED
        pieces = len(prepared.train[index])
        together = f", {pieces} documents" if pieces > 1 else ""
        shown.append(
            f"\nwindow {number + 1} of the first step: {len(learnt):,} of {prepared.context:,} tokens{together}; "
            f"[[learnt]]: {int(learnt.sum()):,}\n",
            style="bold",
        )
        start = 0
        for piece in prepared.train[index][:SHOWN_DOCUMENTS]:
            part = slice(start, start + len(piece))
            _append(shown, row["input_ids"][part], learnt[part], tokenizer)
            shown.append("\n" + "-" * 40 + "\n", style="dim")
            start = part.stop
        if pieces > SHOWN_DOCUMENTS:
            shown.append(f"and {pieces - SHOWN_DOCUMENTS:,} more documents\n", style="dim")
    return shown


def _append(shown: Shown, ids: torch.Tensor, learnt: torch.Tensor, tokenizer: Any) -> None:
    """Stretches of tokens that are all learnt, or not."""
    edges = [0, *(torch.nonzero(learnt[1:] != learnt[:-1]).flatten() + 1).tolist(), len(ids)]
    for start, end in itertools.pairwise(edges):
        stretch = ids[start:end].tolist()
        if len(stretch) > SHOWN_TOKENS:
            ends = [stretch[: SHOWN_TOKENS // 2], stretch[-SHOWN_TOKENS // 2 :]]
            text = f" ... {len(stretch) - SHOWN_TOKENS:,} tokens ... ".join(_decoded(part, tokenizer) for part in ends)
        else:
            text = _decoded(stretch, tokenizer)
        shown.append(f"[[{text}]]" if learnt[start] else text, style="green" if learnt[start] else "dim")


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
