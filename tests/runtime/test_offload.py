"""What a checkpointed layer saves goes to the host and comes back: same numbers, nothing left behind.

The CPU stands in for a device with memory of its own: the copies are real, the streams are torch's empty ones.
"""

import gc
import weakref

import pytest
import torch
from tiny import ARCHITECTURES, assert_same_step, batch, step, tiny, with_lora

import lemo_fx
from lemo_fx import ConfigError, Elimination, LemoConfig
from lemo_fx.runtime import branch, offload


@pytest.fixture
def lane(monkeypatch):
    """The CPU's lane, empty; every saved tensor of a few hundred bytes is offloaded."""
    device = torch.device("cpu")
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "LEAST_BYTES", 256)
    monkeypatch.setattr(offload, "_lanes", {device: offload.Lane(device)})
    return offload._lanes[device]


def sparse(treatment="skip", **settings):
    site = Elimination(keep=0.5, eliminated=treatment)
    return LemoConfig(**({"attention": site, "mlp": site, "block_size": 8, "offload": True} | settings))


def transformed(config, architecture="llama", layers=4, targets="all-linear"):
    model = lemo_fx.transform(with_lora(tiny(architecture, layers), targets=targets), config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


RECOMPUTES = ("all", "projections", "elementwise")
EAGER = [(treatment, recompute, False) for treatment in ("skip", "exact", None) for recompute in RECOMPUTES]
COMPILED = [("skip", "projections", True), ("exact", "all", True), (None, "all", True)]


@pytest.mark.parametrize(("treatment", "recompute", "compiled"), EAGER + COMPILED)
def test_same_numbers_and_all_saved_rows_leave(lane, treatment, recompute, compiled, monkeypatch):
    inputs = batch(1, 64)
    found = []
    # Once: hooks outside of compiled code ask for no other.
    torch.compiler.reset()
    for offloaded in (False, True):
        config = sparse(treatment or "skip", recompute=recompute, offload=offloaded)
        if treatment is None:
            config = LemoConfig(None, None, block_size=8, recompute=recompute, offload=offloaded)
        # A compiler reads PEFT's code anew for each adapter: one in either branch.
        model = transformed(config, targets=("q_proj", "down_proj") if compiled else "all-linear")
        if compiled:
            # One program for both sparse layers; without any, all layers are alike but the first.
            for layer in model.get_base_model().model.layers[1:3]:
                layer.compile(backend="aot_eager")
        found.append([step(model, inputs) for _ in range(2)])
    for one, other in zip(*found, strict=True):
        assert_same_step(one, other, "same")
    # Two steps need no more buffers than one, and all are free again.
    assert lane.free
    used = len(lane.free)
    step(model, inputs)
    assert len(lane.free) == used


@pytest.mark.skipif(not branch.THROUGH_HOOKS, reason="torch before 2.14 shows hooks nothing of what a policy keeps")
@pytest.mark.parametrize("recompute", ["projections", "elementwise"])
def test_what_is_not_computed_again_leaves_too(lane, recompute):
    sizes = {}
    for kind in ("all", recompute):
        lane.free.clear()
        step(transformed(sparse(recompute=kind)), batch(1, 64))
        sizes[kind] = sum(buffer.numel() for buffer in lane.free)
    assert sizes[recompute] > 1.2 * sizes["all"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(lane, architecture):
    inputs = batch(2, 61, padding="both")
    # Dense layers are rewritten where they offload, and then add up a parallel residual in another order.
    settings = [sparse(offload=on, dense_layers=()) for on in (False, True)]
    steps = [step(transformed(s, architecture), inputs) for s in settings]
    assert_same_step(*steps, "same")
    assert lane.free


def test_the_device_holds_two_layers_at_most(lane):
    model = transformed(sparse(dense_layers=()), layers=6)
    held = {}

    def count(call):
        return sum(saved.here is not None for saved in call.tensors())

    calls = []
    original = offload.LayerCall.__init__

    def watched(self, *args):
        original(self, *args)
        calls.append(weakref.ref(self))

    offload.LayerCall.__init__ = watched
    try:
        loss = model(**batch(1, 64)).loss
    finally:
        offload.LayerCall.__init__ = original
    held = [count(ref()) for ref in calls]
    assert len(held) == 6
    assert held[:4] == [0] * 4
    assert all(held[4:])
    seen = []
    bring = offload.LayerCall.bring

    def watch(self):
        bring(self)
        seen.append(sum(bool(count(call)) for ref in calls if (call := ref()) is not None))

    offload.LayerCall.bring = watch
    try:
        loss.backward()
    finally:
        offload.LayerCall.bring = bring
    assert seen
    assert max(seen) <= 2
    del loss
    gc.collect()
    assert all(ref() is None or not ref().tensors() for ref in calls)


def test_backward_twice_and_two_forwards_before_one_backward(lane):
    model, plain = transformed(sparse()), transformed(sparse(offload=False))
    pair = [batch(1, 64, seed=s) for s in (0, 1)]
    found = []
    for each in (model, plain):
        each.zero_grad()
        loss = sum(each(**inputs).loss for inputs in pair)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_an_abandoned_forward_gives_its_buffers_back(lane):
    model = transformed(sparse())
    loss = model(**batch(1, 64)).loss
    assert not lane.free
    del loss
    assert lane.free


def test_buffers_follow_the_longest_sequence(lane):
    """Lengths that vary must not pin a buffer for each length."""
    model = transformed(sparse())
    step(model, batch(1, 128))
    used = len(lane.free)
    for length in (64, 96, 120, 128, 72):
        step(model, batch(1, length))
        assert len(lane.free) == used


def test_nothing_happens_without_checkpointing_or_on_the_cpu(lane, monkeypatch):
    def fail(*args):
        raise AssertionError("offloaded")

    monkeypatch.setattr(offload, "LayerCall", fail)
    inputs = batch(1, 64)
    model = lemo_fx.transform(tiny("llama", 4), sparse())
    step(model, inputs)
    with torch.no_grad():
        model(**inputs)
    monkeypatch.setattr(offload, "DEVICES", {"cuda"})
    step(transformed(sparse()), inputs)


@pytest.mark.slow
def test_a_whole_compiled_model_keeps_its_rows_on_the_device(lane):
    model = lemo_fx.transform(tiny("llama", 3), sparse())
    expected = step(model, batch(1, 64))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same_step(step(model, batch(1, 64)), expected, "compiled")
    assert not lane.free


def test_it_must_be_a_bool():
    with pytest.raises(ConfigError, match="offload"):
        LemoConfig(offload="yes")
