"""A tiny random model of every causal-language-model type that the installed transformers has, built from its config.

What makes a type what it is stays: its kinds of layers in turn, its experts, its windows. Only sizes shrink.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HEADS, KEY_HEADS, HEAD, HIDDEN, INNER, VOCABULARY, WINDOW = 5, 4, 2, 8, 32, 64, 128, 16

SIZES: tuple[tuple[str, Any], ...] = (
    (r"(num|n)_hash_layers|first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"(num|n)_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers|mtp_num_layers|num_kv_shared_layers", 0),
    (r"(num_hidden_layers|n_layers?|num_layers|depth|(num_)?(de|en)coder_layers|.*_num_hidden_layers)", LAYERS),
    (r"decoder_num_layers|num_(en|de)coder_layers|encoder_num_layers|layers", LAYERS),
    (r"linear_num_key_heads", KEY_HEADS),
    (r"linear_num_value_heads", HEADS),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 2 * HIDDEN // HEAD),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)|mamba_d_state", HEAD),
    (r"mamba_n_groups|n_groups", 1),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"lru_width", HIDDEN),
    (r"(mamba_|attention_)?chunk_size", 16),
    (r".*(num_key_value_heads|num_kv_heads|num_attention_groups|n_head_kv|multi_query_group_num)", KEY_HEADS),
    (r".*(num_attention_heads|num_heads|n_heads?|attention_heads|encoder_heads|decoder_heads)", HEADS),
    (r".*num_query_heads", HEADS),
    (r"index_n_heads|index_head_dim|index_topk", 8),
    (r".*(rope_head_dim|nope_head_dim|v_head_dim|qk_head_dim)", HEAD),
    (r".*(head_dim|head_size|kv_channels|mamba_d_head|head_width)", HEAD),
    (r"rotary_dim", 4),
    (r".*lora_(rank|dim)|.*low_rank.*dim|.*_lora_rank", 16),
    (r"(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r".*(num_experts_per_tok(en)?|top_?k(_experts)?|num_selects|moe_k|experts_per_token|num_experts_per_token)", 2),
    (r"n_group|topk_group|topk_method_group|num_expert_group|num_expert_groups", 1),
    (r".*(num|n)(_local|_routed)?_experts|moe_num_experts|num_moe_experts|expert_num", 4),
    (r"sliding_window|local_attention_window|attention_window_size|sliding_window_size|window_size", WINDOW),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length|max_seq_length", 512),
    (r"original_max_position_embeddings", 512),
    (r"block_size", 16),
    (r"(text_)?vocab_size(_per_layer_input)?|text_vocab_size", VOCABULARY),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|d_ff|n_inner|moe_ffn_dim|mlp_dim|block_ff_dim)", INNER),
    (r"expert_dim|block_auto_adjust_ff_dim_size", INNER),
    (r"hidden_size_per_layer_input|.*embedding_size", HEAD),
    (r"(hidden_size|hidden_dim|d_model|n_embd|embed_dim|word_embed_proj_dim|model_dim|width|embed_size)", HIDDEN),
    (r".*(text|cross_attention|encoder)_hidden_size|out_hidden_size|projection_dim|projector_hidden_size", HIDDEN),
    (r".*(dropout|drop_?out_rate|pdrop|dropout_prob|dropout_p|drop_path_rate|layerdrop|jitter_noise)(_rate)?", 0.0),
    (r"router_jitter_noise|input_jitter_noise|dropout_rate", 0.0),
    (r"initializer_range", 0.1),
)
"""Setting by name (a pattern that the whole name matches; the first that does) -> its value in a tiny model."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "decoder_start_token_id": 1}

ROPE = {"rope_type": "default", "rope_theta": 1e4}

