"""Hooks of a user's own: on a whole layer they work; with one within it, the layer runs its original code."""

import logging

import pytest
import torch
from tiny import Recorder, assert_same_step, batch, gradients, step, tiny, with_lora
from torch import nn

import lemo_fx
from lemo_fx import Elimination, LemoConfig

PLACES = {
    "layer": lambda layer: layer,
    "mlp": lambda layer: layer.mlp,
    "attention": lambda layer: layer.self_attn,
    "projection": lambda layer: layer.mlp.down_proj,
}


def steered(where):
    """A model in which a trained vector is added to four tokens after some module, and the hook that does it."""
    model = tiny("llama").requires_grad_(False)
    model.vector = nn.Parameter(torch.ones(32))

    def steer(module, args, output):
        rows = (output[0] if isinstance(output, tuple) else output).clone()
        rows[:, 40:44] = rows[:, 40:44] + model.vector
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    return model, lambda: PLACES[where](model.model.layers[0]).register_forward_hook(steer)


@pytest.mark.parametrize("how", ["eager", "checkpointed", "compiled"])
@pytest.mark.parametrize("first", [True, False], ids=["hook_first", "transform_first"])
@pytest.mark.parametrize("where", PLACES)
def test_a_trained_vector_in_a_hook(where, first, how, caplog):
    model, hook = steered(where)
    hook()
    expected = step(model, batch(2, 64))
    site = Elimination(keep=0.5, eliminated="exact", score="random")
    config = LemoConfig(site, site, block_size=8, dense_layers=())
    model, hook = steered(where)
    if first:
        hook()
    lemo_fx.transform(model, config)
    if not first:
        hook()
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers if how == "compiled" else ():
        layer.compile(backend="aot_eager")
    with caplog.at_level(logging.WARNING, logger="lemo_fx"), Recorder(model) as seen:
        found = step(model, batch(2, 64))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    layers = {name.split(".")[2] for name in seen.tokens}
    noted = [site.module for site in lemo_fx.report(model).sites if "has a hook" in site.note]
    if where == "layer":
        assert layers == {"0", "1"}
        assert not noted
        assert not caplog.records
    else:
        assert layers == {"1"}
        assert noted == ["model.layers.0"] * 2
        assert "steer" in caplog.text
        # What came through the layers above is an estimate; the vector's way out of its own layer is whole.
        assert found[1]["vector"].norm() > 0.3 * expected[1]["vector"].norm()


def test_a_hook_that_is_removed_and_hooks_that_do_no_harm():
    model = with_lora(tiny("llama"))
    site = Elimination(keep=0.5)
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
    expected = step(model, batch(2, 64))
    mlp = model.get_base_model().model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda module, args: None)
    assert not torch.equal(step(model, batch(2, 64))[0], expected[0])
    handle.remove()
    assert_same_step(step(model, batch(2, 64)), expected, "same")
    # transformers' own, which collect attention weights; weight norm, which makes a weight.
    model.eval()(**batch(2, 64), output_attentions=True, output_hidden_states=True)
    model.train()
    assert (
        any(m._forward_hooks for m in mlp.modules()) or model.get_base_model().model.layers[0].self_attn._forward_hooks
    )
    assert_same_step(step(model, batch(2, 64)), expected, "same")
    nn.utils.weight_norm(mlp.down_proj.base_layer)
    step(model, batch(2, 64))
    assert [site.kept_share for site in lemo_fx.report(model).sites] == [0.5] * 4
    assert gradients(model)


@pytest.mark.parametrize("first", [True, False], ids=["hook_first", "transform_first"])
def test_a_hook_of_every_module(first):
    """As debuggers and probes register them, for the whole process."""

    def steer(module, args, output):
        return (
            output * (1 + torch.arange(output.shape[1])[:, None] / 50) if type(module).__name__ == "LlamaMLP" else None
        )

    def run(config):
        model = tiny("llama")
        if config is not None and not first:
            lemo_fx.transform(model, config)
        handle = torch.nn.modules.module.register_module_forward_hook(steer)
        try:
            if config is not None and first:
                lemo_fx.transform(model, config)
            found = step(model, batch(2, 64))
            noted = "" if config is None else str(lemo_fx.report(model).sites[0].note)
        finally:
            handle.remove()
        return found, noted

    site = Elimination(keep=0.5, score="random")
    found, noted = run(LemoConfig(site, site, block_size=8, dense_layers=()))
    assert_same_step(run(None)[0], found, "fp32")
    assert "every module has a hook" in noted
