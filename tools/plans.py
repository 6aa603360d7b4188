"""Plans by name, as the benchmarks and the accuracy study write them: `step-0.375-slope-0.6-both-float8`.

A name begins with what happens to eliminated tokens and the share that is kept; words for what differs from the usual
follow, in any order:

    skip-0.5, stand_in-0.5    LeMo's elimination, and with fitted maps
    exact-0.25, step-0.25     gradient through the kept tokens only: a random choice a site, one choice a step
    lora                      nothing is eliminated
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import typer

from lemo_fx import Elimination, LemoConfig
from lemo_fx.config import Score

T = TypeVar("T")
FLOAT8: dict[str, Any] = {"forward": "float8", "backward": "float8"}
TREATMENTS = {
    "skip": {"eliminated": "skip"},
    "stand_in": {"eliminated": "stand_in"},
    "exact": {"eliminated": "exact", "score": "random"},
    "step": {"eliminated": "exact", "score": "step"},
}
SITE_WORDS: dict[str, dict[str, Any]] = {
    "random": {"score": "random"},
    "measured": {"score": "measured"},
    # As many blocks in every eighth of the sequence; not the preset of that name.
    "balanced": {"balance": True},
}
WORDS: dict[str, dict[str, Any]] = {
    "float8": {"forward": "float8"},
    "both-float8": FLOAT8,
    # After both-float8.
    "base-float8": {"base": "float8"},
    "elementwise": {"recompute": "elementwise"},
    "attention-kept": {"recompute": "projections"},
    "offload": {"offload": True},
    "all-layers": {"dense_layers": ()},
    # Instead of the first and the last layer.
    "dense-first": {"dense_layers": (0,)},
    "dense-last": {"dense_layers": (-1,)},
    "dense-first-two": {"dense_layers": (0, 1, -1)},
    "dense-last-two": {"dense_layers": (0, -2, -1)},
    "last-two": {"dense_layers": (0, -2, -1)},
}
OTHER = (
    "slope-SHARE",
    "block-TOKENS",
    "shared (the MLP keeps what attention kept)",
    "every-key (gradient through every key and value of attention)",
)
HELP = f"{', '.join(TREATMENTS)} and a share, or lora; then {', '.join((*SITE_WORDS, *WORDS, *OTHER))}"
_SHARE = r"\d*\.?\d+"
_START = re.compile(rf"(?:lora|({'|'.join(TREATMENTS)})-({_SHARE}))(?=-|$)")
_LONGEST_FIRST = "|".join(sorted((*SITE_WORDS, *WORDS, "shared", "every-key"), key=len, reverse=True))
_WORD = re.compile(rf"-(?:(?P<word>{_LONGEST_FIRST})|slope-(?P<slope>-?{_SHARE})|block-(?P<block>\d+))(?=-|$)")


def named(name: str, score: Score = "measured") -> LemoConfig:
    """What a name says.

    Args:
        score: what ranks the blocks of `skip` and `stand_in` unless the name says so.

    Raises:
        ValueError: the name is none of the grammar's.
    """
    start = _START.match(name)
    if start is None:
        raise ValueError(f"{name!r} is no plan: {HELP}")
    treatment, keep = start.groups()
    site: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    words: set[str] = set()
    at = start.end()
    while at < len(name):
        found = _WORD.match(name, at)
        if found is None:
            raise ValueError(f"{name!r} is no plan from {name[at:]!r} on: {HELP}")
        word, slope, block = found.group("word", "slope", "block")
        of_site = SITE_WORDS.get(word, {}) if slope is None else {"slope": float(slope)}
        of_plan = WORDS.get(word, {}) if block is None else {"block_size": int(block)}
        twice = (site.keys() & of_site.keys()) | (plan.keys() & of_plan.keys())
        if twice:
            raise ValueError(f"{name!r} says {min(twice)} twice")
        site |= of_site
        plan |= of_plan
        words.add(word)
        at = found.end()
    if treatment is None:
        if site or words & {"shared", "every-key"}:
            raise ValueError(f"{name!r}: without elimination there is nothing to rank or share")
        return LemoConfig(attention=None, mlp=None, **plan)
    attention = Elimination(**{"keep": float(keep), "score": score, **TREATMENTS[treatment], **site})
    mlp = replace(attention, score="shared") if "shared" in words else attention
    if "every-key" in words:
        attention = replace(attention, keys="every")
    return LemoConfig(attention=attention, mlp=mlp, **plan)


def each(names: str, of: Callable[[str], T]) -> list[T]:
    """What comma-separated names say, as a command gets them.

    Raises:
        typer.BadParameter: one of them says nothing that there is.
    """
    try:
        return [of(name) for name in names.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
