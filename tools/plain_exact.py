"""Elimination `exact` written plainly for a Llama, with what the package does not do: for studies of quality only.

The forward is the original's; the gradient flows through kept tokens. Written eagerly and without regard to time, so
that parts can be exchanged one by one:

- which keys a kept query's gradient knows of: those of kept tokens (as the package), every token's as constants
  (TokenTune, arXiv 2501.18824), or every token's with the gradients of all keys and values reaching the adapters of k
  and v in their own layer and stopping there;
- which of the frozen layers' products are rounded to float8, and how.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import float8_attention
import torch
import torch.nn.functional as F
from forwards import forwards
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

from lemo_fx.kernels.select_blocks.reference import rank, take

LARGEST = {"float8": torch.finfo(torch.float8_e4m3fn).max, "int8": 127.0}
Format = Literal["float8", "int8"]
Phase = Literal["forward", "recompute", "dense"]


@dataclass(frozen=True)
class Float8:
    """Which products of frozen linear layers are rounded to float8 (e4m3, one scale a row), and how.

    Attributes:
        forward: those of the forward without gradient.
        recompute: those of the kept tokens, with gradient.
        gradient: those of the gradients that pass through kept tokens' layers.
        dense: forward and gradient of dense layers.
        weights, inputs: which operands are rounded; with one of them the product itself is in bfloat16.
        weights_to, inputs_to: the format of weights and inputs in forward and recompute, one scale a row. Sums of
            products with int8 are float32 here, where a GPU's own are whole numbers. Gradients stay in float8.
        but: names of linear layers that stay in the model's precision.
        first: so do all of that many decoder layers from the first one on.
        fast: add up in the tensor cores' short accumulators, as the package does.
        attention: attention in the forward without gradient too, as `float8_attention`.
        centred: multiply what x's rows have in common (`common_row`) in full, and round what is left.
        mean: add what the rounding of the weights takes from the mean input: (weights - rounded weights) @ mean of x's
            rows, a constant of the call. What rounding takes from every input alike, adapters learn to give back.
        once: with `mean`, the mean of the first 1,024 rows that a layer ever sees, for good: nothing is left to do in a
            step but to add a vector.
        redraw: widen the scales of weights by a factor from [1, 2) that is drawn anew in every step, so that no
            rounding error stays the same from step to step.
        until: share of the steps after which everything is in the model's precision.
    """

    forward: bool = True
    recompute: bool = True
    gradient: bool = True
    dense: bool = True
    weights: bool = True
    inputs: bool = True
    weights_to: Format = "float8"
    inputs_to: Format = "float8"
    but: tuple[str, ...] = ()
    first: int = 0
    fast: bool = True
    attention: bool = False
    centred: bool = False
    mean: bool = False
    once: bool = False
    redraw: bool = False
    until: float = 1.0


@dataclass(frozen=True)
class Exact:
    """What is kept, and what the gradient of a kept token knows of.

    Attributes:
        keep, slope: share of the blocks, and how much more of them the last layer keeps than the first.
        block: tokens of a block.
        keys: those of which a kept query's gradient knows: "kept", "every" or "complete" (every one's, with gradient).
        compensated: with `keys` "every", gradients that reach a key or value from another block's queries are
            multiplied by what makes up for the blocks that are not kept (as SpaCO does for chunks, arXiv 2505.16710).
        dense: decoder layers that keep everything.
        float8: None computes in the model's precision.
    """

    keep: float
    slope: float = 0.0
    block: int = 64
    keys: Literal["kept", "every", "complete"] = "kept"
    compensated: bool = False
    dense: tuple[int, ...] = (0, -1)
    float8: Float8 | None = None


@dataclass
class _Step:
    """What one training step shares among layers."""

    settings: Exact
    random: torch.Generator
    steps: int | None
    number: int = -1
    scores: torch.Tensor | None = None
    labelled: torch.Tensor | None = None
    phase: Phase | None = None
    factor: float = 1.0
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    means: dict[nn.Module, torch.Tensor] = field(default_factory=dict)

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        ids = kwargs["input_ids"]
        blocks = -(-ids.shape[1] // self.settings.block)
        # Drawn on the CPU, so that the choice does not depend on the device.
        self.scores = torch.rand(ids.shape[0], blocks, generator=self.random).to(ids.device)
        self.factor = 2 ** torch.rand((), generator=self.random).item()
        self.labelled = labelled(kwargs.get("labels"))
        self.chosen.clear()
        self.number += 1

    def tokens(self, index: int, layers: int, length: int) -> torch.Tensor:
        """[B, K]: tokens that layer `index` keeps, ascending; the same blocks in every layer that keeps as many."""
        share = self.settings.keep + self.settings.slope * (index / max(layers - 1, 1) - 0.5)
        blocks = self.scores.shape[1]
        count = min(max(math.ceil(blocks * share - 1e-6), 2), blocks)
        if count not in self.chosen:
            ranked = rank(self.scores, None, self.labelled, length, self.settings.block, count)
            self.chosen[count] = take(ranked, count, self.settings.block, length)
        return self.chosen[count]

    def compensation(self, kept: int) -> float:
        """Inverse probability that a block is kept where another one is, for so many kept tokens."""
        count = kept / self.settings.block
        return (self.scores.shape[1] - 1) / max(count - 1, 1)

    def rounds(self, layer: int) -> Float8 | None:
        """What is rounded in a layer now."""
        float8 = self.settings.float8
        if float8 is None or self.phase is None or layer < float8.first:
            return None
        if self.steps is not None and self.number >= round(float8.until * self.steps):
            return None
        return float8

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def labelled(labels: torch.Tensor | None) -> torch.Tensor | None:
    """[B, S] -> [B, S] bool: tokens that carry a label, and those that predict one."""
    if labels is None:
        return None
    own = labels != -100
    return own | F.pad(own[:, 1:], (0, 1))


def quantise(rows: torch.Tensor, factor: float = 1.0, to: Format = "float8") -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (rounded [N, K], scales [N, 1]); the largest magnitude of a row becomes the format's / factor."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12) * (factor / LARGEST[to])
    scaled = rows.float() / scale
    return (scaled.to(torch.float8_e4m3fn) if to == "float8" else scaled.round().to(torch.int8)), scale


def common_row(rows: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [K]: the mean row, where each counts by the inverse of its largest magnitude.

    The first token of a text is some thousand times as large as the others: it alone would decide a plain mean.
    """
    sample = rows[::4].float()
    share = 1 / sample.abs().amax(1, keepdim=True).clamp_min(1e-30)
    return ((sample * share).sum(0) / share.sum()).to(rows.dtype)


