"""Run a branch of the residual stream: checkpointed, in segments of tokens, with or without gradient."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lemo_fx.kernels.eliminate.op import eliminate
from lemo_fx.kernels.float8_linear.op import Float8Switch
from lemo_fx.kernels.private import ATTENTION_OPS, GROUPED_PRODUCT, SCALED_PRODUCT, guard_or_false


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Checkpoint policy that keeps what scaled dot product attention computed and recomputes the rest."""
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


MATMULS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
    GROUPED_PRODUCT: 0,
    SCALED_PRODUCT: 0,
    # Its second argument, the scales of the first, counts as a narrow matrix: a held weight is no adapter's.
    torch.ops.lemo_fx.held_product.default: 0,
}
"""Matmuls, and which argument is the left matrix."""


WIDENING = 8


def keep_matmuls(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Checkpoint policy that recomputes what is cheap: norms, casts, activation functions, an adapter's way back up.

    A matmul whose result is `WIDENING` times as wide as its input is a low-rank adapter's second one: its input is
    kept in its place.
    """
    if operation in MATMULS:
        left, right = args[MATMULS[operation] :][:2]
        if right.shape[-1] < WIDENING * left.shape[-1]:
            return CheckpointPolicy.MUST_SAVE
    return keep_attention(context, operation)


def keep_sums(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """`keep_matmuls` for a compiler, which saves no more of what may be kept than the backward reads.

    It may keep sums in the model's precision too: rotated queries and keys and the stream between two branches, in the
    place of the matmuls that they come from, to which the adapters' part would have to be added again.
    """
    if operation is torch.ops.aten.add.Tensor and all(isinstance(term, torch.Tensor) for term in args[:2]):
        first, second = args[:2]
        if first.shape == second.shape and first.dtype == second.dtype:
            return CheckpointPolicy.MUST_SAVE
    return keep_matmuls(context, operation, *args, **kwargs)


def keep_nothing(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Checkpoint policy that recomputes everything, for a compiler: see `_checkpoint`."""
    return CheckpointPolicy.PREFER_RECOMPUTE


SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _contexts(policy: Callable) -> Callable:
    """What `checkpoint` takes for a policy. By `cache_hash` torch knows its compiled graph in the next process."""
    contexts: Any = functools.partial(create_selective_checkpoint_contexts, policy)
    contexts.cache_hash = f"{policy.__name__} {SOURCE}"
    return contexts


RECOMPUTE_ALL = _contexts(keep_nothing)


SELECTIVE = {"projections": _contexts(keep_attention), "elementwise": _contexts(keep_matmuls)}
"""`LemoConfig.recompute` -> what a checkpointed branch keeps besides its arguments."""


SELECTIVE_COMPILED = {**SELECTIVE, "elementwise": _contexts(keep_sums)}


THROUGH_HOOKS: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True} if "respect_saved_tensors_hooks" in signature(checkpoint).parameters else {}
)
"""Lets offload have what a policy keeps, in eager mode and from torch 2.14 on; in compiled code it always has."""


