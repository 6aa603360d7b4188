"""Linear layers in bitsandbytes' 4 bits in float8: the unpacked weight, values and gradient, and what is left alone."""

import copy

import pytest
import torch
from torch import nn

from lemo_fx.kernels.float8_linear import four_bits, reference
from lemo_fx.kernels.float8_linear.op import SWITCH, Float8Switch, layers_in_four_bits

bnb = pytest.importorskip("bitsandbytes")


def make(kind="nf4", nested=True, compute=torch.float32, dtype=torch.float32, bias=False, sides=(64, 48), **settings):
    """A frozen `Linear4bit` and its weight de-quantised by bitsandbytes."""
    torch.manual_seed(0)
    plain = nn.Linear(*sides, bias=bias, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        *sides, bias=bias, compute_dtype=compute, compress_statistics=nested, quant_type=kind, **settings
    )
    # Rows of very different sizes, which one scale for all would round to nothing.
    plain.weight.data.mul_(torch.logspace(-3, 1, sides[1])[:, None])
    layer = layer.to(dtype)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    return layer, bnb.functional.dequantize_4bit(layer.weight.data.view(-1, 1), layer.weight.quant_state)


def switched(layer):
    switch = Float8Switch()
    switch.connect(layer)
    return switch


KINDS = {
    "nf4": {},
    "nf4, scales in float32": {"nested": False},
    "fp4": {"kind": "fp4"},
    "stored as bfloat16": {"quant_storage": torch.bfloat16},
    "more than one block of scales": {"sides": (528, 256)},
}


def test_values_and_gradient_are_those_of_the_unpacked_weight():
    for kind, settings in KINDS.items():
        layer, weight = make(**settings)
        for turn in range(3):
            assert torch.equal(four_bits.unpack(*four_bits.read(layer, torch.float32), turn), weight), kind
        x = torch.randn(2, 7, layer.in_features, requires_grad=True)
        found = switched(layer).run(layer, x)
        torch.testing.assert_close(found, reference.float8_linear(x, weight))
        with torch.no_grad():
            assert torch.equal(vars(layer)[SWITCH].run(layer, x), found)
        grad = torch.randn_like(found)
        found.backward(grad)
        assert torch.equal(x.grad, reference.float8_linear(grad, weight.t())), kind
        assert 0.001 < (x.grad - grad @ weight).norm() / x.grad.norm() < 0.06, kind


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_dtypes_are_those_of_the_layer_without(dtype, autocast):
    for compute in (torch.float32, torch.bfloat16, torch.float16, None):
        layer, _ = make(compute=compute, dtype=dtype, bias=True)
        layer.bias.requires_grad_(True)
        x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = layer(x)
            found = switched(layer).run(layer, x)
        assert found.dtype == expected.dtype == dtype
        assert 0.001 < (found - expected).norm() / expected.norm() < 0.06
        found.sum().backward()
        assert x.grad.dtype == dtype
        assert layer.bias.dtype == layer.bias.grad.dtype
        torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 5))


def test_nothing_changes_but_where_the_switch_is_on():
    layer, _ = make()
    x, kind = torch.randn(3, 64), type(layer)
    before, parameter, state = layer(x), layer.weight, layer.weight.quant_state
    switch = switched(layer)
    assert torch.equal(layer(x), before)
    assert not torch.equal(switch.run(layer, x), before)
    assert isinstance(layer, kind)
    assert repr(layer) == repr(make()[0])
    twin = copy.deepcopy(layer)
    assert type(twin) is kind
    assert torch.equal(twin(x), before)
    switch.disconnect()
    assert type(layer) is kind
    assert layer.weight is parameter
    assert layer.weight.quant_state is state
    assert torch.equal(layer(x), before)


class Own(bnb.nn.Linear4bit):
    """Of another library, with another forward perhaps."""


def test_what_is_not_bitsandbytes_own_or_does_not_fit_computes_in_its_own_way():
    own, odd = make()[0], make(sides=(64, 40))[0]
    own.__class__ = Own
    for layer in (own, odd):
        x = torch.randn(3, 64)
        before = layer(x)
        assert layers_in_four_bits(layer) == []
        assert torch.equal(switched(layer).run(layer, x), before)
    int8 = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu").requires_grad_(False)
    for layer in (own, int8, bnb.nn.Linear4bit(64, 48)):
        kind = type(layer)
        assert switched(layer).layers == ()
        assert type(layer) is kind


def test_a_weight_that_is_not_all_there_is_not_read():
    """As sharding leaves it for a time, and as bitsandbytes repacks it for a CPU's evaluation."""
    part, repacked = make()[0], make()[0]
    part.weight.data = part.weight.data[:-1]
    repacked.weight.quant_state.packing_format_for_cpu = True
    for layer in (part, repacked):
        assert four_bits.read(layer, torch.float32) is None
        assert layers_in_four_bits(layer) == []


def test_a_parameter_made_anew_is_read_by_the_layers_state():
    """As of FSDP, whose parameters are plain tensors."""
    layer, weight = make()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(four_bits.unpack(*four_bits.read(layer, torch.float32)), weight)


def test_on_a_gpu_a_layer_that_asks_for_another_dtype_keeps_it(monkeypatch):
    """Float8 takes the place of bfloat16, as in layers that are not packed."""
    monkeypatch.setattr(bnb.nn.Params4bit, "is_cuda", True, raising=False)
    for compute, taken in ((torch.bfloat16, 1), (None, 1), (torch.float32, 0), (torch.float16, 0)):
        assert len(layers_in_four_bits(make(compute=compute)[0])) == taken
