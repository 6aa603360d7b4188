"""The order of the passes, and the one place that runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.passes.checker import check
from lemo_fx.passes.fuse_shared_selection import fuse_shared_selection
from lemo_fx.passes.insert_elimination import insert_elimination
from lemo_fx.passes.insert_restoration import insert_restoration
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.outline_branches import outline_branches
from lemo_fx.passes.rewrite import LayerRewrite

logger = logging.getLogger(__name__)

PASSES: tuple[Callable[[LayerRewrite], int], ...] = (
    insert_scores,
    insert_elimination,
    insert_restoration,
    fuse_shared_selection,
    outline_branches,
)

Observer = Callable[[str, LayerRewrite], None]


def run_passes(rewrite: LayerRewrite, observe: Observer | None = None) -> dict[str, int]:
    """Run every pass over one layer's graph in place.

    Args:
        observe: called with "captured" and then with each pass's name, after its clean-up and check.

    Returns:
        Number of changes by pass name.

    Raises:
        GraphCheckError: a pass left the graph malformed.
    """
    if observe:
        observe("captured", rewrite)
    changes = {}
    for number, run in enumerate(PASSES):
        name = run.__name__
        changes[name] = run(rewrite)
        # The branches to be replaced are alive until restoration has taken their place.
        if run not in (insert_scores, insert_elimination):
            remove_dead_nodes(rewrite.graph)
        check(rewrite, name, finished=number == len(PASSES) - 1)
        logger.debug("%s: %d changes", name, changes[name])
        if observe:
            observe(name, rewrite)
    return changes