def product(
    x: torch.Tensor, weight: torch.Tensor, how: Float8, factor: float, mean: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N] in x's dtype, rounded.

    Args:
        mean: for `Float8.mean`, [K] float32; that of x's rows unless given.
    """
    flat = x.flatten(0, -2)
    if how.centred:
        common = common_row(flat)
        rest = product(flat - common, weight, replace(how, centred=False), factor)
        return (rest + F.linear(common, weight.to(common.dtype))).to(x.dtype).unflatten(0, x.shape[:-1])
    rows, row_scale = quantise(flat, to=how.inputs_to)
    columns, column_scale = quantise(weight, factor if how.redraw else 1.0, how.weights_to)
    formats = {to for to, used in ((how.weights_to, how.weights), (how.inputs_to, how.inputs)) if used}
    if how.weights and how.inputs and x.is_cuda and formats == {"float8"}:
        out = torch._scaled_mm(
            rows, columns.contiguous().t(), row_scale, column_scale.t(), out_dtype=torch.bfloat16,
            use_fast_accum=how.fast,
        )  # fmt: skip
    elif how.weights and how.inputs and "int8" in formats:
        # Both formats' numbers are bfloat16's too; the scales come after the sum.
        half = torch.bfloat16 if x.is_cuda else torch.float32
        out = F.linear(rows.to(half), columns.to(half)).float() * row_scale * column_scale.t()
    else:
        left = (rows.float() * row_scale).to(flat.dtype) if how.inputs else flat
        right = (columns.float() * column_scale).to(flat.dtype) if how.weights else weight.to(flat.dtype)
        out = F.linear(left, right)
    if how.mean and how.weights:
        lost = weight.float() - columns.float() * column_scale
        out = out + (lost @ (flat.float().mean(0) if mean is None else mean)).to(out.dtype)
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, how: Float8, forward: bool, gradient: bool, factor, mean=None
    ):
        ctx.save_for_backward(weight)
        ctx.how, ctx.gradient, ctx.factor = how, gradient, factor
        return product(x, weight, how, factor, mean) if forward else F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        (weight,) = ctx.saved_tensors
        if ctx.gradient:
            how = replace(ctx.how, weights_to="float8", inputs_to="float8", centred=False, mean=False)
            return product(grad, weight.t(), how, ctx.factor), None, None, None, None, None, None
        return grad @ weight, None, None, None, None, None, None


def _linear(step: _Step, layer: int, name: str, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    how = step.rounds(layer)
    if how is None or name in how.but:
        return F.linear(x, module.weight, module.bias)
    if how.once and module not in step.means:
        step.means[module] = x.detach().flatten(0, -2)[:1024].float().mean(0)
    mean = step.means.get(module)
    if step.phase == "forward":
        return product(x, module.weight, how, step.factor, mean) if how.forward else F.linear(x, module.weight)
    forward, gradient = (how.dense, how.dense) if step.phase == "dense" else (how.recompute, how.gradient)
    return _Product.apply(x, module.weight, how, forward, gradient, step.factor, mean)


def _gather(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return x.gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))


def _put(every: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The values of `every` [B, S, H], with the gradient of `kept` [B, K, H]."""
    index = tokens[..., None].expand(-1, -1, every.shape[-1])
    return every.scatter(1, index, kept + (every.gather(1, index) - kept).detach())


