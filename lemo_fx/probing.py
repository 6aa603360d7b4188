"""Observe the branches of a base model and the true scores of their blocks while it computes what it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lemo_fx import install as installing
from lemo_fx import runtime
from lemo_fx.capture import ABSENT_IN_TRAINING, capture
from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.kernels.select_blocks import reference as selection
from lemo_fx.parts import ActivationScore, AttentionScore, PredictedScore, SelectBlocks
from lemo_fx.passes.checker import check
from lemo_fx.passes.insert_probes import insert_probes
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite
from lemo_fx.sites import decoder_layers, find_sites, site_name
from lemo_fx.transform import suspended

Choose = Callable[[int, str, SiteKind], tuple[nn.Module, int | None] | None]
"""(layer index, site's name, its kind) -> its probe and how many tokens a score is for (None: it needs no scores); None
for a site that is left alone."""


def probe(model: nn.Module, batches: Iterable[Mapping[str, Any]], layers: Iterable[int], choose: Choose) -> None:
    """Run the model without elimination over batches, with probes in some of its layers; it is left as it was.

    A probe is called with the branch's normed input and output [B, S, H]; where it wants scores also with the stream
    that the branch reads [B, S, H], the true scores [B, n] and the layer's attention mask.
    """
    was_training = [(module, module.training) for module in model.modules()]
    with suspended(model):
        plans = _plans(model, layers, choose)
        installing.install(plans)
        try:
            model.eval()
            with torch.no_grad():
                for batch in batches:
                    model(**{"use_cache": False, "logits_to_keep": 1, **batch})
        finally:
            for plan in plans:
                installing.uninstall(plan.module)
            for module, training in was_training:
                module.training = training


def _plans(model: nn.Module, indices: Iterable[int], choose: Choose) -> list[installing.Plan]:
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
            modules[f"lemo_{own}_probe"], per_score = chosen
            if per_score is not None:
                mixer = layer.get_submodule(str(site.mixer.target))
                score = AttentionScore if site.kind == "attention" else ActivationScore
                modules[f"lemo_{own}_score"] = score(mixer, per_score)
                planned[-1].treatment, planned[-1].score = "skip", "measured"
        rewrite = LayerRewrite(layer, graph, planned, modules=modules)
        insert_scores(rewrite)
        insert_probes(rewrite)
        check(rewrite, "insert_probes", finished=True)
        plans.append(installing.layer_plan(name, rewrite, observing, []))
    return plans


class RecallProbe(nn.Module):
    """Counts the blocks that a site keeps by their true scores, and how many of them it keeps by the predicted ones.

    Args:
        predictor, select: the site's own; in a tuple, so that they are not registered twice.
    """

    def __init__(self, predictor: PredictedScore, select: SelectBlocks) -> None:
        super().__init__()
        self.parts = (predictor, select)
        self.wanted = self.found = 0

    def forward(self, source, output, stream: torch.Tensor, scores: torch.Tensor, mask: Any) -> None:
        """See `probe`."""
        predictor, select = self.parts
        valid = runtime.valid_tokens(mask, stream)
        true, predicted = (_kept(select, s, valid) for s in (scores, predictor(stream, mask)))
        self.wanted += int(true.sum())
        self.found += int((true & predicted).sum())


def _kept(select: SelectBlocks, scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, n] -> [B, n] bool: real blocks that the site's rule keeps. Labels are left out of account."""
    blocks = scores.shape[1]
    count = blocks if select.threshold is not None else selection.budget(blocks, select.keep)
    scores = selection.balanced(scores) if select.balance else scores
    ranked, _ = selection.rank(scores, valid, None, select.block_size, count)
    if select.threshold is not None:
        return ranked >= select.threshold
    best = ranked.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, best, True) & (ranked > -torch.inf)


def recalls(model: nn.Module, batch: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Recall of every predicted site of a transformed model by (name of its layer, site).

    Both scores are of the streams of the model without elimination, where predictors are trained.
    """
    layers = decoder_layers(model)
    probes: dict[tuple[int, str], RecallProbe] = {}
    for index, (_, layer) in enumerate(layers):
        for attribute, predictor in list(layer._modules.items()):
            name = attribute.removeprefix("lemo_").removesuffix("_score")
            select = layer._modules.get(f"lemo_{name}_select")
            if isinstance(predictor, PredictedScore) and isinstance(select, SelectBlocks):
                probes[index, name] = RecallProbe(predictor, select)

    def choose(index: int, name: str, kind: SiteKind) -> tuple[nn.Module, int] | None:
        found = probes.get((index, name))
        return None if found is None else (found, found.parts[1].block_size)

    wanted = {k: v for k, v in batch.items() if k != "labels"}
    probe(model, [wanted], sorted({index for index, _ in probes}), choose)
    return {(layers[i][0], name): found.found / max(found.wanted, 1) for (i, name), found in probes.items()}
