"""Decide what becomes of each module of a model: capture, sites, passes; nothing is touched before `install`."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from lemo_fx import distributed
from lemo_fx.config import Elimination, LemoConfig, SiteKind
from lemo_fx.errors import CaptureError, ConfigError, PredictorError, UnsupportedModelError
from lemo_fx.files import writing
from lemo_fx.graph.anatomy import Anatomy, longest_context, why_no_layers
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, PATCHING, capture, matters_when_absent, readable
from lemo_fx.graph.oracle import snapshot
from lemo_fx.graph.probe import BATCH, LENGTH
from lemo_fx.graph.sites import Site, find_sites, holds_matrix, scored_module, site_name
from lemo_fx.graph.watch import why_every_row, why_no_stream
from lemo_fx.install import Plan, SitePlan, layer_plan
from lemo_fx.kernels.float8_linear.op import has_float8_layers
from lemo_fx.passes.insert_elimination import compacting
from lemo_fx.passes.pipeline import PASSES, Pass, run_passes
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, part_name
from lemo_fx.passes.segment_loss import segment_loss
from lemo_fx.proof import Fault, Proofs
from lemo_fx.proof_of_head import prove_head
from lemo_fx.runtime import kept
from lemo_fx.runtime.head import HeadSettings
from lemo_fx.runtime.keys import Keys, Queries
from lemo_fx.runtime.scores import Candidates, RandomScore, StepScore, measured_score
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.step import Step

if TYPE_CHECKING:
    from lemo_fx.predictors import Predictors

logger = logging.getLogger(__name__)

KINDS: tuple[SiteKind, ...] = ("attention", "mlp")

PASSED_THROUGH = frozenset({"output_attentions", *ABSENT_IN_TRAINING})
"""Layer arguments that a branch may read as they are."""


def make_plans(
    anatomy: Anatomy,
    config: LemoConfig,
    predictors: Predictors | None,
    dump: Path | None,
    passes: Sequence[Pass],
) -> tuple[list[Plan], list[str]]:
    """The plans of all modules that `transform` rewrites, and notes on what is left alone.

    Nothing of the model is changed. Raises as `transform`.
    """
    model, layers = anatomy.model, anatomy.layers
    distributed.refuse_wrapped(model)
    distributed.refuse_process(model)
    distributed.refuse_cut_weights(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(anatomy.base).__name__} has no causal decoder layers that lemo_fx can rewrite: "
            f"{why_no_layers(anatomy)}"
        )
    _check_model(anatomy, config)
    if predictors is not None:
        predictors.check_fits(anatomy.base)
    notes: list[str] = []
    plans = []
    proofs = Proofs(model, [layer for _, layer in layers])
    planning = Planning(config, predictors, len(layers), Step(), proofs, dump, passes)
    for index, (name, layer) in enumerate(layers):
        if config.is_dense(index, len(layers)):
            notes.append(f"{name}: dense (dense_layers)")
            last = config.dense_layers is None and index == len(layers) - 1
            # The backward reaches the last layer while everything saved is still alive. Under the default depth plan
            # its graph is installed with dense branches, so that its MLP is recomputed in segments.
            if not (config.rewrites_dense_layers or last):
                continue
        distributed.refuse_finer_units(name, layer)
        try:
            with distributed.gathered(layer):
                plan = _plan_layer(planning, name, layer, index)
        except UnsupportedModelError as error:
            lost = ", neither offloaded, nor recomputed in parts, nor in float8" if config.rewrites_dense_layers else ""
            notes.append(f"{name}: left as it is{lost}: {error}")
            continue
        if plan is not None:
            if config.is_dense(index, len(layers)) and not config.rewrites_dense_layers:
                # The report has the note for it, as for any layer that keeps every token and is computed as before.
                plan.rows.clear()
            plans.append(plan)
    for run in planning.passes:
        if run not in PASSES:
            counts = [planning.changes[plan.name][run.__name__] for plan in plans]
            notes.append(f"{run.__name__}: {sum(counts)} changes in {sum(map(bool, counts))} layers")
    if planning.proofs.obstacle:
        notes.append(f"not proven by running: {planning.proofs.obstacle}")
    _check_rewritten(anatomy, config, plans, notes)
    sparse_experts = _sparse_experts(anatomy.model, plans)
    head = _plan_head(anatomy, config, planning.step, sparse_experts, notes, dump)
    return plans + ([head] if head else []), notes


SHARED = "score='shared' needs a rewritten attention that comes before the MLP in the layer"


def _check_rewritten(anatomy: Anatomy, config: LemoConfig, plans: list[Plan], notes: list[str]) -> None:
    """Raise where the config eliminates tokens and no layer could; warn where none could of one kind of site."""
    count = len(anatomy.layers)
    if all(config.is_dense(index, count) for index in range(count)):
        return
    rows = [row for plan in plans for row in plan.rows]
    reasons = [note for note in notes if "left as it is" in note]
    reasons += [f"{plan.name}: {row.note}" for plan in plans for row in plan.rows if row.refused]
    asked = [kind for kind in KINDS if config.site(kind) is not None]
    missing = [kind for kind in asked if not any(row.kind == kind and row.score for row in rows)]
    shared = [reason for reason in reasons if SHARED in reason]
    if asked and (missing == asked or ("mlp" in missing and shared)):
        why = f": {[*shared, *reasons][0]}" if reasons else f": its layers have no {' and no '.join(asked)}"
        raise UnsupportedModelError(f"{type(anatomy.base).__name__} has no branch that lemo_fx can rewrite{why}")
    for kind in missing:
        logger.warning("lemo_fx: no %s of %s is rewritten; see lemo_fx.report", kind, type(anatomy.base).__name__)


def _sparse_experts(model: nn.Module, plans: list[Plan]) -> bool:
    """Whether a branch that runs on kept tokens holds experts, or another module whose router logits are recorded."""
    recorded = (getattr(module, "_can_record_outputs", None) or {} for module in model.modules())
    routers = [record["router_logits"] for record in recorded if "router_logits" in record]
    flat = itertools.chain.from_iterable(r if isinstance(r, list | tuple) else (r,) for r in routers)
    kinds = tuple(getattr(router, "target_class", router) for router in flat)
    branches = (
        plan.module.get_submodule(name)
        for plan in plans
        for row in plan.rows
        if row.eliminated != "dense"
        for name in row.called
    )
    return any(hasattr(m, "experts") or isinstance(m, kinds) for branch in branches for m in branch.modules())


def _check_model(anatomy: Anatomy, config: LemoConfig) -> None:
    model, layers = anatomy.model, anatomy.layers
    for site in config.eliminations:
        site.at_layer("keep", 0, len(layers))
        site.at_layer("threshold", 0, len(layers))
    for name, layer in layers:
        if any(p.device.type == "meta" for p in layer.parameters()):
            raise UnsupportedModelError(f"{name} is on the meta device: load its weights before lemo_fx.transform")
        if "forward" in vars(layer):
            raise UnsupportedModelError(
                f"{name}.forward was replaced on the instance (a device_map hook?), so a rewritten class would never "
                "be called: load the model without device_map, or remove the hook, before lemo_fx.transform"
            )
    if getattr(anatomy.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model: its decoder attends to an encoder, so it is no "
            "causal language model that lemo_fx can rewrite"
        )
    if config.active == "training" and not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModelError(
            "no parameter of the model is trainable, so there is nothing to fine-tune: add adapters first (PEFT's "
            "get_peft_model), or study the sparse forward with LemoConfig(active='always')"
        )
    longest = longest_context(anatomy.config)
    if longest is not None and config.block_size > longest:
        raise ConfigError(f"block_size={config.block_size} does not fit: the model reads at most {longest} tokens")


@dataclass(frozen=True)
class Planning:
    """What the plans of a model's layers have in common.

    Attributes:
        count: of the decoder layers.
        dump: folder for the graphs of every pass, or None.
        passes: that rewrite a layer; changes: how many each made, by layer.
    """

    config: LemoConfig
    predictors: Predictors | None
    count: int
    step: Step
    proofs: Proofs
    dump: Path | None
    passes: Sequence[Pass]
    changes: dict[str, dict[str, int]] = field(default_factory=dict)


def _plan_layer(planning: Planning, name: str, layer: nn.Module, index: int) -> Plan | None:
    """The plan of one layer; a branch whose rewrite turns out not to compute what it should is left dense.

    Raises:
        UnsupportedModelError: the layer must stay as it is.
    """
    config, step = planning.config, planning.step
    if config.attention is None and config.mlp is None and not config.rewrites_dense_layers:
        return None
    faults: dict[str, str] = {}
    while True:
        rewrite, rows, fault = _rewrite_layer(planning, name, layer, index, faults)
        if fault is None:
            return layer_plan(name, rewrite, config, step, rows)
        if fault.site is None or fault.site in faults:
            raise UnsupportedModelError(f"{name}: {fault.what}")
        faults[fault.site] = fault.what


def _rewrite_layer(
    planning: Planning, name: str, layer: nn.Module, index: int, faults: Mapping[str, str]
) -> tuple[LayerRewrite, list[SitePlan], Fault | None]:
    """A layer rewritten, its rows of the report, and what its proof found.

    Args:
        faults: by site, what an earlier proof found.
    """
    config = planning.config
    try:
        graph, presence = _capture_as_called(layer, planning.proofs)
    except CaptureError as error:
        raise _refused(planning, name, layer, str(error)) from error
    sites, refusals = find_sites(graph)
    for refusal in refusals:
        if refusal.site is None:
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
    rewrite = LayerRewrite(layer, graph, planned, config.recompute, config.forward, presence)
    untouched = snapshot(graph, [site.site for site in planned])
    for site in planned:
        elimination = config.site(site.site.kind)
        dense = "dense_layers" if config.is_dense(index, planning.count) else ""
        dense = "None in the config" if elimination is None else dense
        refused = reasons.get(site.name)
        if refused is None and not dense:
            refused = _why_dense(planning, rewrite, site, elimination)
        if elimination is None or dense or refused:
            called = [layer.get_submodule(module) for module in _called(site)]
            site.float8 = config.float8_everywhere and any(has_float8_layers(m, frozen=False) for m in called)
            note = f"left dense: {refused}" if refused else f"dense ({dense})"
            row = SitePlan(site.name, site.site.kind, "dense", note=note, refused=bool(refused) and not dense)
        else:
            row = _plan_site(planning, f"{name}, {site.name}", rewrite, site, index)
        row.float8, row.called = _float8_asked(site, config), _called(site)
        rows.append(row)
    observe = _dumper(planning.dump, name) if planning.dump else None
    planning.changes[name] = run_passes(rewrite, observe, planning.passes)
    return rewrite, rows, planning.proofs.fault(rewrite, *untouched)


def _refused(planning: Planning, name: str, layer: nn.Module, found: str) -> UnsupportedModelError:
    """Of a whole layer, for what its graph shows, or for what it is handed in the place of one stream."""
    return UnsupportedModelError(f"{name}: {why_no_stream(layer, planning.proofs.usual(layer)) or found}")


def _capture_as_called(layer: nn.Module, proofs: Proofs) -> tuple[fx.Graph, dict[str, bool]]:
    """A layer's graph as the model calls it, and for arguments whose absence changes it, whether they are given."""
    graph = capture(layer, ABSENT_IN_TRAINING)
    names = matters_when_absent(layer, graph, ABSENT_IN_TRAINING)
    usual = proofs.usual(layer) if names else {}
    presence = {name: usual.get(name) is not None for name in names}
    absent = {name: None for name, given in presence.items() if not given}
    return (capture(layer, {**ABSENT_IN_TRAINING, **absent}) if absent else graph), presence


