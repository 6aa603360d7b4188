"""A layer that is changed after a transform: what its graph holds as constants, and what its modules do with tokens."""

import copy

import pytest
import torch
from tiny import assert_same_step, batch, step, tiny, with_lora
from torch import nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

import lemo_fx
from lemo_fx import Elimination, LemoConfig, LemoError

WORDS = r"model\.layers\.0: .* since lemo_fx\.transform.*lemo_fx\.revert and lemo_fx\.transform again"


class Scaled(modeling_llama.LlamaDecoderLayer):
    """Reads a number of its own, a switch, and a number of its config."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.config, self.alpha, self.with_mlp = config, 1.0, True

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + self.alpha * attended
        if not self.with_mlp:
            return hidden_states
        return hidden_states + self.config.multiplier * self.mlp(self.post_attention_layernorm(hidden_states))


def build():
    model = tiny("llama", multiplier=1.0)
    for index, layer in enumerate(model.model.layers):
        scaled = Scaled(model.config, index)
        scaled.load_state_dict(layer.state_dict())
        model.model.layers[index] = scaled
    return model.train()


def sparse(keep=0.5, treatment="exact"):
    site = Elimination(keep=keep, eliminated=treatment, score="random")
    return LemoConfig(site, site, block_size=8, dense_layers=())


def patched(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs)


class Mixing(nn.Module):
    def forward(self, x):
        return x + functional.pad(x, (0, 0, 1, 0))[:, :-1]


def change(model, what):
    layer = model.model.layers[0]
    if what in ("alpha", "with_mlp"):
        setattr(layer, what, {"alpha": 0.5, "with_mlp": False}[what])
    elif what == "config":
        model.config.multiplier = 0.5
    elif what == "mlp":
        layer.mlp = Mixing()
    elif what == "forward":
        layer.mlp.forward = lambda x, forward=layer.mlp.forward: Mixing()(forward(x))
    elif what == "inner":
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, Mixing())
    elif what == "attention":
        layer.self_attn.forward = patched(layer.self_attn.forward)
    return model


def test_what_a_graph_does_not_know_is_refused_until_transformed_again():
    for what in ("alpha", "with_mlp", "config", "mlp", "forward", "inner", "attention"):
        model = lemo_fx.transform(build(), sparse())
        step(model, batch(2, 64))
        change(model, what)
        with pytest.raises(LemoError, match=WORDS):
            step(model, batch(2, 64))
        lemo_fx.transform(lemo_fx.revert(model), sparse(1.0, "skip"))
        assert_same_step(step(change(build(), what), batch(2, 64)), step(model, batch(2, 64)), "fp32")


def test_what_makes_no_difference_is_let_be():
    model = lemo_fx.transform(build(), sparse())
    loss, _ = step(model, batch(2, 64))
    layer = model.model.layers[0]
    layer.calls, layer.config.anything, layer.mlp.act_fn = 3, "else", nn.SiLU()
    layer.mlp.forward = patched(layer.mlp.forward)
    for changed in (model, copy.deepcopy(model), with_lora(model, init=True)):
        torch.testing.assert_close(step(changed, batch(2, 64))[0], loss)
