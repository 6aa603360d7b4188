"""What LoRA steps of a model take, from its shapes alone: peak memory, relative time, the longest context that fits.

A step is that of `lemo-fx train`: bfloat16 weights, adapters in float32 under autocast, activation checkpointing,
decoder layers compiled, the loss in segments, one sequence. Its parts were fitted to the committed measurements
(benchmarks/bench, benchmarks/model: one NVIDIA H200, torch 2.11), with which tests/cli/test_estimate.py compares it,
and those of benchmarks/longest and benchmarks/scaling. A plan's `sequence_parts` are GPUs that share the sequence.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lemo_fx.cli.load import from_config, read_config
from lemo_fx.config import PRESETS, LemoConfig
from lemo_fx.errors import ConfigError, UnsupportedModelError
from lemo_fx.graph.anatomy import decoder_layers, is_softmax_attention, longest_context
from lemo_fx.runtime.branch import MOST_SEGMENTS, SEGMENT
from lemo_fx.runtime.loss import segment_rows

AS_IT_IS, LORA, QLORA = "as it is", "LoRA", "QLoRA"
Precision = Literal["float32", "autocast", "bfloat16"]

# Bytes.
WORKSPACE = 65e6
"""Of cuBLAS and the like, whatever the model."""
TRAINED = 16
"""A trained parameter: float32 weight, gradient and AdamW's two moments."""
LOGIT = 12
"""A logit of a head that is not segmented, or of one segment: bfloat16 and float32, each with its gradient."""
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256
"""A weight in bitsandbytes' NF4 with doubly quantised scales."""
CONTEXT = 1e9
"""What CUDA and its libraries take beside tensors."""
SPARE = 0.03
"""Of the card, that an allocator with expandable segments cannot use."""

# Floating-point operations a second of one H200, each with the elementwise work around it: ratios are all that is used.
MATRICES, ATTENTION, HEAD = 816e12, 570e12, 529e12
FLOAT8 = 0.536
"""Time of the products in float8, where the GPU has them."""
ALL_LINEAR = 11.6e-12
"""Seconds a token, layer and inner feature that adapters beside the MLP's matmuls take under autocast."""
BESIDE_FLOAT8 = 2.29
"""As a multiple of it, what they and the rounding of their inputs take beside matmuls in float8."""
UNCOMPILED = 1.29
"""Time of the plain script, which also computes full logits."""
TIMED_FROM = 2.5e9
"""Parameters under which the host, not the GPU, sets the pace: no time is estimated."""


@dataclass(frozen=True)
class Shape:
    """What counts of a model. Widths in features; `kv` of keys alone.

    Attributes:
        linear: parameters of the decoder layers' matrices; other: all the rest.
        sides: input plus output features of every matrix that adapters may go beside, over all layers.
        gated: whether the MLP multiplies two products.
        longest: tokens that the model reads, None where it does not say.
    """

    layers: int
    hidden: int
    inner: int
    query: int
    kv: int
    heads: int
    vocabulary: int
    linear: int
    other: int
    sides: int
    attention_sides: int
    gated: bool
    longest: int | None

    @property
    def parameters(self) -> int:
        """All of them, without adapters."""
        return self.linear + self.other


def shape_of(path: Path) -> Shape:
    """Read off a model that is built without memory.

    Raises:
        InputError: no causal language model.
        UnsupportedModelError: its layers are of another build than those that were measured.
    """
    config = read_config(path)
    with torch.device("meta"):
        return shape_of_model(from_config(path, config))


def shape_of_model(model: Any) -> Shape:
    """As `shape_of`, of a model, which may lie on the meta device."""
    config = model.config.get_text_config()
    layers = [layer for _, layer in decoder_layers(model)]
    if not layers or getattr(config, "do_layer_norm_before", True) is False:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers of the measured build (a norm, attention, a norm, an MLP): "
            "measure it with lemo-fx bench"
        )
    first = layers[0]
    mixers = [module for module in first.modules() if is_softmax_attention(module)]
    kinds = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}
    matrices = [(name, m) for name, m in first.named_modules() if isinstance(m, torch.nn.Linear)]
    of_attention = [m for name, m in matrices if any(m is part for mixer in mixers for part in mixer.modules())]
    of_mlp = [m for _, m in matrices if not any(m is part for part in of_attention)]
    wide = sum(p.numel() for p in first.parameters() if p.dim() > 1)
    counted = sum(m.weight.numel() for _, m in matrices)
    if len(mixers) != 1 or len(kinds) > 1 or not of_mlp or counted < 0.99 * wide:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers that differ, experts, or matrices that are no nn.Linear, which this "
            "estimate was never compared with: measure it with lemo-fx bench"
        )
    hidden, down = model.get_input_embeddings().embedding_dim, of_mlp[-1]
    ups = sum(m.out_features for m in of_mlp[:-1])
    heads = config.num_attention_heads
    head_dim = getattr(mixers[0], "head_dim", None) or hidden // heads
    everything = sum(p.numel() for p in model.parameters())
    linear = counted * len(layers)
    return Shape(
        layers=len(layers),
        hidden=hidden,
        inner=down.in_features,
        query=heads * head_dim,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        heads=heads,
        vocabulary=model.get_input_embeddings().num_embeddings,
        linear=linear,
        other=everything - linear,
        sides=len(layers) * sum(m.in_features + m.out_features for _, m in matrices),
        attention_sides=len(layers) * sum(m.in_features + m.out_features for m in of_attention),
        gated=ups >= 2 * down.in_features,
        longest=longest_context(model.config),
    )


