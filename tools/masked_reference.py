"""What a transformed model's step must compute, written independently: the original layers with masks, node by node.

The tokens that each site kept are read from the transformed model; after `lemo_fx.revert` its layers run as captured,
attention under an explicit mask and a branch's dropped rows zeroed or, for `exact`, without gradient. No pass, kernel,
compiler or checkpoint takes part. Slow, with S x S masks: for a few layers and a thousand tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

import lemo_fx
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, by_name, capture
from lemo_fx.graph.oracle import Changes, Oracle, Untouched
from lemo_fx.graph.probe import eager
from lemo_fx.graph.sites import Site, find_sites, site_name

Kept = dict[str, dict[str, tuple[str, torch.Tensor]]]
"""By layer and site: what becomes of the dropped tokens, and the kept ones [B, K]."""


def kept_by(model: nn.Module, tokens: Mapping[str, torch.Tensor] | None = None) -> Kept:
    """What the sites of a transformed model did in their last step, compiled or not.

    Args:
        tokens: [B, K] by the full name of a selection; read from their records where it is not given.
    """
    config = lemo_fx.report(model).config
    found: Kept = {}
    for site in lemo_fx.report(model).sites:
        if site.eliminated == "dense":
            continue
        chosen_by = "attention" if site.score == "shared" else site.site
        name = f"{site.module}.lemo_{chosen_by}_select"
        if tokens is not None:
            kept = tokens[name]
        else:
            choice = model.get_submodule(name).record.choices[-1]
            within = torch.arange(config.block_size, device=choice.blocks.device)
            kept = (choice.blocks.long()[:, :, None] * config.block_size + within).flatten(1)[:, : choice.kept]
        found.setdefault(site.module, {})[site.site] = (site.eliminated, kept.clone())
    return found


@contextmanager
def masked(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Have the layers of a model that is not transformed keep these tokens."""
    layers = [(layer, kept[name]) for name, layer in decoder_layers(model) if name in kept]
    for layer, sites in layers:
        vars(layer)["forward"] = _forward(layer, sites)
    try:
        with eager(model):
            yield
    finally:
        for layer, _ in layers:
            del vars(layer)["forward"]


def _forward(layer: nn.Module, kept: Mapping[str, tuple[str, torch.Tensor]]) -> Any:
    graph = capture(layer, ABSENT_IN_TRAINING)
    sites, _ = find_sites(graph)
    untouched = Untouched(graph, sites)
    planned = {site: kept[name] for site in sites if (name := site_name(site, sites)) in kept}
    assert len(planned) == len(kept), f"{list(kept)} are not all among {[site_name(site, sites) for site in sites]}"
    exact = {site.branch for site, (treatment, _) in planned.items() if treatment == "exact"}
    assert len(exact) == sum(treatment != "skip" for treatment, _ in planned.values()), "no reference for stand_in"
    arguments = [str(n.target) for n in graph.nodes if n.op == "placeholder"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = by_name(arguments, args, kwargs)
        stream = given[arguments[0]]
        rows = {}
        for site, (_, tokens) in planned.items():
            rows[site.branch] = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
            rows[site.branch].scatter_(1, tokens, True)
        whole: dict[fx.Node, torch.Tensor] = {}

        def values(branch: fx.Node, value: torch.Tensor) -> torch.Tensor:
            whole[branch] = value
            return value if branch in exact or branch not in rows else torch.where(rows[branch][..., None], value, 0)

        def gradients(branch: fx.Node, value: torch.Tensor) -> torch.Tensor:
            if branch not in rows:
                return value
            if branch in exact:
                value = value - value.detach()
            value = torch.where(rows[branch][..., None], value, 0)
            return whole[branch] + value if branch in exact else value

        skipping = {branch: row for branch, row in rows.items() if branch not in exact}
        with torch.no_grad():
            Oracle(layer, untouched, given, Changes(_masks(sites, given, stream, skipping), values)).run()
        return Oracle(layer, untouched, given, Changes(_masks(sites, given, stream, rows), gradients)).run()

    return forward


def _masks(
    sites: list[Site], given: Mapping[str, Any], stream: torch.Tensor, rows: Mapping[fx.Node, torch.Tensor]
) -> dict[fx.Node, torch.Tensor]:
    """By attention call, the additive mask [B, 1, S, S]: the layer's, and none but the kept keys."""
    lowest = torch.finfo(stream.dtype).min
    mask = given.get("attention_mask")
    if mask is None:
        length = stream.shape[1]
        allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=stream.device).tril()
        mask = torch.zeros_like(allowed, dtype=stream.dtype).masked_fill(~allowed, lowest)
    return {
        site.mixer: mask if site.branch not in rows else mask.masked_fill(~rows[site.branch][:, None, None, :], lowest)
        for site in sites
        if site.kind == "attention"
    }
