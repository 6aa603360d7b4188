"""Liger's kernels put into the model before and after `transform`.

They need a GPU; here plain torch stands in for each, so that what is tested is who replaces what.
"""

import pytest
import torch
from tiny import Recorder, assert_same_step, batch, step, tiny, with_lora
from torch.nn import functional
from training import plan
from transformers.models.llama import modeling_llama

import lemo_fx

liger_transformers = pytest.importorskip("liger_kernel.transformers")


def stand_in(compute):
    """An autograd function that computes this."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.args = args
            return compute(*args)

        @staticmethod
        def backward(ctx, *gradients):
            tracked = [
                a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in ctx.args
            ]
            with torch.enable_grad():
                out = compute(*tracked)
            wanted = [a for a in tracked if isinstance(a, torch.Tensor) and a.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, gradients[0]))
            return tuple(next(found) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in tracked)

    return Function


def cross_entropy(hidden, weight, target, bias, ce_weight, ignore_index, scale, smoothing, reduction, *rest):
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture(autouse=True)
def modelling_file_put_back(monkeypatch):
    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)


@pytest.fixture
def liger(monkeypatch):
    """`apply_liger_kernel_to_llama` on torch stand-ins."""
    norm = stand_in(lambda x, weight, eps, *rest: functional.rms_norm(x, (x.shape[-1],), weight, eps))
    gate = stand_in(lambda a, b, *rest: functional.silu(a) * b)
    loss = stand_in(cross_entropy)
    four = type("Loss", (), {"apply": staticmethod(lambda *args: (loss.apply(*args), None, None, None))})
    monkeypatch.setattr("liger_kernel.transformers.rms_norm.LigerRMSNormFunction", norm)
    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", gate)
    monkeypatch.setattr("liger_kernel.transformers.functional.LigerFusedLinearCrossEntropyFunction", four)
    return lambda model=None: liger_transformers.apply_liger_kernel_to_llama(rope=False, model=model)


@pytest.mark.parametrize("when", ["class", "before", "after"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_before_and_after(liger, when, lora):
    inputs = batch(2, 64)
    inputs["labels"][:, 20:] = -100
    expected = step(with_lora(tiny("llama")) if lora else tiny("llama"), inputs)
    if when == "class":
        liger()
    model = tiny("llama")
    if when == "before":
        liger(model)
    adapted = with_lora(model) if lora else model
    lemo_fx.transform(adapted, plan(1.0, score="random"))
    if when == "after":
        liger(model)
    assert "Liger" in str(type(model.model.layers[0].mlp)) + str(vars(model.model.layers[0].mlp).get("forward"))
    assert_same_step(step(adapted, inputs), expected, "fp32")
    for score in ("measured", "random"):
        lemo_fx.transform(adapted, plan(score=score))
        with Recorder(adapted) as seen:
            step(adapted, inputs)
        # Labels reach the layers through Liger's forward too: those of tokens 8 to 19 lie in blocks 0 to 2.
        assert all(set(range(24)) <= set(row.tolist()) for tokens in seen.tokens.values() for row in tokens[0])
    assert any("not segmented" in note for note in lemo_fx.report(adapted).notes)
    assert_same_step(step(lemo_fx.revert(adapted), inputs), expected, "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run there")
def test_without_a_gpu_it_is_refused():
    model = tiny("llama")
    liger_transformers.apply_liger_kernel_to_llama(model=model)
    with pytest.raises(lemo_fx.UnsupportedModelError, match="could not be tried on rows"):
        lemo_fx.transform(model, plan())
