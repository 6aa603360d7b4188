import pytest
import torch
import transformers
from tiny import LLAMA_LIKE, VOCABULARY, tiny, with_lora

import lemo_fx
from lemo_fx import LemoConfig
from lemo_fx.graph.anatomy import anatomy_of

TEXT = LLAMA_LIKE | {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}


def phi4_multimodal(vision_layers):
    """Its vision layers call themselves causal, and lie within the text decoder."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "crop_size": 28}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8}
    config = transformers.Phi4MultimodalConfig(
        **TEXT,
        eos_token_id=2,
        original_max_position_embeddings=512,
        vision_config=vision | {"patch_size": 14, "num_hidden_layers": vision_layers, "image_token_id": 90},
        audio_config=audio | {"nemo_final_size": 4, "audio_token_id": 91},
    )
    return transformers.Phi4MultimodalForCausalLM(config).train()


@pytest.mark.parametrize("vision_layers", [1, 5])
def test_the_text_decoder_is_rewritten_however_deep_its_encoders_are(vision_layers):
    model = phi4_multimodal(vision_layers)
    assert [name for name, _ in anatomy_of(model).layers] == ["model.layers.0", "model.layers.1"]
    lemo_fx.transform(model, LemoConfig(block_size=8, dense_layers=()))
    assert set(lemo_fx.graphs(model)) == {"", "model.layers.0", "model.layers.1"}


def test_a_causal_model_its_base_and_wrappers():
    model = tiny("llama", 2)
    found = anatomy_of(model)
    assert found.head is found.base is model
    assert found.head_name == ""
    assert found.decoder is model.model
    assert found.layers == list(zip(["model.layers.0", "model.layers.1"], model.model.layers, strict=True))
    assert found.holders == [model, model.model, model.model.layers]

    base = anatomy_of(model.model)
    assert (base.head, base.head_name, base.base, base.decoder) == (None, None, model.model, model.model)
    assert [layer for _, layer in base.layers] == list(model.model.layers)

    wrapped = with_lora(model)
    found = anatomy_of(wrapped)
    assert (found.model, found.head, found.head_name) == (wrapped, model, "base_model.model")
    assert [name for name, _ in found.layers] == [f"base_model.model.model.layers.{i}" for i in range(2)]
    assert found.holders[:3] == [wrapped, wrapped.base_model, model]


def test_a_projection_that_is_called_a_decoder_is_none():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.ModernBertDecoderConfig(**sizes, vocab_size=VOCABULARY, pad_token_id=0)
    model = transformers.ModernBertDecoderForCausalLM(config).train()
    assert isinstance(model.get_decoder(), torch.nn.Linear)
    assert [name for name, _ in anatomy_of(model).layers] == ["model.layers.0", "model.layers.1"]
    lemo_fx.transform(model, LemoConfig(block_size=8, dense_layers=()))
    assert "model.layers.0" in lemo_fx.graphs(model)


def test_a_classifier_has_layers_but_no_head():
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.LlamaForSequenceClassification(config)
    found = anatomy_of(model)
    assert (found.head, found.decoder) == (None, model.model)
    assert len(found.layers) == 2


def test_an_encoder_has_no_layers():
    config = transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    assert anatomy_of(transformers.BertModel(config)).layers == []
