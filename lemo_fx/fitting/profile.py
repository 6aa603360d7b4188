"""Observe the branches of a base model and the true scores of their blocks while it computes what it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lemo_fx.api import suspended
from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture, modes_kept
from lemo_fx.graph.sites import find_sites, scored_module, site_name
from lemo_fx.install import install, uninstall
from lemo_fx.passes.checker import check
from lemo_fx.passes.insert_probes import insert_probes
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, part_name
from lemo_fx.planning.plans import Plan, layer_plan
from lemo_fx.runtime.scores import measured_score
from lemo_fx.runtime.step import Step

Choose = Callable[[int, str, SiteKind], tuple[nn.Module, int | None] | None]
"""(layer index, site's name, its kind) -> its probe and how many tokens a score is for (None: it needs no scores); None
for a site that is left alone."""


def probe(model: nn.Module, batches: Iterable[Mapping[str, Any]], layers: Iterable[int], choose: Choose) -> None:
    """Run the model without elimination over batches, with probes in some of its layers; it is left as it was.

    A probe is called with the branch's normed input and output [B, S, H]; where it wants scores also with the stream
    that the branch reads [B, S, H], the true scores [B, n] and the layer's attention mask.
    """
    with modes_kept(model), suspended(model):
        plans = _plans(model, layers, choose)
        install(plans)
        try:
            model.eval()
            with torch.no_grad():
                for batch in batches:
                    model(**{"use_cache": False, "logits_to_keep": 1, **batch})
        finally:
            for plan in plans:
                uninstall(plan.module)


def _plans(model: nn.Module, indices: Iterable[int], choose: Choose) -> list[Plan]:
    plans = []
    observing = LemoConfig(block_size=1, active="always")
    layers = decoder_layers(model)
    for index in indices:
        name, layer = layers[index]
        graph = capture(layer, ABSENT_IN_TRAINING)
        sites, _ = find_sites(graph)
        planned, modules = [], {}
        for site in sites:
            own = site_name(site, sites)
            chosen = choose(index, own, site.kind)
            if chosen is None:
                continue
            planned.append(PlannedSite(own, site, None))
            modules[part_name(own, "probe")], per_score = chosen
            if per_score is not None:
                mixer = scored_module(layer, site)
                modules[part_name(own, "score")] = measured_score(mixer, site.kind, per_score)
                planned[-1].treatment, planned[-1].score = "skip", "measured"
        rewrite = LayerRewrite(layer, graph, planned, modules=modules)
        insert_scores(rewrite)
        insert_probes(rewrite)
        check(rewrite, "insert_probes", finished=True)
        plans.append(layer_plan(name, rewrite, observing, Step(), []))
    return plans
