"""Whether a module or an operation treats each token alone: a module by running it, an operation by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lemo_fx.graph.capture import is_tensor_function
from lemo_fx.graph.probe import quiet
from lemo_fx.kernels.float8_linear.as_it_comes import is_quantised

ELEMENTWISE_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.mul,
        operator.sub,
        operator.truediv,
        operator.neg,
        torch.add,
        torch.mul,
        torch.tanh,
        torch.sigmoid,
        functional.dropout,
        functional.gelu,
        functional.silu,
        functional.relu,
        functional.linear,
        functional.layer_norm,
        functional.rms_norm,
    }
)
"""Functions that treat each token alone when their tensor arguments are [B, S, H] rows or parameters."""

MIXES = "mixes tokens, but is not a softmax attention that transformers dispatches"
"""What is said of a module whose rows depend on their neighbours."""

ELEMENTWISE_METHODS = frozenset({"to", "float", "type", "type_as", "contiguous", "add", "mul", "sub", "div", "tanh"})


def why_not_token_wise(module: nn.Module, width: int) -> str | None:
    """None if the module treats each token alone, else why that is not shown.

    Shown by running it: eight random tokens give the same rows in another order and on their own. This covers norms,
    dropouts (switched off here), dense and mixture-of-experts MLPs and adapters alike, without a list of names. Of a
    tuple, the first value counts.
    """
    reason = why_not_alone(module, module, (1, 8, width))
    # The input width of a bare projection such as OPT's fc2.
    inner = int(getattr(module, "in_features", 0)) or width
    return why_not_alone(module, module, (1, 8, inner)) if reason and inner != width else reason


def why_not_alone(run: Callable[[torch.Tensor], object], module: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """None if a function, which calls a module or several, gives the same rows in another order and on their own."""
    # Weights in float8 are no example of what a layer is handed.
    parameter = next((p for p in module.parameters() if p.is_floating_point() and p.itemsize > 1), None)
    if parameter is None:
        dtype, device = torch.float32, torch.device("cpu")
    elif parameter.device.type == "meta":
        return "has its weights on the meta device"
    else:
        dtype, device = parameter.dtype, parameter.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4], device=device)
    with quiet(module), torch.no_grad():
        try:
            whole = _first(run(x))
            if not isinstance(whole, torch.Tensor) or whole.shape[:2] != x.shape[:2]:
                return "does not return one row per token"
            permuted, alone = _first(run(x[:, order])), _first(run(x[:, 2:5]))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, ImportError) as error:
            problem = [*str(error).splitlines(), ""][0]
            if isinstance(error, TypeError) and "missing" in problem:
                return "is no softmax attention that transformers dispatches, and reads more than its token"
            return f"is no softmax attention that transformers dispatches, and could not be tried on rows: {problem}"
    # Quantised activations (LLM.int8) round a token differently in other company, which is not mixing.
    exact = dtype in (torch.float32, torch.float64) and not any(is_quantised(m) for m in module.modules())
    atol, rtol = (1e-4, 1e-3) if exact else (5e-2, 5e-2)
    pairs = ((permuted, whole[:, order]), (alone, whole[:, 2:5]))
    if all(one.shape == other.shape and torch.allclose(one, other, rtol=rtol, atol=atol) for one, other in pairs):
        return None
    return MIXES


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) and out else out


def why_not_elementwise(node: fx.Node, attentions: list[fx.Node]) -> str | None:
    """None if an operation treats each token alone, or takes a value out of what one of these attentions returns."""
    if node.op == "call_function" and node.target is operator.getitem:
        return None if node.args[0] in attentions else "indexes a value inside the branch"
    if node.op == "call_function" and node.target in ELEMENTWISE_FUNCTIONS:
        return None
    if node.op == "call_method" and node.target in ELEMENTWISE_METHODS:
        return None
    if (node.op, node.target) == ("call_method", "size"):
        return None
    name = f"{node.target.__module__}.{node.target.__name__}" if callable(node.target) else str(node.target)
    known = " of torch" if is_tensor_function(node.target) else ""
    return f"calls {name}{known}, which is not known to treat tokens one by one"
