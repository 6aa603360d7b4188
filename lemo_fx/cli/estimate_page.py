"""What `lemo-fx estimate` shows: tables of memory, time and longest contexts, and what a reader must know of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from lemo_fx.cli.estimate import LORA, PLANS, TIMED_FROM, Plans, Shape, estimate, longest, usable
from lemo_fx.errors import InputError


def gpus(text: str) -> dict[str, float]:
    """ "24GB,80GB" -> bytes of each; a card that is sold as 24 GB is taken to have 24e9."""
    found = {}
    for word in text.split(","):
        number = word.strip().upper().removesuffix("GB").strip()
        try:
            size = float(number)
        except ValueError:
            size = 0.0
        if not 1 <= size <= 10_000:
            raise InputError(f"--gpu {text!r} must be sizes such as 24GB,80GB")
        found[f"{size:g} GB"] = size * 1e9
    return found


def table(
    shape: Shape, contexts: Sequence[int], cards: dict[str, float], rank: int, compared: Plans = PLANS
) -> Iterable[Table]:
    """One table a length."""
    for context in contexts:
        rows = estimate(shape, context, rank, compared)
        offloads = any(row.host_bytes for row in rows)
        shown = Table("", "peak memory", title=f"{context:,} tokens")
        times = ["step, LoRA = 1", "step, no float8"]
        for column in ["host memory"] * offloads + times + [f"fits {card}" for card in cards]:
            shown.add_column(column, justify="right")
        shown.columns[1].justify = "right"
        base = next(row for row in rows if row.plan == LORA)
        for row in rows:
            shares = [
                "" if mine is None or theirs is None else f"{mine / theirs:.2f}"
                for mine, theirs in ((row.seconds, base.seconds), (row.without_float8, base.without_float8))
            ]
            fits = ["yes" if row.peak_bytes <= usable(size) else "no" for size in cards.values()]
            waiting = [f"{row.host_bytes / 1e9:.1f} GB"] * offloads
            shown.add_row(row.plan, f"{row.peak_bytes / 1e9:.1f} GB", *waiting, *shares, *fits)
        yield shown


def longest_table(shape: Shape, cards: dict[str, float], rank: int, compared: Plans = PLANS) -> Table:
    """The longest context of every plan on every card."""
    shown = Table("longest context that fits", *cards)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in compared:
        lengths = [longest(shape, name, size, rank, compared) for size in cards.values()]
        shown.add_row(name, *(f"{length:,}" if length else "none" for length in lengths))
    return shown


def notes(shape: Shape, contexts: Sequence[int], compared: Plans = PLANS) -> list[str]:
    """What a reader must know of the figures."""
    found = [
        "Memory is what tensors take, with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; 3 % of a card and 1 GB "
        "are left for CUDA. LoRA and presets: within 10 % of measured peaks. QLoRA: the same, at one length."
    ]
    parts = max(plan.sequence_parts if plan else 1 for plan in compared.values())
    if parts > 1:
        found.append(
            f"{parts} GPUs share each sequence, as by transform(sequence_group=...): peak memory is of each of them."
        )
    if shape.parameters < TIMED_FROM:
        found.append(
            "No times: under 2.5 billion parameters the host sets the pace, and plans gain less or nothing. "
            "lemo-fx bench MODEL measures."
        )
    else:
        found.append("Times: ratios of one H200, reached within 8 %.")
    if not shape.gated:
        found.append("An MLP without a gate: its memory under adapters on every layer was not measured.")
    if min(contexts) < SHORT:
        found += advice(math.inf, min(contexts), False)
    if shape.longest is not None and max(contexts) > shape.longest:
        found.append(f"The model reads up to {shape.longest:,} tokens; longer contexts need rope scaling.")
    return found


SHORT = 4096
"""Tokens under which no plan was ever seen to pay."""


def advice(parameters: float, context: int, running_text: bool) -> list[str]:
    """Where a plan will hardly pay, one line a reason; of running text every token is learnt."""
    found = []
    if parameters < TIMED_FROM:
        found.append(
            f"With {parameters / 1e6:,.0f} million parameters a plan gains little or nothing: the host sets the pace. "
            "lemo-fx bench measures it; --preset dense is plain LoRA."
        )
    if context < SHORT:
        found.append(
            f"At {context:,} tokens a plan gains little: attention is cheap there, and what is left goes to adapters "
            "and launches. Plans are for thousands of tokens."
        )
    if running_text:
        found.append(
            "Every token is learnt: on such running text, sequences cut to half may be as good in as little time. "
            "lemo-fx compare shows it on your data."
        )
    return found