def _heads(attention: LlamaAttention, x: torch.Tensor, names: str, rotary: tuple[torch.Tensor, torch.Tensor]) -> list:
    """Projections named by `names` out of "qkv", [B, heads, S, D] each, with q and k rotated."""
    found = []
    for name in names:
        out = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        found.append(out if name == "v" else apply_rotary_pos_emb(out, out, *rotary)[0])
    return found


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    float8: Float8 | None = None,
) -> torch.Tensor:
    """[B, heads, K, D] -> [B, K, heads * D]; `seen` [B, 1, K, S] says which keys a query may see; None is causal."""
    if float8 is not None and float8.attention:
        out = (float8_attention.attention if query.is_cuda else float8_attention.reference)(query, key, value)
        out = out.to(query.dtype)
    elif seen is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    else:
        # Repeated, because the kernels that take a mask know no grouped queries.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return out.transpose(1, 2).flatten(2)


def _sparse_layer(layer: LlamaDecoderLayer, step: _Step, hidden: torch.Tensor, tokens: torch.Tensor, rotary: Any):
    attention = layer.self_attn
    with torch.no_grad(), step.within("forward"):
        query, all_keys, all_values = _heads(attention, layer.input_layernorm(hidden), "qkv", rotary)
        every = attention.o_proj(_attend(query, all_keys, all_values, None, step.settings.float8))
    with step.within("recompute"):
        own_rotary = tuple(_gather(x.expand(tokens.shape[0], -1, -1), tokens) for x in rotary)
        query, key, value = _heads(attention, layer.input_layernorm(_gather(hidden, tokens)), "qkv", own_rotary)
        seen = None
        if step.settings.keys != "kept":
            if step.settings.keys == "complete":
                constant = layer.input_layernorm(hidden.detach())
                all_keys, all_values = _heads(attention, constant, "kv", rotary)
            index = tokens[:, None, :, None].expand(key.shape)
            own = key, value
            factor = step.compensation(tokens.shape[1]) if step.settings.compensated else 1.0
            key, value = (
                past.scatter(2, index, now.detach() + factor * (now - now.detach()))
                for past, now in zip((all_keys, all_values), own, strict=True)
            )
            seen = torch.arange(key.shape[2], device=key.device) <= tokens[:, None, :, None]
            if step.settings.compensated:
                # Keys of a query's own block, which is kept for sure, stand a second time: their gradient stays.
                block = tokens // step.settings.block
                places = torch.arange(key.shape[2], device=key.device) // step.settings.block
                same = block[:, None, :, None] == block[:, None, None, :]
                near = same & (tokens[:, None, None, :] <= tokens[:, None, :, None])
                seen = torch.cat([seen & (places != block[:, None, :, None]), near], dim=3)
                key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), own, strict=True))
        kept = attention.o_proj(_attend(query, key, value, seen))
    hidden = hidden + _put(every, tokens, kept)
    with torch.no_grad(), step.within("forward"):
        every = layer.mlp(layer.post_attention_layernorm(hidden))
    with step.within("recompute"):
        kept = layer.mlp(layer.post_attention_layernorm(_gather(hidden, tokens)))
    return hidden + _put(every, tokens, kept)