@dataclass(frozen=True)
class Adapters:
    """LoRA's: rank, and whether every linear layer has them or only attention's; how they compute."""

    rank: int = 16
    everywhere: bool = True
    precision: Precision = "autocast"


@dataclass(frozen=True)
class Estimate:
    """Of one plan at one length.

    Attributes:
        peak_bytes: most that tensors take, on each GPU.
        host_bytes: what waits in the host's memory, of all GPUs.
        seconds: of a step, on one H200; None where that is not known. Only ratios are meant.
        without_float8: the same on a GPU without float8 products.
    """

    plan: str
    context: int
    peak_bytes: float
    host_bytes: float
    seconds: float | None
    without_float8: float | None


def _keeps(plan: LemoConfig, layers: int) -> list[float]:
    """Kept share by layer, 1 for dense ones."""
    if not plan.eliminations:
        return [1.0] * layers
    site = plan.attention
    if site is None or site != plan.mlp or site.eliminated != "exact" or site.threshold is not None:
        raise ConfigError("estimate knows plans with eliminated='exact' and one keep for attention and MLP")
    return [1.0 if plan.is_dense(i, layers) else float(site.at_layer("keep", i, layers) or 1) for i in range(layers)]


def _pieces(tokens: int) -> int:
    """In which an MLP is recomputed, of so many tokens on a GPU."""
    return min(MOST_SEGMENTS, 1 << max(0, math.ceil(math.log2(tokens / SEGMENT))))


def _on_each(context: int, plan: LemoConfig | None) -> int:
    """Tokens of a sequence on each GPU."""
    return math.ceil(context / (plan.sequence_parts if plan else 1))


def _saved(shape: Shape, context: int, plan: LemoConfig) -> list[float]:
    """Tensors of the stream's width that a layer saves for the backward: the rows of either branch.

    A dense layer that is not rewritten saves its input alone. The last one always is; all are for float8, and for
    offload and shared sequences, where one in bfloat16 still saves its input alone while its MLP is in one piece.
    """
    keeps = _keeps(plan, shape.layers)
    in_pieces = _pieces(_on_each(context, plan)) > 1
    rewritten = plan.float8_everywhere or ((plan.offload or plan.sequence_parts > 1) and in_pieces)
    return [2 * keep if keep < 1 or rewritten or i == shape.layers - 1 else 1 for i, keep in enumerate(keeps)]


def host(shape: Shape, context: int, plan: LemoConfig | None) -> float:
    """Bytes that wait in the host's memory, of all GPUs that share the sequence."""
    return context * 2 * shape.hidden * sum(_saved(shape, context, plan)) if plan and plan.offload else 0.0


def peak(
    shape: Shape, context: int, plan: LemoConfig | None, name: str = "", adapters: Adapters | None = None
) -> float:
    """Bytes that tensors take at most in a step, on each GPU.

    Args:
        context: tokens of a sequence.
        plan: of `PRESETS`' kind; None for LoRA with no elimination.
        name: `AS_IT_IS` for full logits, `QLORA` (or a name that ends so) for matrices in NF4.
    """
    adapters = adapters or Adapters()
    hidden, inner, query, kv = (2 * width for width in (shape.hidden, shape.inner, shape.query, shape.kv))
    quantised = name.endswith(QLORA)
    saves = [] if plan is None else _saved(shape, context, plan)
    context = _on_each(context, plan)
    pieces = _pieces(context)
    weights = (NF4 if quantised else 2) * shape.linear + 2 * shape.other
    sides = shape.sides if adapters.everywhere else shape.attention_sides
    fixed = weights + TRAINED * adapters.rank * sides + WORKSPACE
    if quantised:
        # One matrix is unpacked at a time, and its gradient for the input is computed from it once more. A plan
        # was seen to take as much more as if every piece of the MLP held its matrices unpacked.
        fixed += (2 if plan is None else 2 + 3 * pieces) * 2 * shape.hidden * shape.inner
    logits = segment_rows(context, shape.vocabulary, "auto") if name != AS_IT_IS else context
    head = LOGIT * logits * shape.vocabulary
    # The last layer's output, the head's input, its gradient.
    ends = 3 * hidden
    if plan is None:
        saved: float = shape.layers * hidden
        # Tensors of the stream's width that a layer's backward holds.
        stream = 2 if adapters.everywhere else {"float32": 5, "autocast": 3, "bfloat16": 2}[adapters.precision]
        layer = 2 * kv + _wide(shape, adapters) * inner + stream * hidden
        if adapters.everywhere:
            layer += 2 * query
        return fixed + context * (saved + ends) + max(head, context * layer)
    float8 = plan.float8_everywhere
    # Offloaded, the last layer's rows and those of the one before it are here when the backward begins.
    saved = hidden * sum(saves[-2 if plan.offload else 0 :])
    attention = (11 if float8 or adapters.everywhere else 13.5) * query
    mlp = (13.2 if float8 else 12.4) * inner if adapters.everywhere else (_wide(shape, adapters) + 3) * inner
    return fixed + context * (saved + ends) + max(head, context * max(attention, mlp / pieces))


