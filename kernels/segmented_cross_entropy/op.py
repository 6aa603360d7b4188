"""The op `lemo_fx::segmented_cross_entropy`: schema, fake and autograd.

The forward computes the gradients too, so the backward only scales them and no logits are computed twice.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from lemo_fx.errors import InputError
from lemo_fx.kernels.lowering import obstacle
from lemo_fx.kernels.segmented_cross_entropy import reference


@torch.library.custom_op("lemo_fx::segmented_cross_entropy", mutates_args=())
def segmented_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    rows: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross entropy over segments of `rows` tokens; see `reference.segmented_cross_entropy`."""
    per_segment = reference.loss_and_gradient
    if not obstacle("segmented_cross_entropy", hidden.device):
        from lemo_fx.kernels.segmented_cross_entropy import triton

        per_segment = triton.loss_and_gradient
    needs = (needs_hidden, needs_weight, needs_bias)
    return reference.segmented_cross_entropy(
        hidden, weight, bias, labels, softcap, ignore_index, rows, needs, per_segment
    )


@segmented_cross_entropy.register_fake
def _(hidden, weight, bias, labels, softcap, ignore_index, rows, needs_hidden, needs_weight, needs_bias):
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        torch.empty_like(bias) if needs_bias and bias is not None else weight.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *unused):
    if torch.is_grad_enabled():
        # What the forward has computed is a constant to autograd: a second gradient would lack all of it.
        raise InputError(
            "create_graph=True asks for gradients of gradients, which a loss in segments has none of: transform with "
            "LemoConfig(loss_segments=None)"
        )
    gradients = [
        saved * grad.to(saved.dtype) if wanted and grad is not None else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    return (*gradients, *[None] * 7)


segmented_cross_entropy.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.lemo_fx.segmented_cross_entropy)
def _flops(hidden: torch.Size, weight: torch.Size, *rest, **named) -> int:
    """The logits, and one product of the same size for each gradient that is wanted."""
    needs_hidden, needs_weight = rest[-3:-1]
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + bool(needs_hidden) + bool(needs_weight))
