"""Compute the head and the loss segment by segment (LeMo section 4.3, segment-based peak cutting).

before:  logits = softcap(lm_head(hidden));  loss = loss_function(logits, labels)
after:   loss = segmented_loss(self.lemo_logits, self.lm_head, hidden, labels)     # full logits do not exist
         logits = late_logits(self.lemo_logits, self.lm_head, hidden)               # unless someone uses them
         lemo_logits(part): return softcap(lm_head(part))
Works on the graph of the whole causal model, not of a layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.nn import functional
from typing_extensions import TypeIs

from lemo_fx.errors import CaptureError
from lemo_fx.graph.capture import SPLAT, by_name, remove_dead_nodes
from lemo_fx.passes.rewrite import call
from lemo_fx.runtime import loss as segmented
from lemo_fx.runtime.logits import late_logits

LOSS_ARGUMENTS = ("logits", "labels", "vocab_size")
PLAIN = {"weight": None, "size_average": None, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}
"""How cross entropy must be called."""

LOGITS = "lemo_logits"
"""Name of the function that the pass outlines."""


def segment_loss(graph: fx.Graph, loss_function: Callable, segments: int | str) -> dict[str, fx.Graph]:
    """Rewrite a captured causal model's head in place; returns the function that it outlines, by name.

    Args:
        loss_function: the function that the model's `loss_function` property returned while capturing; torch's cross
            entropy may be called in its place.
        segments: number of segments, or "auto".

    Raises:
        CaptureError: the graph is of another form, and was left as it is.
    """
    known = (loss_function, functional.cross_entropy)
    losses = [n for n in graph.nodes if n.op == "call_function" and n.target in known]
    if len(losses) != 1:
        raise CaptureError(f"expected one call to the loss function, found {len(losses)}")
    loss = losses[0]
    if loss.target is loss_function:
        given = by_name(LOSS_ARGUMENTS, loss.args, loss.kwargs)
    else:
        given = _given_to_cross_entropy(loss)
    chain = _head_chain(given.pop("logits"))
    if chain is None:
        raise CaptureError("the logits are not a chain of element-wise operations after one module")
    head, *after = chain

    body = fx.Graph()
    values = {head.args[0]: body.placeholder("hidden")}
    for node in chain:
        values[node] = body.node_copy(node, lambda n: values[n])
    body.output(values[chain[-1]])

    given.pop("vocab_size", None)
    mapping = given.pop(SPLAT, None)
    with graph.inserting_before(loss):
        function = graph.create_node("get_attr", LOGITS, name=LOGITS)
        module = graph.create_node("get_attr", str(head.target), name="head")
        kwargs = {**given, "softcap": _softcap(after), "segments": segments}
        if mapping is not None:
            kwargs[SPLAT] = mapping
        new = call(graph, segmented.segmented_loss, (function, module, head.args[0]), "loss", kwargs=kwargs)
        upcast = any((n.op, n.target) == ("call_method", "float") for n in after)
        late = call(graph, late_logits, (function, module, head.args[0], upcast), "logits")
    loss.replace_all_uses_with(new)
    output = graph.output_node()
    result = output.args[0]
    if isinstance(result, fx.Node):
        result.kwargs = {k: late if v is chain[-1] else v for k, v in result.kwargs.items()}
        result.args = tuple(late if v is chain[-1] else v for v in result.args)
    for node in graph.nodes:
        if node.target is getattr and isinstance(node.args[0], fx.Node) and node.args[0].target is getattr:
            # `if outputs.image_outputs is not None` was answered with yes, and a call without images has None there.
            node.args = (*node.args[:2], None)
    remove_dead_nodes(graph)
    return {LOGITS: body}


def _given_to_cross_entropy(loss: fx.Node) -> dict[str, object]:
    """Arguments of a causal loss for cross_entropy(logits.view(-1, V), labels.view(-1)), whose labels are not shifted.

    Decoders of encoder-decoder models (BartForCausalLM) compute theirs so.

    Raises:
        CaptureError: it is called otherwise.
    """
    rows, target = loss.args if len(loss.args) == 2 else (None, None)
    ignored = loss.kwargs.get("ignore_index")
    if loss.kwargs != {**PLAIN, "ignore_index": ignored} or not (_is_view(rows, 2) and _is_view(target, 1)):
        raise CaptureError("its cross entropy is not the mean over the rows of logits and labels")
    labels = target.args[0]
    if isinstance(labels, fx.Node) and (labels.op, labels.target) == ("call_method", "to"):
        # To the device of the logits; ours goes to that of the hidden states.
        labels = labels.args[0]
    if not isinstance(labels, fx.Node) or labels.op != "placeholder":
        raise CaptureError("its labels are changed before their cross entropy")
    return {"logits": rows.args[0], "labels": labels, "shift_labels": labels, "ignore_index": ignored}


def _is_view(node: object, axes: int) -> TypeIs[fx.Node]:
    return (
        isinstance(node, fx.Node)
        and (node.op, node.target) in (("call_method", "view"), ("call_method", "reshape"))
        and (len(node.args) - 1, node.args[1]) == (axes, -1)
    )


def _head_chain(logits: object) -> list[fx.Node] | None:
    """[head call, ..., logits]: each node's only input is the one before it."""
    chain: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node):
        chain.insert(0, node)
        if node.op == "call_module":
            return chain if len(node.args) == 1 and not node.kwargs else None
        if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return None


def _softcap(after: list[fx.Node]) -> float | str | None:
    """c for the chain x / c, tanh, * c; None for no change; "other" for anything else."""
    nodes = [n for n in after if (n.op, n.target) not in (("call_method", "contiguous"), ("call_method", "float"))]
    if not nodes:
        return None
    if [n.target for n in nodes] == [operator.truediv, torch.tanh, operator.mul]:
        divide, _, multiply = nodes
        if divide.args[1] == multiply.args[1]:
            return float(divide.args[1])  # type: ignore[arg-type]
    return "other"
