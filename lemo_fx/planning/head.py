"""Plan the loss head: the loss and its gradient in segments, where that is proven to be the original loss."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lemo_fx.config import LemoConfig
from lemo_fx.errors import CaptureError
from lemo_fx.graph.anatomy import Anatomy
from lemo_fx.graph.capture import NO_CACHE, PATCHING, capture, kind_of, matters_when_absent, readable_code, unread
from lemo_fx.passes.segment_loss import segment_loss
from lemo_fx.planning.dump import write_dump
from lemo_fx.planning.plans import Plan, Planning
from lemo_fx.planning.proof_of_head import prove_head
from lemo_fx.runtime.captured import CapturedHead, numbers_of
from lemo_fx.runtime.head import HeadSettings

logger = logging.getLogger(__name__)

GIVEN = ("attention_mask", "position_ids")
"""Arguments of a causal model that a training step usually has; others, where their absence matters, it lacks."""


def plan_head(
    anatomy: Anatomy,
    planning: Planning,
    sparse_experts: bool,
    notes: list[str],
) -> Plan | None:
    """The plan of a model's loss head; None where it has none.

    Args:
        sparse_experts: whether a branch that runs on kept tokens holds experts.
        notes: of the report, added to.
    """
    config, dump = planning.config, planning.dump
    head, name = anatomy.head, anatomy.head_name
    if head is None or name is None:
        notes.append("no loss head: the model has no output projection of its own")
        return None

    def observe(stage: str, graph: fx.Graph, functions: dict[str, fx.Graph]) -> None:
        if dump:
            write_dump(dump, f"{name or 'model'}.loss_head", stage, head, graph, functions)

    presence: dict[str, bool] = {}
    left_out: dict[str, Any] = {}
    graph, functions, loss_function, captured, reason = _segmented(anatomy, config, presence, left_out, observe)
    if reason:
        notes.append(f"{name or type(head).__name__}: loss not segmented: {reason}")
        logger.info("loss not segmented: %s", reason)
    arguments = _argument_names(head)
    settings = HeadSettings(
        config,
        planning.step,
        arguments,
        loss_function,
        captured is None or bool(captured.options["leaf_functions"]),
        sparse_experts,
        presence,
        left_out,
        captured,
        planning.group,
    )
    return Plan(name, head, graph, functions, {}, settings)


def _argument_names(head: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(type(head).forward).parameters.values()
    return tuple(p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD)


def _segmented(
    anatomy: Anatomy,
    config: LemoConfig,
    presence: dict[str, bool],
    left_out: dict[str, Any],
    observe: Callable[[str, fx.Graph, dict[str, fx.Graph]], None],
) -> tuple[fx.Graph, dict[str, fx.Graph], Any, CapturedHead | None, str]:
    """(graph, functions, loss function, the head as it was captured, why nothing was done).

    Args:
        presence: filled in: arguments whose absence changes the head -> whether the graph is for calls with them.
        left_out: filled in: arguments that the graph does not use -> the kind of value that they have where left out.
    """
    head: Any = anatomy.head
    pass_through = fx.Graph()
    pass_through.output(None)
    unchanged: tuple[fx.Graph, dict[str, fx.Graph], None, None] = (pass_through, {}, None, None)
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
        asked = [name for name in unread(graph) if name not in (*constants, *presence, *NO_CACHE, "return_dict")]
        defaults = inspect.signature(inspect.unwrap(type(head).forward)).parameters
        left_out |= {name: kind_of(defaults[name].default if name in defaults else None) for name in asked}
    except CaptureError as error:
        return *unchanged, str(error)
    captured = CapturedHead(readable_code(graph, "Forward"), {**constants, **absent}, leaves, numbers_of(head))
    observe("0_captured", graph, {})
    result = segment_loss(graph, loss_function, config.loss_segments)
    if result.graph is None or result.logits is None:
        return *unchanged, result.reason
    functions = {"lemo_logits": result.logits}
    observe("1_segment_loss", result.graph, functions)
    fault = prove_head(anatomy, result.graph, functions, slicer is not None, presence)
    if fault:
        return *unchanged, fault
    return result.graph, functions, loss_function, captured, ""