@contextmanager
def exact(
    model: nn.Module,
    settings: Exact,
    seed: int = 0,
    steps: int | None = None,
    choose: Callable[[int], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Train a Llama (with adapters or not) so within the block; evaluation is left alone.

    Args:
        steps: of the whole training, for `Float8.until`.
        choose: tokens [B, K] of a layer, instead of a random choice.

    Raises:
        ValueError: the batch is padded or packed.
    """
    head = next(m for m in model.modules() if isinstance(m, LlamaForCausalLM))
    layers = list(head.model.layers)
    dense = {i % len(layers) for i in settings.dense}
    step = _Step(settings, torch.Generator().manual_seed(seed), steps)
    handle = head.register_forward_pre_hook(step.begin, with_kwargs=True)

    def run(index: int, original: Callable, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any):
        layer = layers[index]
        if not layer.training:
            return original(hidden_states, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError("plain_exact is written for batches without padding or packing")
        if index in dense:
            with step.within("dense"):
                return original(hidden_states, attention_mask=attention_mask, **kwargs)
        tokens = choose(index) if choose else step.tokens(index, len(layers), hidden_states.shape[1])
        return _sparse_layer(layer, step, hidden_states, tokens, kwargs["position_embeddings"])

    sparse = {layer: functools.partial(run, index, layer.forward) for index, layer in enumerate(layers)}
    try:
        with forwards({**_linears(layers, step), **sparse}):
            yield
    finally:
        handle.remove()


@contextmanager
def in_float8(model: nn.Module, how: Float8) -> Iterator[None]:
    """Evaluation in float8: what rounding costs a model that did not learn with it."""
    head = next(m for m in model.modules() if isinstance(m, LlamaForCausalLM))
    step = _Step(Exact(1.0, float8=how), torch.Generator(), None, phase="forward")
    with forwards(_linears(list(head.model.layers), step)):
        yield


def _linears(layers: list[nn.Module], step: _Step) -> dict[nn.Module, Callable]:
    """The frozen linear layers, and how each computes as the step says."""
    found: dict[nn.Module, Callable] = {}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if type(module) is nn.Linear and not module.weight.requires_grad:
                plain = name.removesuffix(".base_layer").rpartition(".")[2]
                found[module] = functools.partial(_linear, step, index, plain, module)
    return found
