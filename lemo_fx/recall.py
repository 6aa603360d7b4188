"""How many of the blocks that the measured scores would keep the predictors keep, on a batch, with the model as it is.

One forward as in training, without gradient. Where a layer with predictors is entered, a graph of its own measures the
true scores on the very stream that the rewritten layer sees; the MLP's on that stream plus the layer's dense attention,
from which the predictor names its candidates here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn

from lemo_fx.distributed import gathered
from lemo_fx.graph.capture import (
    ABSENT_IN_TRAINING,
    by_name,
    capture,
    graph_module,
    modes_kept,
    remove_dead_nodes,
    uncompiled,
)
from lemo_fx.graph.sites import find_sites, scored_module, site_name
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, part_name, site_and_role
from lemo_fx.runtime import kept
from lemo_fx.runtime.layer import STATE
from lemo_fx.runtime.scores import Predictor, measured_score
from lemo_fx.runtime.select import SelectBlocks


def measure_recall(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> dict[tuple[str, str], float]:
    """Recall by (layer name, site name), for the sites whose blocks are chosen by a predictor.

    Args:
        layers: rewritten decoder layers by name.
        batch: keyword arguments of the model; of a sharded one every rank must pass its own. Random state and training
            mode are left as they were.
    """
    found: dict[tuple[str, str], float] = {}

    def observe(name: str, layer: nn.Module, probe: fx.GraphModule, sites: list[str]) -> Callable:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            settings = vars(layer)[STATE].settings
            if not settings.applies(layer, args, kwargs):
                return
            given = by_name(settings.arguments, args, kwargs)
            mask = given.get("attention_mask")
            for site, (stream, true, predicted) in zip(sites, probe(*args, **kwargs), strict=True):
                found[name, site] = _recall(
                    layer.get_submodule(part_name(site, "select")), predicted, true, stream, mask
                )

        return hook

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with ExitStack() as hooks:
        scored: dict[str, list[str]] = {}
        for name, layer in layers.items():
            for part, module in layer.named_children():
                if isinstance(module, Predictor):
                    scored.setdefault(name, []).append(site_and_role(part)[0])
        for name, sites in scored.items():
            with gathered(layers[name]):
                hook = observe(name, layers[name], _probe(layers[name], sites), sites)
            hooks.enter_context(layers[name].register_forward_pre_hook(hook, with_kwargs=True))
        if scored:
            with modes_kept(model), torch.no_grad(), torch.random.fork_rng(devices), uncompiled():
                model.train()
                model(**{"use_cache": False, **batch})
    return found


def _probe(layer: nn.Module, names: list[str]) -> fx.GraphModule:
    """A module with the layer's arguments: per named site (stream [B, S, H], measured, predicted scores [B, n])."""
    graph = capture(layer, ABSENT_IN_TRAINING)
    sites, _ = find_sites(graph)
    by_name = {site_name(site, sites): site for site in sites}
    measured = [PlannedSite(name, by_name[name], "skip") for name in names]
    predicted = [PlannedSite(f"predicted_{name}", by_name[name], "skip", score="predicted") for name in names]
    rewrite = LayerRewrite(layer, graph, measured + predicted)
    for planned in measured:
        mixer = scored_module(layer, planned.site)
        block_size = layer.get_submodule(part_name(planned.name, "select")).block_size
        score = measured_score(mixer, planned.site.kind, block_size)  # type: ignore[arg-type]
        rewrite.modules[part_name(planned.name, "score")] = score
        for role in ("score", "predictor"):
            part = layer._modules.get(part_name(planned.name, role))
            if part is not None:
                rewrite.modules[part_name(f"predicted_{planned.name}", role)] = part
    insert_scores(rewrite)
    pairs = zip(measured, predicted, strict=True)
    graph.output_node().args = (tuple((true.site.stream, true.scores, guess.scores) for true, guess in pairs),)
    remove_dead_nodes(graph)
    return graph_module(layer, graph, {}, rewrite.modules)


def _recall(select: Any, predicted: torch.Tensor, true: torch.Tensor, stream: torch.Tensor, mask: Any) -> float:
    """Share of the real tokens chosen by the true scores that the predicted ones choose too."""
    assert isinstance(select, SelectBlocks)
    valid = kept.valid_tokens(mask, stream)
    wanted, got = (select.choose(scores, stream, valid) for scores in (true, predicted))
    both = wanted & got
    if valid is not None:
        wanted, both = wanted & valid, both & valid
    return float(both.sum() / wanted.sum())
