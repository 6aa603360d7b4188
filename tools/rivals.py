"""Other ways to save work in long-context fine-tuning, as contexts around a Llama's training: for comparison only.

Each takes a model (with adapters, transformed or not) and holds within its `with` block; evaluation is left alone. None
of them is made for torch.compile.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from forwards import forwards
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo_fx.graph.anatomy import decoder_layers


@contextmanager
def _attention(replacement: Callable) -> Iterator[None]:
    """Another function in the place of "sdpa" for training; it gets the original as its first argument."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return original(module, query, *args, **kwargs)
        return replacement(original, module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def shifted_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """LongLoRA's shifted sparse attention (arXiv 2309.12307): groups of a quarter of the sequence, shifted by half a
    group in half of the heads. Unlike the published code, no group wraps around the end, so none sees its future.

    [B, heads, S, D] each, S a multiple of 8 -> ([B, S, heads, D], None).
    """
    length = query.shape[2]
    size = length // 4
    if attention_mask is not None or length % 8:
        raise ValueError("shifted groups are written for batches without padding whose length is a multiple of 8")
    plain, shifted = (tuple(x.chunk(2, dim=1)[half] for x in (query, key, value)) for half in (0, 1))
    edge = size // 2
    parts = [
        _grouped(*(x[:, :, a:b] for x in shifted), step, scaling)
        for a, b, step in ((0, edge, edge), (edge, length - edge, size), (length - edge, length, edge))
    ]
    out = torch.cat([_grouped(*plain, size, scaling), torch.cat(parts, dim=2)], dim=1)
    return out.transpose(1, 2).contiguous(), None


def _grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: int, scaling: Any) -> torch.Tensor:
    batch, _, length, width = query.shape
    fold = [x.unflatten(2, (length // size, size)).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = _causal(*fold, scaling)
    return out.unflatten(0, (batch, length // size)).transpose(1, 2).reshape(batch, -1, length, width)


@contextmanager
def shifted_groups(model: nn.Module) -> Iterator[None]:
    """`shifted_attention` in training."""
    with _attention(lambda original, *args, **kwargs: shifted_attention(*args, **kwargs)):
        yield


@contextmanager
def sparse_channels(model: nn.Module, share: float = 0.2) -> Iterator[None]:
    """The MLP backward of LeMo's artifact: the forward exact, the backward through the strongest channels only, in
    the layers of the upper half but the last."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if not self.training:
            return self.down_proj(inner)
        strength = inner.detach().abs().mean(dim=(0, 1))
        kept = strength >= strength.topk(round(share * strength.numel())).values[-1]
        return self.down_proj(torch.where(kept, inner, inner.detach()))

    layers = [layer for _, layer in decoder_layers(model)]
    chosen = [layer.mlp for layer in layers[len(layers) // 2 : -1]]
    with forwards({mlp: types.MethodType(forward, mlp) for mlp in chosen}):
        yield


@contextmanager
def full_keys(model: nn.Module) -> Iterator[None]:
    """Kept queries attend to every token's key and value, as TokenTune's do (arXiv 2501.18824); for `exact` attention.

    Keys and values of dropped tokens come from the forward without gradient.
    """
    chosen: dict[nn.Module, torch.Tensor] = {}
    every: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    named: dict[nn.Module, dict[str, Any]] = {}
    handles = []

    def note(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named[layer] = kwargs

    @torch.no_grad()
    def see_all(select: nn.Module, args: Any, tokens: torch.Tensor, layer: nn.Module) -> None:
        layer.self_attn(hidden_states=layer.input_layernorm(args[1]), **named.pop(layer))
        chosen[layer.self_attn] = tokens

    for _, layer in decoder_layers(model):
        if hasattr(layer, "lemo_attention_select"):
            hook = functools.partial(see_all, layer=layer)
            handles.append(layer.lemo_attention_select.register_forward_hook(hook))
            handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))

    def attention(original, module, query, key, value, attention_mask, scaling=None, **kwargs):
        if not torch.is_grad_enabled():
            every[module] = (key, value)
        if module not in chosen or not torch.is_grad_enabled():
            return original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        tokens = chosen.pop(module)
        index = tokens[:, None, :, None].expand(key.shape)
        key, value = (past.scatter(2, index, now) for past, now in zip(every.pop(module), (key, value), strict=True))
        # Repeated, because the kernels that take a mask know no grouped queries.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        seen = torch.arange(key.shape[2], device=key.device) <= tokens[:, None, :, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    try:
        with _attention(attention):
            yield
    finally:
        for handle in handles:
            handle.remove()
