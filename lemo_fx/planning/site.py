"""Plan one site of a layer: how its eliminated tokens are treated, and what ranks and selects its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lemo_fx.config import Elimination, LemoConfig
from lemo_fx.errors import ConfigError, PredictorError, UnsupportedModelError
from lemo_fx.graph.anatomy import implementation_of
from lemo_fx.graph.sites import scored_module
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite, part_name
from lemo_fx.planning.plans import Planning, SitePlan
from lemo_fx.runtime import kept
from lemo_fx.runtime.keys import Keys, Queries
from lemo_fx.runtime.scores import Candidates, RandomScore, StepScore, measured_score
from lemo_fx.runtime.select import SelectBlocks

if TYPE_CHECKING:
    from lemo_fx.predictors import Predictors


def plan_site(planning: Planning, place: str, rewrite: LayerRewrite, planned: PlannedSite, index: int) -> SitePlan:
    """Decide one sparse site and add its parts to the rewrite; errors name the `place`."""
    config, predictors, count = planning.config, planning.predictors, planning.count
    elimination = config.site(planned.site.kind)
    assert elimination is not None
    planned.treatment = elimination.eliminated
    planned.score = _score_of(elimination, predictors, index, planned.name)
    if predictors is None and planned.score == "predicted":
        raise PredictorError(f"score='predicted' needs trained predictors: {HOW_TO_FIT} ({place})")
    if predictors is None and planned.treatment == "stand_in":
        raise PredictorError(f"eliminated='stand_in' needs fitted maps: {HOW_TO_FIT} ({place})")
    if planning.group is not None and planned.site.kind == "attention" and planned.score in ("measured", "predicted"):
        raise ConfigError(
            f"score={planned.score!r} compares every query block with every key block, and ranks that share a sequence "
            f"hold a part each: use score='step' ({place})"
        )
    keep = elimination.at_layer("keep", index, count)
    threshold = elimination.at_layer("threshold", index, count)
    keeps = [elimination.at_layer("keep", i, count) or 1.0 for i in range(count) if not config.is_dense(i, count)]
    planned.share = max(keeps)
    if keep != 1:
        planned.float8 = config.float8_everywhere or (planned.treatment == "exact" and config.backward == "float8")
    elif planned.treatment == "exact":
        # Nothing is eliminated, so nothing is to be computed a second time.
        planned.treatment = "skip"
    parts, note = _score_parts(planning, place, rewrite.layer, planned, index)
    if elimination.keys == "every" and planned.treatment == "exact":
        planned.every_key = True
        parts |= _key_parts(rewrite.layer, planned, place)
        note = f"{note}; every key" if note else "every key"
    shared = planned.score == "shared"
    if not shared:
        varies = len(set(keeps)) > 1
        select = SelectBlocks(
            config.block_size, keep or 1.0, planning.step, elimination.balance, varies, planning.parts[0]
        )
        select.set_threshold(threshold)
        parts["select"] = select
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
    implementation = implementation_of(attention)
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
    """The parts of a score by role, and the report's note on them."""
    kind, block_size = planned.site.kind, planning.config.block_size
    if planned.score == "random":
        return {"score": RandomScore(2 * index + (kind == "mlp") + 1, block_size, *planning.parts)}, ""
    if planned.score == "step":
        return {"score": StepScore(block_size, planning.step, *planning.parts)}, ""
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


def float8_asked(site: PlannedSite, config: LemoConfig) -> str:
    """What of a site the plan wants in float8, in the report's words."""
    if site.treatment == "exact" and not config.float8_everywhere:
        return next((f"{name} in float8" for name in ("forward", "backward") if getattr(config, name) == "float8"), "")
    asked = config.float8_everywhere if site.treatment is None else site.float8
    return "in float8" if asked else ""


def called_by(site: PlannedSite) -> tuple[str, ...]:
    """Names of the modules that a site's branch calls."""
    return tuple(str(node.target) for node in site.site.nodes if node.op == "call_module")
