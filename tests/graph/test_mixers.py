"""Linear attention stays out of compiled graphs, whose size must not grow with the sequence."""

import copy
import pickle

import pytest
import torch
from tiny import tiny
from tiny_models import tiny_model
from torch import nn
from torch._dynamo.utils import counters

import lemo_fx
from lemo_fx import LemoConfig
from lemo_fx.graph.anatomy import anatomy_of, decoder_layers
from lemo_fx.graph.mixers import recurrent_mixers
from lemo_fx.install import mixers_of
from lemo_fx.kernels.float8_linear import op
from lemo_fx.planning.proof import Proofs

LORA = LemoConfig(attention=None, mlp=None)


def compiled_calls(model, length):
    """How many operations the compiled graphs of a forward hold."""
    torch._dynamo.reset()
    counters.clear()
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids)
    return counters["stats"]["calls_captured"]


@pytest.mark.parametrize("kind", ["qwen3_5_text", "minimax", "recurrent_gemma"])
def test_compiled_graphs_do_not_grow_with_the_sequence(kind):
    model = tiny_model(kind)
    lemo_fx.transform(model, LORA)
    for _, layer in decoder_layers(model):
        layer.compile(backend="eager")
    short, long = (compiled_calls(model, length) for length in (64, 256))
    # Broken on purpose, they grow by a sixth.
    assert 0 < long < 1.05 * short


def test_a_layer_that_runs_twice_gives_its_class_back():
    model = tiny_model("qwen3_5_text")
    layers = model.get_decoder().layers
    layers[2] = layers[0]
    before = [type(module) for module in model.modules()]
    lemo_fx.transform(model, LORA)
    assert len(mixers_of(model)) == 2
    lemo_fx.revert(model)
    assert [type(module) for module in model.modules()] == before


def test_mixers_compute_in_the_models_dtype_where_the_plan_says_float8(monkeypatch):
    """Their rounding would be run operation by operation, which takes longer than float8 saves."""
    model = tiny_model("qwen3_5_text").requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    lemo_fx.transform(model, "balanced")
    layer, mixer = next((x, m) for _, x in decoder_layers(model) for m in mixers_of(x))
    rounded, multiply = set(), op.float8_linear

    def float8_linear(x, weight, again=False):
        rounded.add(weight.untyped_storage().data_ptr())
        return multiply(x, weight, again)

    monkeypatch.setattr(op, "float8_linear", float8_linear)
    ids = torch.randint(0, 64, (1, 64))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    of_mixer, of_mlp = ({p.untyped_storage().data_ptr() for p in part.parameters()} for part in (mixer, layer.mlp))
    assert of_mlp <= rounded
    assert not of_mixer & rounded
    row = next(row for row in lemo_fx.report(model).sites if row.site == "linear_attn")
    assert row.note.endswith("not compiled, and so not in float8")


def test_classes_come_back_and_are_pickled_as_originals():
    model = tiny_model("qwen3_5_text")
    before = [type(module) for module in model.modules()]
    lemo_fx.transform(model, LORA)
    mixer = mixers_of(model)[0]
    original = before[list(model.modules()).index(mixer)]
    assert isinstance(mixer, original)
    assert type(mixer) is not original
    assert type(mixer).__name__ == original.__name__
    for twin, kind in (
        (copy.deepcopy(mixer), type(mixer)),
        (copy.copy(mixer), type(mixer)),
        (pickle.loads(pickle.dumps(mixer)), original),
    ):
        assert type(twin) is kind
        assert twin.state_dict().keys() == mixer.state_dict().keys()
    lemo_fx.transform(model, LemoConfig())
    assert mixer in mixers_of(model)
    twin = copy.deepcopy(model)
    assert len(mixers_of(twin)) == len(mixers_of(model))
    for one in (model, twin):
        lemo_fx.revert(one)
        assert [type(module) for module in one.modules()] == before


def recurrent(model, run=True):
    """The classes that are found, of a model that is run and of one that cannot be."""
    anatomy = anatomy_of(model)
    layers = [layer for _, layer in anatomy.layers]
    usual = Proofs(model, layers).usual if run else lambda layer: {}
    return {type(module).__name__ for module in recurrent_mixers(anatomy, usual)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("run", [True, False])
def test_attention_and_mlps_are_no_recurrent_mixers(kind, run):
    assert recurrent(tiny(kind), run) == set()


@pytest.mark.parametrize(
    ("kind", "mixer"),
    [
        ("minimax", "MiniMaxLightningAttention"),
        ("recurrent_gemma", "RecurrentGemmaRecurrentBlock"),
        ("falcon_h1", "FalconH1Mixer"),
        ("qwen3_next", "Qwen3NextGatedDeltaNet"),
    ],
)
def test_recurrent_mixers_are_found_whatever_their_layers_hand_them(kind, mixer):
    """Experts, and attention by other code than transformers' beside them, are none."""
    assert recurrent(tiny_model(kind)) == {mixer}


def test_recurrent_mixers_of_a_model_that_cannot_be_run_are_tried_on_hidden_states_alone():
    assert recurrent(tiny_model("qwen3_5_text"), run=False) == {"Qwen3_5GatedDeltaNet"}


class Attends(nn.Linear):
    def forward(self, x):
        return torch.softmax(0.1 * x @ x.mT, -1) @ super().forward(x)


class Rounds(nn.Linear):
    """As experts' matmuls do, whose sizes depend on all rows."""

    def forward(self, x):
        return super().forward(x + 0.01 * x.mean(1, keepdim=True))


class Sums(nn.Linear):
    def forward(self, x):
        return super().forward(x.cumsum(1))


@pytest.mark.parametrize(("mixer", "found"), [(Attends, set()), (Rounds, set()), (Sums, {"Sums"})])
@pytest.mark.parametrize("run", [True, False])
def test_softmax_and_rounding_are_no_recurrence(mixer, found, run):
    model = tiny("llama")
    for _, layer in decoder_layers(model):
        layer.mlp = mixer(32, 32)
    assert recurrent(model, run) == found


def test_recurrent_mixers_are_found_in_half_precision():
    assert recurrent(tiny_model("minimax").bfloat16()) == {"MiniMaxLightningAttention"}
