"""Plan one decoder layer: capture it, find its sites, decide each, run the passes, have the result proven."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from lemo_fx.errors import CaptureError, UnsupportedModelError
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture, readable_code
from lemo_fx.graph.left_out import kind_of, kinds_left_out, matters_when_absent
from lemo_fx.graph.oracle import snapshot
from lemo_fx.graph.sites import Site, find_sites, holds_matrix, site_name
from lemo_fx.graph.watch import why_no_stream
from lemo_fx.kernels.float8_linear.op import Float8Switch, float8_layers, has_packed_layers
from lemo_fx.passes.outline_branches import FLOAT8
from lemo_fx.passes.pipeline import run_passes
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, part_name
from lemo_fx.planning.dense import PASSED_THROUGH, why_dense
from lemo_fx.planning.dump import dumper
from lemo_fx.planning.plans import Plan, Planning, SitePlan, layer_plan
from lemo_fx.planning.proof import Fault, Proofs
from lemo_fx.planning.site import called_by, float8_asked, plan_site
from lemo_fx.runtime.captured import Captured, numbers_of, parts_of, summary
from lemo_fx.runtime.scores import StepScore


def plan_layer(planning: Planning, name: str, layer: nn.Module, index: int) -> Plan | None:
    """The plan of one layer; a branch whose rewrite turns out not to compute what it should is left dense.

    Raises:
        UnsupportedModelError: the layer must stay as it is.
    """
    config, step = planning.config, planning.step
    if config.attention is None and config.mlp is None and not planning.rewrites_dense_layers:
        return None
    faults: dict[str, str] = {}
    while True:
        rewrite, rows, original, fault = _rewrite_layer(planning, name, layer, index, faults)
        if fault is None:
            return layer_plan(name, rewrite, config, step, rows, original)
        if fault.site is None or fault.site in faults:
            raise UnsupportedModelError(f"{name}: {fault.what}")
        faults[fault.site] = fault.what


def _rewrite_layer(
    planning: Planning, name: str, layer: nn.Module, index: int, faults: Mapping[str, str]
) -> tuple[LayerRewrite, list[SitePlan], Captured, Fault | None]:
    """A layer rewritten, its rows of the report, what it was, and what its proof found.

    Args:
        faults: by site, what an earlier proof found.
    """
    config = planning.config
    left = planning.proofs.watched(layer).left_by_layer
    if left:
        # Before it is captured, which would leave others a node of the graph.
        raise _refused(planning, name, layer, left)
    try:
        graph, presence, constants = _capture_as_called(layer, planning.proofs)
        kinds = _kinds(layer, graph, planning.proofs)
    except CaptureError as error:
        raise _refused(planning, name, layer, str(error)) from error
    code = readable_code(graph, "Forward")
    sites, refusals = find_sites(graph)
    original = Captured(code, summary(sites, refusals), constants, numbers_of(layer), parts_of(layer), kinds)
    for refusal in refusals:
        if refusal.site is None or why_no_stream(layer, planning.proofs.usual(layer)):
            raise _refused(planning, name, layer, f"node {refusal.node!r} {refusal.reason}")
    planned = [PlannedSite(site_name(site, sites), site, None) for site in sites]
    reasons = dict(faults)
    for refusal in refusals:
        assert refusal.site is not None
        own = _own_name(layer, refusal.site, [site.name for site in planned])
        reasons[own] = f"{refusal.node} {refusal.reason}"
        planned.append(PlannedSite(own, refusal.site, None))
    order = {node: position for position, node in enumerate(graph.nodes)}
    planned.sort(key=lambda site: (order[site.site.add], order[site.site.branch]))

    rows = []
    rewrite = LayerRewrite(layer, graph, planned, config.recompute, config.forward, presence, planning.group)
    untouched = snapshot(graph, [site.site for site in planned])
    for site in planned:
        elimination = config.site(site.site.kind)
        dense = "dense_layers" if config.is_dense(index, planning.count) else ""
        dense = "None in the config" if elimination is None else dense
        refused = reasons.get(site.name)
        if refused is None and not dense:
            refused = why_dense(planning.proofs, rewrite, site, elimination)
        called = [layer.get_submodule(module) for module in called_by(site)]
        # Rounding outside of a compiled graph takes longer than a matmul in float8 saves.
        uncompiled = any(module in planning.mixers for module in called)
        if elimination is None or dense or refused:
            in_float8 = config.float8_everywhere and not uncompiled
            site.float8 = in_float8 and any(float8_layers(m, frozen=False) for m in called)
            note = f"left dense: {refused}" if refused else f"dense ({dense})"
            note += "; not compiled, and so not in float8" if config.float8_everywhere and uncompiled else ""
            row = SitePlan(site.name, site.site.kind, "dense", note=note, refused=bool(refused) and not dense)
        else:
            row = plan_site(planning, f"{name}, {site.name}", rewrite, site, index)
        row.float8, row.called = "" if uncompiled else float8_asked(site, config), called_by(site)
        rows.append(row)
    draws = any(isinstance(part, StepScore) for part in rewrite.modules.values())
    if index == 0 and not draws and config.sequence_parts > 1 and config.eliminations:
        # Of the embeddings, which every number of ranks computes alike; what later layers read differs in the last bit.
        rewrite.modules[part_name("step", "score")] = StepScore(config.block_size, planning.step, *planning.parts)
    if has_packed_layers(layer):
        rewrite.modules[FLOAT8] = Float8Switch()
    dump = dumper(planning.dump, name, layer)
    planning.changes[name] = run_passes(
        rewrite, lambda stage, done: dump(stage, done.graph, done.functions), planning.passes
    )
    return rewrite, rows, original, planning.proofs.fault(rewrite, untouched)


def _refused(planning: Planning, name: str, layer: nn.Module, found: str) -> UnsupportedModelError:
    """Of a whole layer, for what its graph shows, or for what it is handed in the place of one stream."""
    return UnsupportedModelError(f"{name}: {why_no_stream(layer, planning.proofs.usual(layer)) or found}")


def _kinds(layer: nn.Module, graph: fx.Graph, proofs: Proofs) -> dict[str, tuple[Any, ...]]:
    """Of the arguments that a graph does not use, the kinds of values that are proven: left out, and as usual."""
    left_out = kinds_left_out(layer, graph, {*PASSED_THROUGH, "output_router_logits"})
    usual = proofs.usual(layer) if left_out else {}
    return {name: (kind, kind_of(usual[name])) if name in usual else (kind,) for name, kind in left_out.items()}


def _capture_as_called(layer: nn.Module, proofs: Proofs) -> tuple[fx.Graph, dict[str, bool], dict[str, Any]]:
    """A layer's graph as the model calls it; which arguments whose absence changes it are given; what it holds."""
    graph = capture(layer, ABSENT_IN_TRAINING)
    names = matters_when_absent(layer, graph, ABSENT_IN_TRAINING)
    usual = proofs.usual(layer) if names else {}
    presence = {name: usual.get(name) is not None for name in names}
    constants = {**ABSENT_IN_TRAINING, **{name: None for name, given in presence.items() if not given}}
    return (graph if all(presence.values()) else capture(layer, constants)), presence, constants


def _own_name(layer: nn.Module, site: Site, taken: list[str]) -> str:
    """A name for a branch that is left dense: what its one large module is called, else its kind."""
    called = [str(n.target) for n in site.nodes if n.op == "call_module"]
    large = [name for name in called if holds_matrix(layer.get_submodule(name))]
    own = large[0].replace(".", "_") if len(large) == 1 else site.kind
    numbered = (f"{own}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([own], numbered) if name not in taken)
