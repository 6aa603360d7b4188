"""Modules that keep something of the tokens that they see: a loss or keys left for others, statistics, counts."""

import copy

import pytest
import torch
from tiny import assert_same_step, batch, gradients, tiny
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers.models.llama import modeling_llama

import lemo_fx
from lemo_fx import Elimination, LemoConfig, UnsupportedModelError


class Balanced(nn.Module):
    """Leaves an auxiliary loss on itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.router = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        self.loss = self.router(x).softmax(-1).mean((0, 1)).pow(2).sum()
        return self.inner(x)


class Listed(Balanced):
    def __init__(self):
        super().__init__()
        self.losses = []

    def forward(self, x):
        self.losses.append(self.router(x).softmax(-1).mean((0, 1)).pow(2).sum())
        return self.inner(x)


LOSSES = []
"""As libraries of experts keep them (megablocks): of all layers, in one place."""


class Global(Balanced):
    def forward(self, x):
        LOSSES.append(self.router(x).softmax(-1).mean((0, 1)).pow(2).sum())
        return self.inner(x)


def enclosed():
    """A class whose forward writes what its function's other reads."""
    last = {}

    class Enclosed(Balanced):
        loss = property(lambda self: last[self])

        def forward(self, x):
            last[self] = self.router(x).softmax(-1).mean((0, 1)).pow(2).sum()
            return self.inner(x)

    return Enclosed


class Counting(Balanced):
    """Sums up its loads in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.load += self.router(x).softmax(-1).sum((0, 1)).detach()
        return self.inner(x)


class Normed(nn.Module):
    """Mixes tokens in training only."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(32), nn.Linear(32, 32)

    def forward(self, x):
        return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Spectral(nn.Module):
    """Takes one step of a power iteration in each call."""

    def __init__(self):
        super().__init__()
        self.inner = parametrizations.spectral_norm(nn.Linear(32, 32))

    def forward(self, x):
        return self.inner(x)


def with_mlps(kind):
    model = tiny("llama")
    torch.manual_seed(2)
    for layer in model.model.layers:
        layer.mlp = kind()
    return model.train()


def sparse():
    site = Elimination(keep=0.5, eliminated="exact", score="random")
    return LemoConfig(site, site, block_size=8, dense_layers=())


def three_losses(model):
    """Of three steps, with what modules left added; and the buffers at the end."""
    found = []
    LOSSES.clear()
    for seed in range(3):
        loss = model(**batch(2, 64, seed=seed)).loss
        for layer in model.model.layers:
            loss = loss + getattr(layer.mlp, "loss", 0) + sum(vars(layer.mlp).get("losses", [])[-1:])
        loss = loss + sum(LOSSES)
        LOSSES.clear()
        loss.backward()
        found.append(loss.detach())
    return torch.stack(found), {n: b.clone() for n, b in model.named_buffers() if "lemo" not in n and "mlp" in n}


@pytest.mark.parametrize(
    "kinds",
    [(Balanced, Listed, Global, enclosed()), (Counting, Normed), (Spectral,)],
    ids=["left", "counted", "power"],
)
def test_a_module_that_keeps_something_of_what_it_sees_stays_dense(kinds):
    for kind in kinds:
        model = with_mlps(kind)
        before = copy.deepcopy(model.state_dict())
        lemo_fx.transform(model, sparse())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        notes = {site.site: site.note for site in lemo_fx.report(model).sites}
        assert ("leaves a tensor" in notes["mlp"]) or ("changes the buffer" in notes["mlp"]), notes
        assert "left dense" not in notes["attention"]
        expected, found = three_losses(with_mlps(kind)), three_losses(model)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-6)
        for name, buffer in expected[1].items():
            torch.testing.assert_close(found[1][name], buffer, rtol=1e-4, atol=1e-5)


class Sharing(modeling_llama.LlamaAttention):
    """Adds the first layer's values, which lie in a dictionary of its class."""

    values = {}  # noqa: RUF012

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        assert modeling_llama.ALL_ATTENTION_FUNCTIONS, "how lemo_fx knows an attention"
        if self.layer_idx == 0:
            self.values["first"] = self.v_proj(hidden_states)
        out, weights = super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        return out + self.o_proj(self.values["first"].repeat(1, 1, 2)), weights


class Stashing(modeling_llama.LlamaDecoderLayer):
    """Its own forward, not a module of it, leaves something."""

    def forward(self, hidden_states, **kwargs):
        LOSSES.append(hidden_states.pow(2).mean())
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def with_layers(kind):
    model = tiny("llama", 3)
    for index, layer in enumerate(model.model.layers):
        made = kind(model.config, index)
        if kind is Sharing:
            made.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = made
        else:
            made.load_state_dict(layer.state_dict())
            model.model.layers[index] = made
    return model.train()


def test_values_that_layers_share_past_their_arguments():
    expected, model = with_layers(Sharing), lemo_fx.transform(with_layers(Sharing), sparse())
    notes = [site.note for site in lemo_fx.report(model).sites if site.site == "attention"]
    assert "leaves a tensor" in notes[0]
    assert all("left dense" in note for note in notes)
    torch.testing.assert_close(three_losses(model)[0], three_losses(expected)[0], rtol=1e-4, atol=2e-6)


def test_a_layer_whose_own_forward_leaves_something_stays_as_it_is():
    model = with_layers(Stashing)
    with pytest.raises(UnsupportedModelError, match="leaves a tensor"):
        lemo_fx.transform(model, sparse())
    assert all(isinstance(loss, torch.Tensor) for loss in LOSSES)
    model.model.layers[1] = tiny("llama", 3).model.layers[1]
    expected = copy.deepcopy(model)
    torch.testing.assert_close(
        three_losses(lemo_fx.transform(model, sparse()))[0], three_losses(expected)[0], rtol=1e-4, atol=2e-6
    )


class Cast(nn.Linear):
    """Keeps a weight of its own in the dtype of what it is given (PEFT's BOFT)."""

    def forward(self, x):
        self.last = self.weight.to(x)
        return nn.functional.linear(x, self.last)


def test_a_weight_that_is_kept_as_it_was_cast_is_none():
    model = with_mlps(lambda: Cast(32, 32))
    assert {site.eliminated for site in lemo_fx.report(lemo_fx.transform(model, sparse())).sites} == {"exact"}


def test_a_weight_that_a_hook_makes_anew_is_none():
    model = tiny("llama")
    for layer in model.model.layers:
        weight_norm(layer.mlp.up_proj)
    assert {site.eliminated for site in lemo_fx.report(lemo_fx.transform(model, sparse())).sites} == {"exact"}


def test_heads_that_are_changed_after_a_transform():
    """A scale that is annealed; a projection that is exchanged for several modules."""

    class Scaled(type(tiny("llama"))):
        scale = 1.0

        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.scale * self.lm_head(hidden)
            found = type(self).output(logits=logits)
            found.loss = self.loss_function(logits, labels, self.config.vocab_size)
            return found

    from transformers.modeling_outputs import CausalLMOutputWithPast

    Scaled.output = CausalLMOutputWithPast

    def run(transformed, change):
        plain = tiny("llama")
        model = Scaled(plain.config)
        model.load_state_dict(plain.state_dict())
        model.train()
        if transformed:
            site = Elimination(keep=1.0, score="random")
            lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
        change(model)
        loss = model(**batch()).loss
        loss.backward()
        return loss.detach(), gradients(model)

    def anneal(model):
        model.scale = 0.5

    def exchange(model):
        torch.manual_seed(4)
        model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 97))

    for change in (anneal, exchange):
        assert_same_step(run(False, change), run(True, change), "fp32")
