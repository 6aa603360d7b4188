"""Linear attention stays out of compiled graphs, whose size must not grow with the sequence."""

import copy
import pickle

import pytest
import torch
from tiny import tiny
from tiny_models import tiny_model
from torch._dynamo.utils import counters

import lemo_fx
from lemo_fx import LemoConfig
from lemo_fx.graph.anatomy import anatomy_of, decoder_layers
from lemo_fx.graph.mixers import recurrent_mixers
from lemo_fx.install import mixers_of

LORA = LemoConfig(attention=None, mlp=None)


def compiled_calls(model, length):
    """How many operations the compiled graphs of a forward hold."""
    torch._dynamo.reset()
    counters.clear()
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids)
    return counters["stats"]["calls_captured"]


def test_compiled_graphs_do_not_grow_with_the_sequence():
    model = tiny_model("qwen3_5_text")
    lemo_fx.transform(model, LORA)
    for _, layer in decoder_layers(model):
        layer.compile(backend="eager")
    short, long = (compiled_calls(model, length) for length in (64, 256))
    # Broken on purpose, they grow by a sixth.
    assert 0 < long < 1.05 * short


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
