"""The order of the passes, and the one place that runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lemo_fx.errors import ConfigError, GraphCheckError
from lemo_fx.passes.checker import check
from lemo_fx.passes.exchange_heads import exchange_heads
from lemo_fx.passes.fuse_shared_selection import fuse_shared_selection
from lemo_fx.passes.insert_elimination import insert_elimination
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.outline_branches import outline_branches
from lemo_fx.passes.rewrite import LayerRewrite

logger = logging.getLogger(__name__)

Pass = Callable[[LayerRewrite], int]
"""Edits one layer's graph in place and returns how many changes it made."""

PASSES: tuple[Pass, ...] = (
    insert_scores,
    insert_elimination,
    insert_restoration,
    exchange_heads,
    fuse_shared_selection,
    outline_branches,
)

Observer = Callable[[str, LayerRewrite], None]


def check_passes(passes: object) -> None:
    """Raise ConfigError unless these are named functions, those of `PASSES` in their order among them."""
    if not isinstance(passes, Sequence):
        raise ConfigError(f"passes must be a tuple of functions, not {type(passes).__name__}")
    for number, run in enumerate(passes):
        if not (callable(run) and hasattr(run, "__name__")):
            raise ConfigError(f"passes[{number}]={run!r} must be a function with a name, which takes a LayerRewrite")
    names = [run.__name__ for run in passes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"passes holds two functions named {twice}: each needs a name of its own")
    if [run for run in passes if run in PASSES] != list(PASSES):
        raise ConfigError(
            f"passes must hold {', '.join(run.__name__ for run in PASSES)} in this order, as "
            "lemo_fx.passes.pipeline.PASSES does, and others before, between or after them"
        )


def run_passes(
    rewrite: LayerRewrite, observe: Observer | None = None, passes: Sequence[Pass] | None = None
) -> dict[str, int]:
    """Run every pass over one layer's graph in place.

    Args:
        observe: called with "captured" and then with each pass's name, after its check.
        passes: `PASSES` if None.

    Returns:
        Number of changes by pass name.

    Raises:
        GraphCheckError: a pass left the graph malformed.
    """
    passes = PASSES if passes is None else passes
    if observe:
        observe("captured", rewrite)
    changes = {}
    for number, run in enumerate(passes):
        name = run.__name__
        changes[name] = run(rewrite)
        check(rewrite, name, finished=number == len(passes) - 1)
        logger.debug("%s: %d changes", name, changes[name])
        if observe:
            observe(name, rewrite)
    for node in rewrite.graph.nodes:
        if not node.users and node.op not in ("placeholder", "output"):
            raise GraphCheckError(f"at the end nobody uses {node}; a pass ends with remove_dead_nodes(rewrite.graph)")
    return changes
