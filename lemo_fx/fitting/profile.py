"""Profile a base model: its branches and the true scores of their blocks, while it computes what it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from lemo_fx.api import suspended
from lemo_fx.config import LemoConfig
from lemo_fx.fitting.statistics import BranchStatistics
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture, modes_kept
from lemo_fx.graph.sites import find_sites, scored_module, site_name
from lemo_fx.install import install, uninstall
from lemo_fx.passes.checker import check
from lemo_fx.passes.insert_probes import insert_probes
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, part_name
from lemo_fx.planning.plans import layer_plan
from lemo_fx.predictors import hidden_size
from lemo_fx.runtime.scores import measured_score
from lemo_fx.runtime.step import Step

Track = Callable[[list[torch.Tensor]], Iterable[torch.Tensor]]


def run_probes(
    model: nn.Module, batches: list[torch.Tensor], layers: Iterable[int], config: LemoConfig, work: Path, track: Track
) -> dict[str, BranchStatistics]:
    """Run the model without elimination over token ids [1, S], with probes in some of its layers; it is left as it was.

    Args:
        config: which sites get a probe, and which of these true scores.
        work: folder for the scored streams.
        track: the batches one after the other, for a progress bar.

    Returns:
        By site ("layers.<index>.<site>"), its probe.
    """
    device = next(model.parameters()).device
    longest = max(ids.shape[1] for ids in batches)
    probes: dict[str, BranchStatistics] = {}
    with modes_kept(model), suspended(model):
        plans, decoder = [], decoder_layers(model)
        for index in layers:
            name, layer = decoder[index]
            graph = capture(layer, ABSENT_IN_TRAINING)
            found, _ = find_sites(graph)
            rewrite = LayerRewrite(layer, graph, [], modules={})
            for site in found:
                elimination = config.site(site.kind)
                if elimination is None:
                    continue
                own = site_name(site, found)
                planned = PlannedSite(own, site, None)
                # An MLP's score is a maximum over tokens, whose own scores teach a predictor more.
                per_score = config.block_size if site.kind == "attention" else 1
                at = f"layers.{index}.{own}"
                kind = site.kind if elimination.score in ("auto", "predicted") else None
                probes[at] = BranchStatistics(hidden_size(model), device, work / at, longest, per_score, kind)
                rewrite.modules[part_name(own, "probe")] = probes[at]
                if kind is not None:
                    score = measured_score(scored_module(layer, site), kind, per_score)
                    rewrite.modules[part_name(own, "score")] = score
                    planned.treatment, planned.score = "skip", "measured"
                rewrite.sites.append(planned)
            insert_scores(rewrite)
            insert_probes(rewrite)
            check(rewrite, "insert_probes", finished=True)
            plans.append(layer_plan(name, rewrite, LemoConfig(block_size=1, active="always"), Step(), []))
        install(plans)
        try:
            model.eval()
            with torch.no_grad():
                for ids in track(batches):
                    model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
        finally:
            for plan in plans:
                uninstall(plan.module)
    return probes