def _own_name(layer: nn.Module, site: Site, taken: list[str]) -> str:
    """A name for a branch that is left dense: what its one large module is called, else its kind."""
    called = [str(n.target) for n in site.nodes if n.op == "call_module"]
    large = [name for name in called if holds_matrix(layer.get_submodule(name))]
    own = large[0].replace(".", "_") if len(large) == 1 else site.kind
    numbered = (f"{own}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([own], numbered) if name not in taken)


def _float8_asked(site: PlannedSite, config: LemoConfig) -> str:
    """What of a site the plan wants in float8, in the report's words."""
    if site.treatment == "exact" and not config.float8_everywhere:
        return next((f"{name} in float8" for name in ("forward", "backward") if getattr(config, name) == "float8"), "")
    asked = config.float8_everywhere if site.treatment is None else site.float8
    return "in float8" if asked else ""


def _called(site: PlannedSite) -> tuple[str, ...]:
    """Names of the modules that a site's branch calls."""
    return tuple(str(node.target) for node in site.site.nodes if node.op == "call_module")


def _plan_site(planning: Planning, place: str, rewrite: LayerRewrite, planned: PlannedSite, index: int) -> SitePlan:
    """Decide one sparse site and add its parts to the rewrite.

    Args:
        place: names layer and site in errors.
    """
    config, predictors, count = planning.config, planning.predictors, planning.count
    elimination = config.site(planned.site.kind)
    assert elimination is not None
    planned.treatment = elimination.eliminated
    planned.score = _score_of(elimination, predictors, index, planned.name)
    if predictors is None and planned.score == "predicted":
        raise PredictorError(f"score='predicted' needs trained predictors: {HOW_TO_FIT} ({place})")
    if predictors is None and planned.treatment == "stand_in":
        raise PredictorError(f"eliminated='stand_in' needs fitted maps: {HOW_TO_FIT} ({place})")
    keep = elimination.at_layer("keep", index, count)
    threshold = elimination.at_layer("threshold", index, count)
    keeps = [elimination.at_layer("keep", i, count) or 1.0 for i in range(count) if not config.is_dense(i, count)]
    planned.share = max(keeps)
    if keep != 1:
        planned.float8 = config.float8_everywhere or (planned.treatment == "exact" and config.backward == "float8")
    elif planned.treatment == "exact":
        # Nothing is eliminated, so nothing is to be computed a second time.
        planned.treatment = "skip"
    salt = 2 * index + (planned.site.kind == "mlp") + 1
    parts, note = _score_parts(planning, place, rewrite.layer, planned, index)
    if planned.score in ("random", "step"):
        parts["score"] = (
            RandomScore(salt, config.block_size)
            if planned.score == "random"
            else StepScore(config.block_size, planning.step)
        )
    if elimination.keys == "every" and planned.treatment == "exact":
        planned.every_key = True
        parts |= _key_parts(rewrite.layer, planned, place)
        note = f"{note}; every key" if note else "every key"
    shared = planned.score == "shared"
    if not shared:
        varies = len(set(keeps)) > 1
        parts["select"] = SelectBlocks(
            config.block_size, keep, threshold, salt, planning.step, elimination.balance, varies
        )
    if predictors is not None and elimination.eliminated == "stand_in":
        parts["stand_in"] = predictors.stand_in(index, planned.name)
    rewrite.modules |= {part_name(planned.name, role): part for role, part in parts.items()}
    return SitePlan(
        planned.name,
        planned.site.kind,
        elimination.eliminated,
        score=planned.score,
        budget=f"keep {keep:.4g}" if keep is not None else f"threshold {threshold:g}",
        note=note,
        tokens_of="attention" if shared else planned.name,
    )


def _key_parts(layer: nn.Module, planned: PlannedSite, place: str) -> dict[str, nn.Module]:
    """What attends to every key, by role."""
    attention = layer.get_submodule(str(planned.site.mixer.target))
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation not in kept.MASKED_IMPLEMENTATIONS:
        known = ", ".join(map(repr, kept.MASKED_IMPLEMENTATIONS))
        raise UnsupportedModelError(
            f"{place}: keys='every' needs an attention that is told by a mask what to see, so "
            f"attn_implementation={known}, and this is {implementation!r}; or use keys='kept'"
        )
    return {"keys": Keys(attention), "queries": Queries(attention)}


HOW_TO_FIT = (
    "predictors = lemo_fx.fit(model, sequences, config), then lemo_fx.transform(model, config, predictors=predictors)"
)


def _score_of(elimination: Elimination, predictors: Predictors | None, index: int, site: str) -> str:
    """What ranks a site's blocks, where the config leaves it open."""
    if elimination.score != "auto":
        return elimination.score
    if predictors is not None and predictors.has_predictor(index, site):
        return "predicted"
    # A threshold is one on informativeness.
    return "step" if elimination.eliminated == "exact" and elimination.threshold is None else "measured"


def _score_parts(
    planning: Planning, place: str, layer: nn.Module, planned: PlannedSite, index: int
) -> tuple[dict[str, nn.Module], str]:
    """The parts of a measured or predicted score by role, and the report's note on them."""
    kind, block_size = planned.site.kind, planning.config.block_size
    if planned.score == "measured":
        measured = measured_score(scored_module(layer, planned.site), kind, block_size)
        return {"score": measured}, measured.note
    if planned.score != "predicted":
        return {}, ""
    assert planning.predictors is not None
    predictor = planning.predictors.predictor(index, planned.name)
    if predictor.block_size != block_size:
        raise PredictorError(
            f"the predictors were trained on blocks of {predictor.block_size} tokens, but the config asks for "
            f"block_size={block_size}: use theirs, or score='measured' ({place})"
        )
    if isinstance(predictor, Candidates) != (kind == "mlp"):
        raise PredictorError(f"{place}: the predictor is one of another kind of site")
    parts: dict[str, nn.Module] = {"predictor": predictor}
    note = f"predictor of {predictor.bytes / 1024:.1f} KiB"
    if not isinstance(predictor, Candidates):
        return parts, note
    measured = measured_score(scored_module(layer, planned.site), kind, predictor.count)
    return {**parts, "score": measured}, f"{note}; {measured.note}" if measured.note else note


def _window(attention: nn.Module) -> int | None:
    """Width of an attention's sliding window: its own, or where it has no such attribute, what its config says."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[return-value]
    return getattr(getattr(attention, "config", None), "sliding_window", None)


def _why_dense(
    planning: Planning, rewrite: LayerRewrite, planned: PlannedSite, elimination: Elimination | None
) -> str | None:
    """Why a branch that may run on some tokens cannot be told which, or cannot know what they are; None if it can."""
    site = planned.site
    for node in site.nodes:
        for argument in node.all_input_nodes:
            target = str(argument.target)
            # Every layer argument that a branch reads must be one whose shortening to the kept tokens is known.
            known = argument is rewrite.entry or compacting(argument) is not None or target in PASSED_THROUGH
            if argument.op != "placeholder" or known:
                continue
            if node is not site.mixer or not _follows(planning.proofs.usual(rewrite.layer), target):
                return (
                    f"node {node.name!r} reads the layer argument {target!r}, and how that follows the kept tokens is "
                    "not known"
                )
    if site.kind == "attention":
        seen = why_every_row(rewrite.layer, str(site.mixer.target), planning.proofs.usual(rewrite.layer))
        if seen:
            return f"{site.mixer.name} {seen}"
        mixer = rewrite.layer.get_submodule(str(site.mixer.target))
        implementation = getattr(getattr(mixer, "config", None), "_attn_implementation", None)
        if implementation not in kept.MASKED_IMPLEMENTATIONS and _window(mixer):
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


def _plan_head(
    anatomy: Anatomy,
    config: LemoConfig,
    step: Step,
    sparse_experts: bool,
    notes: list[str],
    dump: Path | None,
) -> Plan | None:
    head, name = anatomy.head, anatomy.head_name
    if head is None or name is None:
        notes.append("no loss head: the model has no output projection of its own")
        return None

    def observe(stage: str, graph: fx.Graph, functions: dict[str, fx.Graph]) -> None:
        if dump:
            _write_dump(dump, f"{name or 'model'}.loss_head", stage, head, graph, functions)

    presence: dict[str, bool] = {}
    graph, functions, loss_function, slices_itself, reason = _segmented(anatomy, config, presence, observe)
    if reason:
        notes.append(f"{name or type(head).__name__}: loss not segmented: {reason}")
        logger.info("loss not segmented: %s", reason)
    arguments = _argument_names(head)
    settings = HeadSettings(config, step, arguments, loss_function, slices_itself, sparse_experts, presence)
    return Plan(name, head, graph, functions, {}, settings)


def _argument_names(head: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(type(head).forward).parameters.values()
    return tuple(p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD)


GIVEN = ("attention_mask", "position_ids")
"""Arguments of a causal model that a training step usually has; others, where their absence matters, it lacks."""


def _segmented(
    anatomy: Anatomy,
    config: LemoConfig,
    presence: dict[str, bool],
    observe: Callable[[str, fx.Graph, dict[str, fx.Graph]], None],
) -> tuple[fx.Graph, dict[str, fx.Graph], Any, bool, str]:
    """(graph, functions, loss function, whether the head slices integers itself, why nothing was done).

    Args:
        presence: filled in: arguments whose absence changes the head -> whether the graph is for calls with them.
    """
    head: Any = anatomy.head
    pass_through = fx.Graph()
    pass_through.output(None)
    unchanged: tuple[fx.Graph, dict[str, fx.Graph], None, bool] = (pass_through, {}, None, True)
    if config.loss_segments is None:
        return *unchanged, "loss_segments=None"
    if "forward" in vars(head):
        return *unchanged, "another library (TRL, Liger, accelerate) put a forward of its own on the model"
    globals_of = vars(inspect.getmodule(inspect.unwrap(type(head).forward)))
    with PATCHING:
        slicer = globals_of.get("slice_logits_to_keep")
    loss_function: Any = head.loss_function
    constants: dict[str, Any] = {"output_router_logits": False}
    leaves: dict[str, Any] = {"leaf_functions": (slicer,) if slicer else (), "properties": ("loss_function",)}
    try:
        graph = capture(head, constants, **leaves)
        # Segments are for calls with labels, and a call without token ids or embeddings is none.
        names = matters_when_absent(head, graph, constants, besides=("input_ids", "labels"), **leaves)
        presence |= {name: name in GIVEN for name in names}
        absent = {name: None for name, given in presence.items() if not given}
        if absent:
            graph = capture(head, {**constants, **absent}, **leaves)
    except CaptureError as error:
        return *unchanged, str(error)
    observe("0_captured", graph, {})
    result = segment_loss(graph, loss_function, config.loss_segments)
    if result.graph is None or result.logits is None:
        return *unchanged, result.reason
    functions = {"lemo_logits": result.logits}
    observe("1_segment_loss", result.graph, functions)
    fault = prove_head(anatomy, result.graph, functions, slicer is not None, presence)
    if fault:
        return *unchanged, fault
    return result.graph, functions, loss_function, slicer is not None, ""


def _dumper(folder: Path, name: str):
    counter = itertools.count()

    def observe(stage: str, rewrite: LayerRewrite) -> None:
        _write_dump(folder, name, f"{next(counter)}_{stage}", rewrite.layer, rewrite.graph, rewrite.functions)

    return observe


def _write_dump(
    folder: Path, name: str, stage: str, module: nn.Module, graph: fx.Graph, functions: dict[str, fx.Graph]
) -> None:
    text = readable(graph, functions, type(module).__name__)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{stage}.py").write_text(text)
