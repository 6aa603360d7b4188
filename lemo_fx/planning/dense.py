"""Why a branch stays dense although it could run on some of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from lemo_fx.config import Elimination
from lemo_fx.graph.anatomy import implementation_of, window_of
from lemo_fx.graph.capture import ABSENT_IN_TRAINING
from lemo_fx.graph.probe import BATCH, LENGTH
from lemo_fx.passes.insert_elimination import compacting
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite
from lemo_fx.planning.proof import Proofs
from lemo_fx.planning.site import called_by
from lemo_fx.runtime import kept

PASSED_THROUGH = frozenset({"output_attentions", *ABSENT_IN_TRAINING})
"""Layer arguments that a branch may read as they are."""

SHARED = "score='shared' needs a rewritten attention that comes before the MLP in the layer"


def why_dense(
    proofs: Proofs, rewrite: LayerRewrite, planned: PlannedSite, elimination: Elimination | None
) -> str | None:
    """Why a branch that could run on some of the tokens needs them all; None if it does not.

    An argument may not be known to follow the kept tokens, or a module may count the rows that it is given.
    """
    site = planned.site
    for node in site.nodes:
        for argument in node.all_input_nodes:
            target = str(argument.target)
            # Every layer argument that a branch reads must be one whose shortening to the kept tokens is known.
            known = argument is rewrite.entry or compacting(argument) is not None or target in PASSED_THROUGH
            if argument.op != "placeholder" or known:
                continue
            if node is not site.mixer or not _follows(proofs.usual(rewrite.layer), target):
                return (
                    f"node {node.name!r} reads the layer argument {target!r}, and how that follows the kept tokens is "
                    "not known"
                )
    attention = str(site.mixer.target) if site.kind == "attention" else None
    seen = proofs.watched(rewrite.layer).why_every_row(attention, called_by(planned))
    if seen:
        return f"{site.mixer.name} {seen}"
    if site.kind == "attention":
        mixer = rewrite.layer.get_submodule(str(site.mixer.target))
        implementation = implementation_of(mixer)
        if implementation not in kept.MASKED_IMPLEMENTATIONS and window_of(mixer):
            return (
                f"{implementation} counts its sliding window in kept tokens, not in original positions; use "
                "attn_implementation='sdpa'"
            )
    if elimination is not None and elimination.score == "shared":
        before = rewrite.sites[: rewrite.sites.index(planned)]
        if not any(p.site.kind == "attention" and p.treatment for p in before):
            return SHARED
    return None


def _follows(usual: Mapping[str, Any], name: str) -> bool:
    """Whether in the calls that the model makes, a layer argument has one entry a token or holds no tensor.

    A mapping may: whether the attention takes anything from it is watched.
    """
    value = usual.get(name)
    harmless = isinstance(value, bool | int | float | str | MutableMapping | None)
    return name in usual and (harmless or kept.runs_along(value, BATCH, LENGTH))
