"""Plan the loss head: the loss and its gradient in segments, where that is proven to be the original loss."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import fx, nn

from lemo_fx.errors import CaptureError
from lemo_fx.graph.anatomy import Anatomy
from lemo_fx.graph.capture import NO_CACHE, PATCHING, argument_names, capture, readable_code, remove_dead_nodes
from lemo_fx.graph.left_out import kinds_left_out, matters_when_absent
from lemo_fx.passes.segment_loss import segment_loss
from lemo_fx.planning.dump import dumper
from lemo_fx.planning.plans import Plan, Planning
from lemo_fx.planning.proof_of_head import prove_head
from lemo_fx.runtime.captured import CapturedHead, numbers_of
from lemo_fx.runtime.head import HeadSettings, SegmentedLoss

logger = logging.getLogger(__name__)

GIVEN = ("attention_mask", "position_ids")
"""Arguments of a causal model that a training step usually has; others, where their absence matters, it lacks."""


def plan_head(anatomy: Anatomy, planning: Planning, sparse_experts: bool, notes: list[str]) -> Plan | None:
    """The plan of a model's loss head, see `HeadSettings`; None where it has none. Adds to the report's notes."""
    head, name = anatomy.head, anatomy.head_name
    if head is None or name is None:
        notes.append("no loss head: the model has no output projection of its own")
        return None
    segmented: SegmentedLoss | None = None
    functions: dict[str, fx.Graph] = {}
    try:
        graph, functions, segmented = _segmented(anatomy, planning)
    except CaptureError as error:
        notes.append(f"{name or type(head).__name__}: loss not segmented: {error}")
        logger.info("loss not segmented: %s", error)
        graph = fx.Graph()
        graph.output(None)
    names = argument_names(head)
    settings = HeadSettings(planning.config, planning.step, names, sparse_experts, segmented, planning.group)
    return Plan(name, head, graph, functions, {}, settings)


def _segmented(anatomy: Anatomy, planning: Planning) -> tuple[fx.Graph, dict[str, fx.Graph], SegmentedLoss]:
    """(graph, the functions it calls, which calls it is for).

    Raises:
        CaptureError: why the loss stays the original's.
    """
    head: Any = anatomy.head
    segments = planning.config.loss_segments
    if segments is None:
        raise CaptureError("loss_segments=None")
    if "forward" in vars(head):
        raise CaptureError("another library (TRL, Liger, accelerate) put a forward of its own on the model")
    globals_of = vars(inspect.getmodule(inspect.unwrap(type(head).forward)))
    with PATCHING:
        slicer = globals_of.get("slice_logits_to_keep")
    loss_function: Any = head.loss_function
    constants: dict[str, Any] = {"output_router_logits": False}
    leaves: dict[str, Any] = {"leaf_functions": (slicer,) if slicer else (), "properties": ("loss_function",)}
    graph = _captured(head, constants, leaves)
    # Segments are for calls with labels, and a call without token ids or embeddings is none.
    names = matters_when_absent(head, graph, constants, besides=("input_ids", "labels"), **leaves)
    presence = {name: name in GIVEN for name in names}
    absent = {name: None for name, given in presence.items() if not given}
    if absent:
        graph = capture(head, {**constants, **absent}, **leaves)
    known = constants.keys() - {"logits_to_keep"}
    left_out = kinds_left_out(head, graph, {*known, *presence, *NO_CACHE, "return_dict"})
    captured = CapturedHead(readable_code(graph, "Forward"), {**constants, **absent}, leaves, numbers_of(head))
    segmented = SegmentedLoss(loss_function, slicer is not None, presence, left_out, captured)
    dump = dumper(planning.dump, f"{anatomy.head_name or 'model'}.loss_head", head)
    dump("captured", graph, {})
    functions = segment_loss(graph, loss_function, segments)
    dump("segment_loss", graph, functions)
    fault = prove_head(anatomy, graph, functions, segmented)
    if fault:
        raise CaptureError(fault)
    return graph, functions, segmented


def _captured(head: nn.Module, constants: dict[str, Any], leaves: dict[str, Any]) -> fx.Graph:
    """The graph of a causal model's own forward.

    Gemma 4 asks by their number whether its hidden states were cut to `logits_to_keep` already. Where all are kept, the
    answer must not matter: the graph is then one for such calls.

    Args:
        constants, leaves: what to capture it with; added to where the graph is for such calls alone.
    """
    try:
        return capture(head, constants, **leaves)
    except CaptureError:
        every = {**constants, "logits_to_keep": 0}
        cut, whole = (capture(head, every, **leaves, equal=answer) for answer in (True, False))
        for node in cut.nodes:
            if node.target in leaves["leaf_functions"] and node.args[1:] == (0,):
                node.replace_all_uses_with(node.args[0])
        remove_dead_nodes(cut)
        if readable_code(cut, "Forward") != readable_code(whole, "Forward"):
            raise
        constants["logits_to_keep"], leaves["equal"] = 0, False
        return whole
