"""What is decided for a module of a model and its sites, and what the decisions for its layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.graph.capture import argument_names
from lemo_fx.passes.pipeline import Pass
from lemo_fx.passes.rewrite import LayerRewrite
from lemo_fx.planning.proof import Proofs
from lemo_fx.runtime.captured import Captured
from lemo_fx.runtime.head import HeadSettings
from lemo_fx.runtime.layer import LayerSettings, floats_of
from lemo_fx.runtime.parts import SequenceGroup
from lemo_fx.runtime.step import Step

if TYPE_CHECKING:
    from lemo_fx.predictors import Predictors


@dataclass
class SitePlan:
    """What was decided for one site of a layer; the report's row comes from it.

    Attributes:
        site, kind: its name, and "attention" or "mlp".
        eliminated: treatment of the eliminated tokens, or "dense".
        score: what ranks its blocks, budget: its keep or threshold, in words; empty where it is dense.
        note: what a reader should know.
        refused: whether it is dense because it cannot be rewritten.
        tokens_of: name of the site whose selection it takes.
        float8: what of it the plan wants in float8, in words.
        called: names of the modules that its branch calls.
    """

    site: str
    kind: SiteKind
    eliminated: str
    score: str = ""
    budget: str = ""
    note: str = ""
    refused: bool = False
    tokens_of: str = ""
    float8: str = ""
    called: tuple[str, ...] = ()


@dataclass
class Plan:
    """Everything needed to rewrite one module, made without touching it."""

    name: str
    module: nn.Module
    graph: fx.Graph
    functions: dict[str, fx.Graph]
    parts: dict[str, nn.Module]
    settings: LayerSettings | HeadSettings
    rows: list[SitePlan] = field(default_factory=list)


@dataclass(frozen=True)
class Planning:
    """What the plans of a model's layers have in common.

    Attributes:
        count: of the decoder layers.
        dump: folder for the graphs of every pass, or None.
        passes: that rewrite a layer; changes: how many each made, by layer.
        mixers: the modules that no compiled graph holds, from `recurrent_mixers`.
    """

    config: LemoConfig
    predictors: Predictors | None
    count: int
    step: Step
    proofs: Proofs
    dump: Path | None
    passes: Sequence[Pass]
    mixers: Sequence[nn.Module] = ()
    group: SequenceGroup | None = None
    changes: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def rewrites_dense_layers(self) -> bool:
        """Whether layers without any elimination are rewritten too."""
        return self.config.rewrites_dense_layers or self.group is not None

    @property
    def parts(self) -> tuple[int, int]:
        """(parts of the sequence that this process chooses blocks from, number of the first)."""
        if self.group is None:
            return self.config.sequence_parts, 0
        parts = max(1, self.config.sequence_parts // self.group.size)
        return parts, self.group.rank * parts


def layer_plan(
    name: str,
    rewrite: LayerRewrite,
    config: LemoConfig,
    step: Step,
    rows: list[SitePlan],
    captured: Captured | None = None,
) -> Plan:
    """The plan of one decoder layer from its finished rewrite."""
    mixers = [str(s.site.mixer.target) for s in rewrite.sites if s.site.kind == "attention"]
    attention: Any = rewrite.layer.get_submodule(mixers[0]) if mixers else None
    attention_config = getattr(attention, "config", None)
    implementation = getattr(attention_config, "_attn_implementation", None)
    floats = {name for module in rewrite.layer.modules() for name, x in vars(module).items() if floats_of(x)}
    settings = LayerSettings(
        config,
        argument_names(rewrite.layer),
        attention_config,
        implementation,
        step,
        tuple(sorted({"scaling", *floats})),
        rewrite.presence,
        rewrite.group,
        captured,
    )
    return Plan(name, rewrite.layer, rewrite.graph, rewrite.functions, rewrite.modules, settings, rows)
