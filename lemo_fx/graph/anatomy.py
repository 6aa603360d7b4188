"""Where a causal language model has its parts: found once, and handed on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lemo_fx.errors import UnsupportedModelError

MASKED_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Attention implementations that are told what may attend to what by a mask. Others (flash attention) read cu_seqlens
or restarting position_ids instead, which therefore must count kept tokens."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model, each under its name in the model as it was given.

    Attributes:
        model: as it was given, in whatever wrappers (PEFT's).
        head: the transformers model that owns the output projection; None where the model has none.
        decoder: what turns embeddings into hidden states; of a vision-language model the text decoder alone.
        layers: (name, layer) of the decoder's layers with causal softmax attention among them, in order.
    """

    model: nn.Module
    head: nn.Module | None
    decoder: nn.Module
    layers: list[tuple[str, nn.Module]]

    @property
    def base(self) -> nn.Module:
        """The transformers model under the wrappers, with its head where it has one."""
        return self.model if self.head is None else self.head

    @property
    def config(self) -> Any:
        """The model's config; None where it has none."""
        return getattr(self.base, "config", None)

    @property
    def head_name(self) -> str | None:
        """Name of the head in the model; empty where the model is the head itself."""
        return None if self.head is None else next(n for n, m in self.model.named_modules() if m is self.head)

    @property
    def holders(self) -> list[nn.Module]:
        """The modules that hold the decoder layers, the model itself first."""
        names = self.layers[0][0].split(".") if self.layers else []
        return [self.model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Find a model's parts. What has no causal decoder layers has an empty list of them."""
    head = causal_model(model)
    decoder = _decoder(model if head is None else head)
    names = {module: name for name, module in model.named_modules()}
    layers = [(f"{names[layers]}.{i}", layer) for layers in _layer_list(decoder) for i, layer in enumerate(layers)]
    return Anatomy(model, head, decoder, layers)


def _decoder(model: nn.Module) -> nn.Module:
    """The text decoder by transformers' own account; the model where there is none.

    What is merely called so is no decoder: ModernBERT's output projection.
    """
    for module in model.modules():
        if callable(getattr(module, "get_decoder", None)):
            decoder = module.get_decoder()  # type: ignore[operator]
            holds_layers = isinstance(decoder, nn.Module) and any(
                isinstance(m, nn.ModuleList) for m in decoder.modules()
            )
            return decoder if holds_layers else module
    return model


def _layer_list(decoder: nn.Module) -> list[nn.ModuleList]:
    """The one list of the decoder's layers: of several the nearest to the decoder, of equally near ones the longest.

    A decoder's encoders lie deeper (Phi-4-multimodal's vision layers call themselves causal).
    """
    found: list[tuple[int, int, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
            and any(is_softmax_attention(m) and getattr(m, "is_causal", False) for m in module.modules())
        ):
            found.append((name.count("."), -len(module), module))
    return [min(found, key=lambda entry: entry[:2])[2]] if found else []


def why_no_layers(anatomy: Anatomy) -> str:
    """Why a model has no decoder layers that lemo_fx knows, in words that name what it has instead."""
    lists = [m for m in anatomy.decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [layers for layers in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)]
    if not lists:
        return "it has no list of transformers' decoder layers (GradientCheckpointingLayer)"
    layers = max(lists, key=len)
    layer = type(layers[0]).__name__
    for module in layers.modules():
        if is_softmax_attention(module):
            return f"the attention of its layers, {type(module).__name__} in {layer}, is not causal (is_causal)"
    own = [type(m).__name__ for m in layers.modules() if "attention" in type(m).__name__.lower()]
    if own:
        return (
            f"{own[0]} in its layers ({layer}) computes attention by itself, not through transformers' attention "
            "interface, so kept tokens cannot be told what they may attend to"
        )
    return f"its layers ({layer}) have no softmax attention"


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The causal decoder layers of a model by name, in order."""
    return anatomy_of(model).layers


def causal_model(model: nn.Module) -> nn.Module | None:
    """The transformers model that owns the output projection, under any wrapper."""
    for module in model.modules():
        if hasattr(module, "loss_function") and callable(getattr(module, "get_output_embeddings", None)):
            head = module.get_output_embeddings()  # type: ignore[operator]
            if head is not None and any(child is head for child in module.children()):
                return module
    return None


def is_softmax_attention(module: nn.Module) -> bool:
    """Whether a module computes attention through transformers' interface, the one mixer that lemo_fx supports."""
    forward: Callable = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def implementation_of(module: nn.Module) -> str | None:
    """Name of the attention implementation that a module's config asks for; None where it has no such config."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def window_of(attention: nn.Module) -> int | None:
    """Width of an attention's sliding window: its own, or where it has no such attribute, what its config says."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[return-value]
    return getattr(getattr(attention, "config", None), "sliding_window", None)


def require_model(model: object, function: str) -> None:
    """Raises: UnsupportedModelError where a name, a path or nothing stands in the place of a model."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{function} takes a loaded model, not {type(model).__name__}: AutoModelForCausalLM.from_pretrained(...)"
        )
    if isinstance(model, nn.ModuleList | nn.ModuleDict):
        raise UnsupportedModelError(
            f"{function} takes a model that can be called, not a {type(model).__name__} of its parts"
        )


def text_config(config: Any) -> Any:
    """The part of a transformers config that is about the text decoder; the config itself where there are no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def config_in_words(config: Any) -> str:
    """Equal for configs that say the same, whatever is in them: a config that holds tensors has no JSON."""
    return repr(config.to_dict() if hasattr(config, "to_dict") else config)


def longest_context(config: Any) -> int | None:
    """The tokens that a model of this transformers config reads at most; None where it does not say."""
    text = text_config(config)
    # Whisper's decoder has another word for it.
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    return longest if isinstance(longest, int) else None


def has_rope(config: Any) -> bool:
    """Whether a model of this config rotates by positions, so that it can be made to read more of them."""
    text = text_config(config)
    return any(getattr(text, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
