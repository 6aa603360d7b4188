"""Whether ranks can share the sequences of a model: what is refused by name, and proven before anything is planned."""

from __future__ import annotations

import inspect
from typing import Any

from lemo_fx.config import LemoConfig
from lemo_fx.errors import ConfigError, UnsupportedModelError
from lemo_fx.graph.anatomy import Anatomy
from lemo_fx.passes.rewrite import part_name
from lemo_fx.planning.plans import Plan
from lemo_fx.planning.proof_of_parts import prove_parts
from lemo_fx.runtime.parts import SequenceGroup
from lemo_fx.runtime.sequence import LAYER_TYPES


def check_shared(anatomy: Anatomy, config: LemoConfig, group: SequenceGroup) -> None:
    """Raise where ranks cannot share a sequence under this config (ConfigError), or of this model."""
    if config.sequence_parts > 1 and config.sequence_parts % group.size:
        raise ConfigError(
            f"sequence_parts={config.sequence_parts} cannot be shared by {group.size} ranks: leave it out, or give a "
            "multiple of that"
        )
    if config.attention is not None and config.attention.keys == "every":
        raise ConfigError(
            "keys='every' asks for the keys of every token, of which ranks that share a sequence hold a part each: use "
            "keys='kept'"
        )
    if anatomy.head is None:
        raise UnsupportedModelError(
            f"{type(anatomy.base).__name__} has no loss head: ranks that share a sequence need the model that computes "
            "the loss (AutoModelForCausalLM)"
        )
    parameters = inspect.signature(type(anatomy.head).forward).parameters.values()
    if "position_ids" not in (p.name for p in parameters) or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise UnsupportedModelError(
            f"{type(anatomy.head).__name__} takes no position_ids, or hands nothing on to its loss: a part of a "
            "sequence cannot say where it begins and how many labels the whole has"
        )
    if "forward" in vars(anatomy.head):
        raise UnsupportedModelError(
            f"another library (TRL, Liger) put a forward of its own on {type(anatomy.head).__name__}, whose loss may "
            "not count the labels of other parts: transform the model before that, or do without"
        )
    text: Any = anatomy.decoder.config
    kinds = getattr(text, "layer_types", None) or ()
    unknown = next((kind for kind in kinds if kind not in LAYER_TYPES), None)
    if unknown is not None:
        raise UnsupportedModelError(
            f"{type(anatomy.base).__name__} has layers of type {unknown!r}; ranks can share a sequence where all are "
            f"{' or '.join(LAYER_TYPES)}"
        )
    if any("dynamic" in str(getattr(module, "rope_type", "")) for module in anatomy.decoder.modules()):
        raise UnsupportedModelError(
            f"the position embeddings of {type(anatomy.base).__name__} follow the longest position of a call "
            "(rope_type 'dynamic'), which is another in every part of a sequence: use 'yarn' or 'linear'"
        )
    found = prove_parts(anatomy, group.size)
    if found:
        raise UnsupportedModelError(f"ranks cannot share the sequences of {type(anatomy.base).__name__}: {found}")


def check_exchanged(plan: Plan) -> None:
    """Raise where a branch of a layer would mix the tokens of a rank's part alone."""
    for row in plan.rows:
        exchanged = row.kind != "attention" or part_name(row.site, "exchange") in plan.parts
        if row.refused or not exchanged:
            why = row.note or "its attention is not exchanged"
            raise UnsupportedModelError(f"ranks cannot share a sequence: {plan.name}, {row.site}: {why}")
