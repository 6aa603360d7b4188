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


def hybrid():
    torch.manual_seed(0)
    return tiny_model("qwen3_5_text")


def compiled_calls(model, length):
    """(loss, how many operations compiled graphs hold) of a step."""
    torch._dynamo.reset()
    counters.clear()
    for _, layer in decoder_layers(model):
        layer.compile(backend="eager")
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), counters["stats"]["calls_captured"]


@pytest.mark.parametrize("config", [LORA, LemoConfig()], ids=["lora", "default"])
def test_compiled_graphs_do_not_grow_with_the_sequence(config):
    model = hybrid()
    lemo_fx.transform(model, config)
    assert mixers_of(model)
    (_, short), (loss, long) = (compiled_calls(model, length) for length in (64, 256))
    # Broken on purpose, they grow by a sixth.
    assert 0 < long < 1.05 * short
    lemo_fx.revert(model)
    ids = torch.randint(0, 64, (1, 256), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_classes_come_back_and_copies_are_originals():
    model = hybrid()
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