OWN: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 96, "audio_token_offset": 104},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert": {"is_decoder": True},
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGAZ": 121, "IMGIMGBZ": 122}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "dbrx": {"attn_config": {"kv_n_heads": KEY_HEADS, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": INNER},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": INNER},
    "dory": {
        "num_hidden_layers": LAYERS,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122}},
    "gemma4_text": {"global_head_dim": 16, "hidden_size_per_layer_input": HEAD, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "blip_2_qformer": {"cross_attention_frequency": 1},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 2, 3, 4],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"head_dim": HEAD},
    "hunyuan_vl_text": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2 + ["conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2 + ["conv"]},
    "longcat_flash": {"qk_head_dim": 2 * HEAD},
    "mamba2": {"num_heads": 2 * HIDDEN // HEAD},
    "ministral": {"head_dim": HEAD},
    "mistral4": {"head_dim": 2 * HEAD},
    "molmo2_adapter": {"vision_feature_layer": [3, 1]},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": KEY_HEADS},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": VOCABULARY,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {"is_decoder": True},
    "step3p5": {"sliding_window": WINDOW},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN, "codebook_size": 8},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need besides, by the model type of a config or of one of its parts."""


def model_types() -> dict[str, str]:
    """Model type -> the class of its causal language model, with images where it has them."""
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return dict(sorted({**modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **images}.items()))


def tiny_config(model_type: str) -> Any:
    """The type's own config with small sizes, those of its text, image and sound parts too."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_settings(config_class()))


def tiny_model(model_type: str, attention: str | None = None) -> nn.Module:
    """A random model in float32 in train mode.

    Raises:
        Exception: whatever the type's own code raises at these sizes.
    """
    names = model_types()[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = model_class._from_config(config, **({"attn_implementation": attention} if attention else {}))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            # Biases start at 0 and norms at 1: make every parameter matter.
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.float().train()


def _settings(default: Any) -> dict[str, Any]:
    """Settings of a config's class that make it tiny."""
    given = {name: value for name, value in default.to_dict().items() if not name.startswith("_")}
    for name in getattr(default, "attribute_map", {}):
        with contextlib.suppress(AttributeError):
            given.setdefault(name, getattr(default, name, None))
    accepted = set(inspect.signature(type(default).__init__).parameters) | set(
        getattr(default, "__dataclass_fields__", ())
    )
    found: dict[str, Any] = {}
    depths = [v for n, v in given.items() if isinstance(v, int) and _size(n) == LAYERS and v > 1]
    for name, value in given.items():
        part = vars(default).get(name)
        if isinstance(part, transformers.PretrainedConfig):
            found[name] = type(part)(**_settings(part))
        elif name in SPECIAL:
            found[name] = SPECIAL[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            found[name] = VOCABULARY - 1 - len([n for n in found if n.endswith(("token_id", "token_index"))])
        elif isinstance(value, list | tuple) and len(value) in depths and len(value) > 1:
            found[name] = _in_turn(value)
        elif isinstance(value, dict) and value and "rope" in name:
            found[name] = _rope(value, default)
        elif value is not None and not isinstance(value, bool | dict | list | str):
            size = _size(name)
            if size is not ... and size != value:
                found[name] = size
    for name in ("num_key_value_heads", "num_kv_heads"):
        heads = given.get("num_attention_heads")
        if name in found and given.get(name) == heads:
            found[name] = HEADS
    found |= OWN.get(default.model_type, {})
    fixed = {name for name, entry in vars(type(default)).items() if isinstance(entry, property) and not entry.fset}
    fixed |= {name for name, other in getattr(default, "attribute_map", {}).items() if other in fixed or other in found}
    known = accepted | given.keys() | OWN.get(default.model_type, {}).keys()
    return {name: value for name, value in found.items() if name in known and name not in fixed}


def _size(name: str) -> Any:
    return next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), ...)


def _in_turn(kinds: list[Any] | tuple[Any, ...]) -> list[Any]:
    """A list of one entry a layer, shortened: each kind in turn, in the order in which they first come."""
    each = list(dict.fromkeys(kinds))
    return [each[i % len(each)] for i in range(LAYERS)]


def _rope(value: dict[str, Any], config: Any) -> dict[str, Any]:
    """RoPE parameters of smaller heads: sections of the rotated half, one entry a channel."""
    half = max(
        1, int(HEAD * (value.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0))) // 2
    )
    # Where a config does not name the sections, the modelling code does, for its own sizes.
    found = dict(value)
    if "rope_type" in value:
        found["mrope_section"] = [half // 4, half // 4, half - 2 * (half // 4)]
    for name, entry in value.items():
        if isinstance(entry, dict):
            found[name] = _rope(entry, config)
        elif name == "original_max_position_embeddings":
            found[name] = 256
        elif name in ("short_factor", "long_factor"):
            found[name] = [1.0] * half
    return found
