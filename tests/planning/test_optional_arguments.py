"""Layers and heads that ask about arguments which a call may leave out: what a tracer answers once, calls may answer
otherwise."""

import pytest
import torch
from tiny import assert_same_step, batch, step, tiny
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

import lemo_fx
from lemo_fx import Elimination, LemoConfig, UnsupportedModelError
from lemo_fx.graph import left_out
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture

EXTRA = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1))


class Asking(modeling_llama.LlamaDecoderLayer):
    """Adds a bias if `add` finds that there is one."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, bias=None, scale=1.0, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.add(self.mlp(self.post_attention_layernorm(hidden_states)), bias, scale, kwargs)


def layer_class(add):
    return type("Asking", (Asking,), {"add": lambda self, *args: add(*args)})


ASKING = {
    "helper": lambda x, bias, scale, kwargs: x if bias is None else x + bias,
    "isinstance": lambda x, bias, scale, kwargs: x + bias if isinstance(bias, torch.Tensor) else x,
    "is_tensor": lambda x, bias, scale, kwargs: x + bias if torch.is_tensor(bias) else x,
    "type": lambda x, bias, scale, kwargs: x + bias if type(bias) is torch.Tensor else x,
    "float": lambda x, bias, scale, kwargs: scale * x if isinstance(scale, float) else x,
    "key": lambda x, bias, scale, kwargs: x + kwargs["more"] if isinstance(kwargs.get("more"), torch.Tensor) else x,
}


def with_layers(add):
    model = tiny("llama")
    for index, layer in enumerate(model.model.layers):
        asking = layer_class(add)(model.config, index)
        asking.load_state_dict(layer.state_dict())
        model.model.layers[index] = asking
    return model.train()


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_a_layer_does_with_an_argument_what_it_would(treatment):
    site = Elimination(keep=1.0 if treatment == "skip" else 0.5, eliminated=treatment, score="random")
    config = LemoConfig(site, site, block_size=8, dense_layers=())
    for how, add in ASKING.items():
        more = {"float": {"scale": 0.3}, "key": {"more": EXTRA}}.get(how, {"bias": EXTRA})
        model = lemo_fx.transform(with_layers(add), config)
        assert {site.eliminated for site in lemo_fx.report(model).sites} == {treatment}, how
        for given in ({}, more, {}):
            expected, found = step(with_layers(add), batch(2, 64) | given), step(model, batch(2, 64) | given)
            if treatment == "exact":
                torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-6)
            else:
                assert_same_step(expected, found, "fp32")


class Plainly(Asking):
    """Computes more when it is asked for a cache, unless the factor in its config is 1."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.config = config

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, use_cache=False, **kwargs):
        out = super().forward(hidden_states, attention_mask, position_embeddings)
        return self.times(out) if use_cache else out

    def times(self, out):
        return out * self.config.factor if self.config.factor != 1 else out

    def add(self, x, *others):
        return x


class ByName(Plainly):
    """A way of asking that no operation shows."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, use_cache=False, **kwargs):
        out = super().forward(hidden_states, attention_mask, position_embeddings)
        return self.times(out) if locals()["use_cache"] is True else out


class ByMethod(Plainly):
    """A call of the layer that is none of a submodule."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, use_cache=False, **kwargs):
        return self.finish(super().forward(hidden_states, attention_mask, position_embeddings), use_cache)

    def finish(self, out, use_cache):
        return self.times(out) if use_cache else out


@pytest.mark.parametrize("kind", [Plainly, ByName, ByMethod])
def test_a_layer_that_asks_whether_to_fill_a_cache(kind):
    def with_cached(factor, **settings):
        model = tiny("llama", **settings)
        model.config.factor = factor
        for index, layer in enumerate(model.model.layers):
            cached = kind(model.config, index)
            cached.load_state_dict(layer.state_dict())
            model.model.layers[index] = cached
        return model.train()

    site = Elimination(keep=1.0, score="random")
    config = LemoConfig(site, site, block_size=8, dense_layers=())
    # What is asked without consequence is no obstacle.
    for factor, settings in ((2, {"use_cache": False}), (1, {})):
        with pytest.raises(
            UnsupportedModelError, match=r"layers\.1.*use_cache=True.*Set model.config.use_cache = False"
        ):
            lemo_fx.transform(with_cached(2), config)
        expected, model = (with_cached(factor, **settings) for _ in range(2))
        assert_same_step(step(expected, batch(2, 64)), step(lemo_fx.transform(model, config), batch(2, 64)), "fp32")


def test_what_is_only_handed_on_needs_no_capture_of_its_own(monkeypatch):
    def no_capture(*args, **options):
        raise AssertionError("captured once more")

    layer = tiny("llama").model.layers[0]
    graph = capture(layer, ABSENT_IN_TRAINING)
    monkeypatch.setattr(left_out, "capture", no_capture)
    assert not left_out.reads_use_cache(layer)
    assert left_out.matters_when_absent(layer, graph, ABSENT_IN_TRAINING) == ()


class Weighing(LlamaForCausalLM):
    """A head that weighs its loss if it is told to, in two ways of asking."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, weight=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        loss = loss * weight if isinstance(weight, torch.Tensor) else loss
        loss = loss * 2.0 if isinstance(kwargs.get("double"), bool) else loss
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("more", [{}, {"weight": torch.tensor(0.3)}, {"double": True}], ids=str)
def test_a_head_does_with_an_argument_what_it_would(more):
    def build():
        plain = tiny("llama")
        model = Weighing(plain.config)
        model.load_state_dict(plain.state_dict())
        return model.train()

    site = Elimination(keep=1.0, score="random")
    model = lemo_fx.transform(build(), LemoConfig(site, site, block_size=8, dense_layers=()))
    assert not [note for note in lemo_fx.report(model).notes if "not segmented" in note]
    assert isinstance(model.lm_head, nn.Linear)
    assert_same_step(step(build(), batch() | more), step(model, batch() | more), "fp32")
