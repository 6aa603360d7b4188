import operator

import pytest
import torch
from tiny import ARCHITECTURES, TOLERANCE, batch, tiny, with_lora
from torch import nn

from lemo_fx.errors import CaptureError
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.capture import ABSENT_IN_TRAINING, SPLAT, build_module, capture, readable_code


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_captured_layer_computes_what_the_layer_does(architecture, lora):
    model = tiny(architecture, 1)
    model = with_lora(model) if lora else model
    _, layer = decoder_layers(model)[0]
    seen = {}
    handle = layer.register_forward_hook(lambda m, a, k, out: seen.update(args=a, kwargs=k, out=out), with_kwargs=True)
    model(**batch(2, 24, padding="right"), use_cache=False)
    handle.remove()
    graph = capture(layer, ABSENT_IN_TRAINING)
    assert len(graph.nodes) <= 40, "submodules are leaves"
    out = build_module(layer, graph, "Layer")(*seen["args"], **seen["kwargs"])
    expected = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, expected, **TOLERANCE["fp32"])


def test_capturing_changes_nothing():
    model = tiny("llama", 1)
    layer = model.model.layers[0]
    before = dict(vars(layer))
    for _ in range(2):
        capture(layer, ABSENT_IN_TRAINING)
    assert vars(layer) == before
    assert layer.training is True


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, scale=2.0, **kwargs):
        return x + self.take(x, **kwargs) * scale

    def take(self, x, **kwargs):
        return nn.functional.dropout(self.inner(x), 0.5, self.training)


def test_kwargs_and_training_are_not_baked_in():
    layer = Layer()
    module = build_module(layer, capture(layer), "Layer")
    x = torch.randn(2, 4)
    for training in (True, False):
        layer.train(training)
        module.training = training
        torch.manual_seed(1)
        expected = layer(x, other=3)
        torch.manual_seed(1)
        assert torch.equal(module(x, other=3), expected)


class Passes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Layer()

    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


def test_a_mapping_is_carried_and_printed_as_one():
    layer = Passes()
    graph = capture(layer)
    (call,) = [n for n in graph.nodes if n.op == "call_module"]
    assert SPLAT in call.kwargs
    assert "**" in readable_code(graph, "Passes").split("self.inner")[1]
    module = build_module(layer, graph, "Passes")
    layer.eval(), module.eval()
    x = torch.randn(2, 4)
    assert torch.equal(module(x, scale=5.0), layer(x, scale=5.0))


def test_dead_nodes_are_removed():
    class Dead(nn.Module):
        def forward(self, x):
            x * 3
            return x + 1

    assert [n.target for n in capture(Dead()).nodes if n.op == "call_function"] == [operator.add]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Star(nn.Module):
    def forward(self, *x):
        return x[0]


@pytest.mark.parametrize(("module", "reason"), [(Branches, "cannot be captured"), (Star, r"takes \*x")])
def test_what_cannot_be_captured(module, reason):
    instance = module()
    with pytest.raises(CaptureError, match=reason):
        capture(instance)
    assert instance.training is True
