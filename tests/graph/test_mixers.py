"""Linear attention stays out of compiled graphs, whose size must not grow with the sequence."""

import copy
import pickle

import pytest
import torch
from tiny import tiny, with_lora
from tiny_models import tiny_model
from torch._dynamo.utils import counters

import lemo_fx
from lemo_fx import LemoConfig
from lemo_fx.config import PRESETS
from lemo_fx.graph.anatomy import anatomy_of, decoder_layers
from lemo_fx.graph.mixers import recurrent_mixers
from lemo_fx.install import mixers_of

LORA = LemoConfig(attention=None, mlp=None)


def hybrid():
    torch.manual_seed(0)
    return with_lora(tiny_model("qwen3_5_text"))


def step(model, length):
    """(loss, gradients, how many operations compiled graphs hold) of a step."""
    torch._dynamo.reset()
    counters.clear()
    model.zero_grad()
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, counters["stats"]["calls_captured"]


def test_compiled_graphs_do_not_grow_with_the_sequence():
    model = hybrid()
    lemo_fx.transform(model, LORA)
    for _, layer in decoder_layers(model):
        layer.compile(backend="eager")
    short, long = (step(model, length)[2] for length in (64, 256))
    # Broken on purpose, they grow by a sixth.
    assert 0 < long < 1.05 * short


def test_what_is_recomputed_is_what_ran():
    """Under a compiler a checkpoint around linear attention must not run half compiled in the forward alone."""
    model = hybrid()
    lemo_fx.transform(model, PRESETS["balanced"])
    model.gradient_checkpointing_enable()
    loss, gradients, _ = step(model, 128)
    for _, layer in decoder_layers(model):
        layer.compile(backend="eager")
    compiled, found, captured = step(model, 128)
    assert captured > 0
    assert compiled == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)


def test_classes_come_back_and_copies_are_originals():
    model = tiny_model("qwen3_5_text")
    before = [type(module) for module in model.modules()]
    lemo_fx.transform(model, LORA)
    mixer = mixers_of(model)[0]
    original = before[list(model.modules()).index(mixer)]
    assert isinstance(mixer, original)
    assert type(mixer) is not original
    assert type(mixer).__name__ == original.__name__
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert type(twin) is original
        assert twin.state_dict().keys() == mixer.state_dict().keys()
    lemo_fx.transform(model, LemoConfig())
    assert mixer in mixers_of(model)
    lemo_fx.revert(model)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_attention_and_mlps_are_no_recurrent_mixers(kind):
    assert recurrent_mixers(anatomy_of(tiny(kind))) == []
