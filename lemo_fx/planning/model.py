"""Decide what becomes of each module of a model: capture, sites, passes; nothing of it is touched."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lemo_fx import distributed
from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.errors import ConfigError, UnsupportedModelError
from lemo_fx.graph.anatomy import Anatomy, is_softmax_attention, longest_context, text_config, why_no_layers
from lemo_fx.graph.left_out import reads_use_cache
from lemo_fx.graph.mixers import recurrent_mixers
from lemo_fx.passes.pipeline import PASSES, Pass
from lemo_fx.planning.base import refuse_untrainable
from lemo_fx.planning.dense import SHARED
from lemo_fx.planning.head import plan_head
from lemo_fx.planning.layer import plan_layer
from lemo_fx.planning.plans import Plan, Planning
from lemo_fx.planning.proof import Proofs
from lemo_fx.planning.shared import check_exchanged, check_shared
from lemo_fx.runtime.parts import SequenceGroup
from lemo_fx.runtime.readers import refuse_readers
from lemo_fx.runtime.step import Step

if TYPE_CHECKING:
    from lemo_fx.predictors import Predictors

logger = logging.getLogger(__name__)

KINDS: tuple[SiteKind, ...] = ("attention", "mlp")


def make_plans(
    anatomy: Anatomy,
    config: LemoConfig,
    predictors: Predictors | None,
    dump: Path | None,
    passes: Sequence[Pass],
    group: SequenceGroup | None = None,
) -> tuple[list[Plan], list[str], Sequence[nn.Module]]:
    """The plans of all modules that `transform` rewrites, notes on what is left alone, and `recurrent_mixers`.

    Nothing of the model is changed. Raises as `transform`.
    """
    model, layers = anatomy.model, anatomy.layers
    distributed.refuse_wrapped(model)
    distributed.refuse_process(model, 1 if group is None else group.size)
    distributed.refuse_cut_weights(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(anatomy.base).__name__} has no causal decoder layers that lemo_fx can rewrite: "
            f"{why_no_layers(anatomy)}"
        )
    _check_model(anatomy, config)
    if group is not None:
        check_shared(anatomy, config, group)
    if config.base == "float8":
        distributed.refuse_sharded_base(layer for _, layer in layers)
    if predictors is not None:
        predictors.check_fits(anatomy.base)
    notes: list[str] = []
    plans = []
    proofs = Proofs(model, [layer for _, layer in layers])
    mixers = recurrent_mixers(anatomy, proofs.usual)
    planning = Planning(config, predictors, len(layers), Step(), proofs, dump, passes, mixers, group)
    planned: dict[nn.Module, str] = {}
    trains = any(p.requires_grad for p in model.parameters())
    tried: set[tuple] = set()
    for index, (name, layer) in enumerate(layers):
        if layer in planned:
            notes.append(f"{name}: is {planned[layer]} again")
            continue
        planned[layer] = name
        if config.is_dense(index, len(layers)):
            notes.append(f"{name}: dense (dense_layers)")
            last = config.dense_layers is None and index == len(layers) - 1
            # The backward reaches the last layer while everything saved is still alive. Under the default depth plan
            # its graph is installed with dense branches, so that its MLP is recomputed in segments.
            if not (planning.rewrites_dense_layers or last):
                continue
        distributed.refuse_finer_units(name, layer)
        with distributed.gathered(layer):
            if trains:
                # Some bases are unpacked in the model's first call.
                proofs.usual(layer)
                refuse_untrainable(name, layer, tried)
                if config.base == "float8":
                    refuse_readers(name, layer, tried)
            try:
                plan = plan_layer(planning, name, layer, index)
            except UnsupportedModelError as error:
                if group is not None:
                    raise UnsupportedModelError(f"ranks cannot share a sequence: {error}") from error
                lost = ", neither offloaded, nor recomputed in parts, nor in float8"
                notes.append(f"{name}: left as it is{lost if config.rewrites_dense_layers else ''}: {error}")
                continue
        if plan is not None:
            if group is not None:
                check_exchanged(plan)
            if config.is_dense(index, len(layers)) and not planning.rewrites_dense_layers:
                # Reported as a note, not as a row: nothing is eliminated here.
                plan.rows.clear()
            plans.append(plan)
    for run in planning.passes:
        if run not in PASSES:
            counts = [planning.changes[plan.name][run.__name__] for plan in plans]
            notes.append(f"{run.__name__}: {sum(counts)} changes in {sum(map(bool, counts))} layers")
    if planning.proofs.obstacle:
        notes.append(f"not proven by running: {planning.proofs.obstacle}")
    _check_rewritten(anatomy, config, plans, notes)
    if group is not None:
        notes.append(f"each sequence is shared by {group.size} ranks, which attend with some of the heads each")
    sparse_experts = _sparse_experts(anatomy.model, plans)
    head = plan_head(anatomy, planning, sparse_experts, notes)
    return plans + ([head] if head else []), notes, mixers


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
    if getattr(text_config(anatomy.config), "use_cache", False):
        _refuse_what_a_cache_changes(anatomy)
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


def _refuse_what_a_cache_changes(anatomy: Anatomy) -> None:
    """Raise where layers compute something else with the default cache: a rewritten model makes none in training.

    Those that have one number read each other's keys from it.
    """
    mend = "Set model.config.use_cache = False"
    for kind, (name, layer) in {type(layer): (name, layer) for name, layer in anatomy.layers}.items():
        if reads_use_cache(layer):
            raise UnsupportedModelError(
                f"{name}: the forward of {kind.__name__} computes something else with use_cache=True, which the model "
                f"asks for by default, than without, as a rewritten model is called in training. {mend}"
            )
    numbered: dict[Any, str] = {}
    for name, layer in anatomy.layers[: getattr(text_config(anatomy.config), "num_hidden_layers", None)]:
        numbers = {getattr(m, "layer_idx", None) for m in layer.modules() if is_softmax_attention(m)}
        # Zamba2's attentions have -1 and are told their numbers in each call.
        for number in (n for n in numbers if isinstance(n, int) and n >= 0):
            if number in numbered:
                raise UnsupportedModelError(
                    f"{name} and {numbered[number]} both have layer_idx={number}: in training too, transformers' "
                    f"default cache shows the later one the keys of the earlier. {mend}, "
                    "or give each layer's attention a layer_idx of its own, before lemo_fx.transform"
                )
            numbered[number] = name
