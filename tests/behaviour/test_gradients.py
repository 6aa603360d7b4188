"""Gradients taken otherwise than by one backward: of gradients, by torch.func, in forward mode; and inference mode."""

import pytest
import torch
from tiny import assert_same_step, batch, gradients, tiny, with_lora
from torch.autograd import forward_ad

import lemo_fx
from lemo_fx import Elimination, InputError, LemoConfig


def model(**settings):
    """With eager attention, which has gradients of gradients."""
    found = with_lora(tiny("llama", attention="eager"))
    if not settings:
        return found
    site = Elimination(keep=settings.pop("keep", 1.0), eliminated=settings.pop("eliminated", "skip"), score="random")
    return lemo_fx.transform(found, LemoConfig(site, site, block_size=8, dense_layers=(), **settings))


def penalised(model):
    """A step whose loss holds the size of its own gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch()).loss
    loss = loss + sum(g.pow(2).sum() for g in torch.autograd.grad(loss, trained, create_graph=True))
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("eliminated", ["skip", "exact"])
def test_gradients_of_gradients(eliminated):
    """The loss in segments has none: it would be left out of them without a word."""
    whole = model(eliminated=eliminated, loss_segments=None)
    assert_same_step(penalised(model().double()), penalised(whole.double()), "fp32")
    with pytest.raises(InputError, match=r"create_graph=True.*loss_segments=None"):
        penalised(model(eliminated=eliminated))


def by_grad(model):
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    loss = lambda values: torch.func.functional_call(model, values, (), batch()).loss  # noqa: E731
    found, value = torch.func.grad_and_value(loss)(weights)
    return value.detach(), found


def by_jvp(model):
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    loss = lambda values: torch.func.functional_call(model, values, (), batch()).loss  # noqa: E731
    return torch.func.jvp(loss, (weights,), ({name: torch.ones_like(p) for name, p in weights.items()},))[1], {}


def by_vmap(model):
    weights = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in model.named_parameters()}
    loss = lambda values: torch.func.functional_call(model, values, (), batch()).loss  # noqa: E731
    return torch.func.vmap(loss, randomness="same")(weights).sum(), {}


def in_forward_mode(model):
    with forward_ad.dual_level():
        weights = {
            name: forward_ad.make_dual(p.detach(), torch.ones_like(p))
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        loss = torch.func.functional_call(model, weights, (), batch()).loss
        return forward_ad.unpack_dual(loss).tangent, {}


def test_transforms_of_functions_are_refused_and_run_on_original_layers():
    rewritten = model(keep=0.5)
    for how in (by_grad, by_jvp, by_vmap, in_forward_mode):
        lemo_fx.set_dense(rewritten, False)
        with pytest.raises(InputError, match=r"torch\.func .*set_dense"):
            how(rewritten)
        assert_same_step(how(model()), how(lemo_fx.set_dense(rewritten)), "fp32")
    base = lemo_fx.set_dense(rewritten, False).get_base_model().model
    with pytest.raises(InputError, match=r"LlamaDecoderLayer: torch\.func"):
        torch.func.vmap(lambda ids: base(input_ids=ids[None])[0])(batch()["input_ids"])


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(training):
    """Its tensors do not count how often they were written to."""
    original, rewritten = model().train(training), model(eliminated="exact", keep=0.5).train(training)
    with torch.inference_mode():
        expected, found = original(**batch()), rewritten(**batch())
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.logits.float(), expected.logits.float())