def branch(
    function: Callable, checkpointing: bool, recompute: str, *args: Any, float8: Float8Switch | None = None
) -> torch.Tensor:
    """Run a branch; where its layer checkpoints activations, keep only its arguments and recompute it in the backward.

    The rows that reach a branch are the kept ones, so a checkpointed layer keeps less than its full input.

    Args:
        checkpointing: the layer's own switch (`model.gradient_checkpointing_enable()`).
        recompute: as in `LemoConfig`.
        float8: runs the branch with the frozen linear layers' matmuls in float8, forward and backward.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return function(*args) if float8 is None else float8.run(function, *args)
    compiling = torch.compiler.is_compiling()
    contexts = SELECTIVE_COMPILED if compiling else SELECTIVE
    selective: dict[str, Any] = {"context_fn": contexts[recompute]} if recompute in contexts else {}
    if selective and not compiling:
        selective |= THROUGH_HOOKS
    return _checkpoint(function, *args, float8=float8, **selective)


def _checkpoint(function: Callable, *args: Any, float8: Float8Switch | None, **selective: Any) -> torch.Tensor:
    selective["use_reentrant"] = False
    if float8 is None:
        return checkpoint(function, *args, **selective)
    if torch.compiler.is_compiling():
        # A compiler does not see that what a function with a gradient of its own computes within a checkpoint is to be
        # recomputed, unless a policy says so operation by operation; it would keep every matmul.
        selective.setdefault("context_fn", RECOMPUTE_ALL)
        # Traced once, and a compiler lets a checkpointed function change nothing outside of it.
        return float8.run(checkpoint, functools.partial(_again_in, float8, function), *args, **selective)
    return checkpoint(float8.run, function, *args, **selective)


def _again_in(float8: Float8Switch, function: Callable, *args: Any) -> torch.Tensor:
    """A function that is traced with its switch on; where a graph breaks in it, the recompute has to turn it on."""
    return function(*args) if torch.compiler.is_compiling() or float8.on else float8.run(function, *args)


SEGMENT = 8192


MOST_SEGMENTS = 8
"""Tokens of a token-wise branch that are recomputed at a time, and how many pieces there are at most (a compiler writes
each of them out). The MLP's inner activations are several times as wide as the stream; without segments, one long
layer's recompute would set the peak of the whole step."""


def token_wise_branch(
    function: Callable,
    checkpointing: bool,
    recompute: str,
    length: int,
    share: float,
    rows: torch.Tensor,
    *args: Any,
    float8: Float8Switch | None = None,
) -> torch.Tensor:
    """`branch` for a function that treats each token of rows [B, K, H] alone: recomputed in segments of tokens.

    Args:
        length: S, of the stream that the rows are from.
        share: as in `segments`.
    """
    checkpointing = checkpointing and torch.is_grad_enabled()
    # Where nothing is recomputed, or the wide matmuls are kept, segments save nothing.
    parts = (rows,) if not checkpointing or recompute == "elementwise" else segments(rows, length, share)
    if len(parts) == 1:
        return branch(function, checkpointing, recompute, rows, *args, float8=float8)
    return torch.cat([_checkpoint(function, part, *args, float8=float8) for part in parts], dim=1)


def segments(rows: torch.Tensor, length: int, share: float) -> Sequence[torch.Tensor]:
    """[B, K, H] in pieces of the tokens.

    Args:
        length: S, of the stream that the rows are from.
        share: of the stream's tokens that the rows are at most, in any layer. While a compiler traces, it counts in the
            place of K, so that one compiled graph does for layers of all budgets, and for what a threshold keeps.
    """
    count, pieces = rows.shape[1], 1
    most = -(-length * math.ceil(64 * share) // 64) if torch.compiler.is_compiling() else count
    while pieces < MOST_SEGMENTS and not guard_or_false(most <= pieces * SEGMENT):
        # Doubled, so that the blocks' tokens divide evenly: pieces of one length run one compiled kernel.
        pieces *= 2
    if pieces == 1:
        return (rows,)
    size = count // pieces
    return rows.split([size] * (pieces - 1) + [count - size * (pieces - 1)], dim=1)


def without_gradient(function: Callable, *args: Any, float8: Float8Switch | None = None) -> torch.Tensor:
    """Run a function for its values only, in float8 as `branch`: nothing is saved for the backward."""
    with torch.no_grad():
        return function(*args) if float8 is None else float8.run(function, *args)


def token_wise_without_gradient(
    function: Callable, length: int, rows: torch.Tensor, *args: Any, float8: Float8Switch | None = None
) -> torch.Tensor:
    """`without_gradient` for a function that treats each token of rows [B, K, H] alone, in pieces as of `segments`."""
    parts = [without_gradient(function, part, *args, float8=float8) for part in segments(rows, length, 1.0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def rows_for_values(stream: torch.Tensor, dropped: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """The rows of the stream [B, S, H] that a token-wise branch must also run on for its values.

    Those at the dropped tokens [B, S - K]. Where the kept ones' branch is recomputed in the backward, a compiler leaves
    it out of the forward if its values come from elsewhere; every row without gradient is then as much work, and no row
    moves.
    """
    stream = stream.detach()
    if checkpointing and torch.compiler.is_compiling():
        return stream
    return eliminate(stream, dropped)