def _wide(shape: Shape, adapters: Adapters) -> float:
    """Tensors of the MLP's inner width that a layer's backward holds, more of them with adapters beside them."""
    products = 4 if shape.gated else 2.5
    return 2 * products if adapters.everywhere else products


def seconds(
    shape: Shape, context: int, plan: LemoConfig | None, adapters: Adapters | None = None, has_float8: bool = True
) -> float:
    """A step's time on one H200. Matrices: forward, recompute and the gradient of the input; attention's takes 2.5."""
    adapters = adapters or Adapters()
    matrices = 2 * shape.linear / MATRICES
    attention = 2 * shape.query * shape.layers * context / ATTENTION
    beside = ALL_LINEAR * shape.inner * shape.layers / 3 if adapters.everywhere else 0.0
    head = 4 * shape.hidden * shape.vocabulary / HEAD
    if plan is None:
        return context * (3 * matrices + 4.5 * attention + 3 * beside + head)
    if plan.float8_everywhere and has_float8:
        matrices, beside = FLOAT8 * matrices, BESIDE_FLOAT8 * beside
    keeps = _keeps(plan, shape.layers)
    kept, squared = statistics.fmean(keeps), statistics.fmean(keep**2 for keep in keeps)
    forward = matrices + attention + beside + head
    return context * (forward + 2 * (matrices + beside) * kept + 3.5 * attention * squared)


# Preset "dense" is LoRA.
NAMED = {name: plan for name, plan in PRESETS.items() if name != "dense"}
Plans = dict[str, LemoConfig | None]
PLANS: Plans = {AS_IT_IS: None, LORA: None, **NAMED, QLORA: None, f"careful, {QLORA}": PRESETS["careful"]}


def plans(share: int = 1, offload: bool = False) -> Plans:
    """What is compared where so many GPUs share a sequence, and where what layers save waits in the host's memory.

    Only a transformed model's sequences are shared, so that LoRA's layers are rewritten too, with nothing eliminated.
    """
    shared = {LORA: PRESETS["dense"], **NAMED}
    found = {n: replace(plan, sequence_parts=share) for n, plan in shared.items()} if share > 1 else PLANS
    return {name: replace(plan, offload=True) if offload and plan else plan for name, plan in found.items()}


def estimate(shape: Shape, context: int, rank: int = 16, compared: Plans = PLANS) -> list[Estimate]:
    """Every plan at one length."""
    adapters = Adapters(rank)
    found = []
    for name, plan in compared.items():
        known = shape.parameters >= TIMED_FROM
        factor = UNCOMPILED if name == AS_IT_IS else 1
        times = [
            factor * seconds(shape, context, plan, adapters, float8) if known else None for float8 in (True, False)
        ]
        taken = peak(shape, context, plan, name, adapters)
        found.append(Estimate(name, context, taken, host(shape, context, plan), *times))
    return found


def usable(gpu: float) -> float:
    """Bytes that tensors may take of a card's."""
    return (1 - SPARE) * gpu - CONTEXT


STEP = 1024


def longest(shape: Shape, name: str, gpu: float, rank: int = 16, compared: Plans = PLANS) -> int:
    """Most tokens, in steps of `STEP`, that a plan trains on with a card of so many bytes; 0 where none do."""
    low, high = 0, 1 << 14
    while low + 1 < high:
        middle = (low + high) // 2
        fits = peak(shape, middle * STEP, compared[name], name, Adapters(rank)) <= usable(gpu)
        low, high = (middle, high) if fits else (low, middle)
    return low * STEP
