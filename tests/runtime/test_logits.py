"""Logits of a step whose loss is computed in segments: there once they are used, and never before."""

import copy
import io

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.utils.operations import ConvertOutputsToFp32
from tiny import TOLERANCE, Largest, assert_same_step, batch, gradients, step, tiny, with_lora
from torch.nn import functional
from training import arguments, losses

import lemo_fx
from lemo_fx import InputError, LemoConfig
from lemo_fx.runtime import loss as in_segments
from lemo_fx.runtime.logits import LateLogits

HEAD = LemoConfig(attention=None, mlp=None)


def own_loss(outputs, labels):
    weights = torch.ones(97)
    weights[5] = 3
    return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weights)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gpt2", "opt"])
def test_values_shape_and_dtype(architecture, training, monkeypatch):
    monkeypatch.setattr(in_segments, "MOST_LOGITS", 2**10)
    model, inputs = tiny(architecture).train(training), batch(2, 43)
    expected = model(**inputs).logits
    lemo_fx.transform(model, HEAD)
    late = model(**inputs).logits
    with Largest() as seen:
        assert (late.shape, late.dtype, late.device) == (expected.shape, expected.dtype, expected.device)
        assert (late.requires_grad, late.ndim, len(late.size())) == (True, 3, 3)
        assert late.done is None
        assert isinstance(late, torch.Tensor)
    assert seen.numel == 0
    assert torch.equal(late, expected)
    for use in (lambda x: x[0, 3], lambda x: x.argmax(-1), lambda x: 2 * x, lambda x: torch.cat([x, x]), repr):
        found = use(model(**inputs).logits)
        assert type(found) in (torch.Tensor, str)
        assert str(found) == str(use(expected))
    out = model(**inputs)
    assert torch.equal(out["logits"], expected)
    assert torch.equal(out.to_tuple()[1], expected)
    assert torch.equal(copy.deepcopy(late.detach()), expected)
    file = io.BytesIO()
    torch.save(late.detach(), file)


@pytest.mark.parametrize("lora", [None, "all-linear", ["lm_head"]])
def test_a_loss_of_ones_own_from_the_logits(lora):
    model, inputs = tiny("llama"), batch(2, 43)
    model = with_lora(model, targets=lora) if lora else model

    def both():
        model.zero_grad()
        out = model(**inputs)
        with torch.no_grad():
            assert out.logits.argmax(-1).shape == (2, 43)
        loss = own_loss(out, inputs["labels"]) + out.loss
        loss.backward()
        return loss.detach(), gradients(model)

    expected = both()
    lemo_fx.transform(model, HEAD)
    assert_same_step(both(), expected, "fp32")


def test_autocast_counts_where_the_call_was():
    model, inputs = tiny("llama"), batch(2, 43)

    def logits():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).logits

    expected = logits()
    lemo_fx.transform(model, HEAD)
    late = logits()
    assert late.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(late, expected)


class Passes(torch.autograd.Function):
    """What DDP passes a model's outputs through where parameters may be unused."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def test_what_wrappers_do_to_every_output_computes_nothing():
    model, inputs = lemo_fx.transform(tiny("llama", vocab_size=2003), HEAD), batch(2, 64)
    with Largest() as seen:
        out = ConvertOutputsToFp32(lambda: model(**inputs))()
        assert isinstance(out.logits, LateLogits)
        assert isinstance(out.logits.float().clone().detach(), LateLogits)
        # FSDP2 and DDP.
        assert out.logits._base is None
        loss, out.logits = Passes.apply(out.loss, out.logits)
        loss.backward()
    assert seen.numel < 2 * 64 * 2003
    out = model(**inputs)
    assert out.logits.bfloat16().float().shape == (2, 64, 2003)
    assert not out.logits.detach().sum().requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs)
    assert accelerate.utils.convert_outputs_to_fp32(lambda: low)().logits.sum().dtype == torch.float32


def test_too_late_and_past_torch():
    class Past(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.sum()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.expand(2, 43, 97)

    model, inputs = lemo_fx.transform(tiny("llama"), HEAD), batch(2, 43)
    out = model(**inputs)
    with pytest.raises(InputError, match="return_logits=True"):
        Past.apply(out.logits).backward()
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(InputError, match="weights have changed"):
        out.logits.sum()


@pytest.mark.slow
def test_a_compiled_model_names_the_way_to_get_them():
    model, inputs = lemo_fx.transform(tiny("llama"), HEAD), batch(2, 43)
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(**inputs)
    torch.testing.assert_close(out.loss, expected[0], **TOLERANCE["compiled"])
    for use in (lambda x: x[0], lambda x: x.float(), lambda x: torch.argmax(x, -1)):
        with pytest.raises(InputError, match="return_logits=True"):
            use(out.logits)
    assert compiled(**inputs, return_logits=True).logits.shape == (2, 43, 97)


class Weighted(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = own_loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_that_computes_its_loss_from_the_logits(bf16, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in batch(4, 64)["input_ids"]]

    def run(transformed):
        model = lemo_fx.transform(tiny("llama"), HEAD) if transformed else tiny("llama")
        trainer = Weighted(model, arguments(tmp_path, bf16=bf16), train_dataset=rows)
        trainer.train()
        return losses(trainer)

    assert run(True) == pytest.approx(run(False), rel=2e-2 if bf16 else 1e-4)


def test_a_short_evaluation_has_the_very_bits_of_the_original():
    model = tiny("llama", vocab_size=2003).eval()
    inputs = [batch(1, 64, seed=seed) for seed in range(8)]
    expected = [model(**one).loss for one in inputs]
    lemo_fx.transform(model, HEAD)
    assert [model(**one).loss for one in inputs] == expected


@pytest.mark.parametrize("only_loss", [True, False])
def test_an_evaluation_by_the_trainer(only_loss, tmp_path, monkeypatch):
    """Of the loss alone, full logits are never made; metrics get them."""
    monkeypatch.setattr(in_segments, "MOST_LOGITS", 2**14)
    rows = [{"input_ids": row, "labels": row} for row in batch(2, 64)["input_ids"]]
    seen, found = [], []
    for transformed in (False, True):
        model = tiny("llama", vocab_size=2003)
        model = lemo_fx.transform(model, HEAD) if transformed else model
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path, prediction_loss_only=only_loss, per_device_eval_batch_size=1),
            eval_dataset=rows,
            compute_metrics=None if only_loss else lambda given: {"sum": float(given.predictions.sum())},
        )
        with Largest() as largest:
            found.append(
                {name: value for name, value in trainer.evaluate().items() if name in ("eval_loss", "eval_sum")}
            )
        seen.append(largest.numel)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert seen[0] >= 64 * 2003
    assert (seen[1] < 64 * 2003) == only_loss


def test_peft_that_makes_its_loss_of_the_logits():
    ids = batch(2, 43)["input_ids"]
    settings = {"cpt_token_ids": [12, 13, 14, 15], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    found = []
    for transformed in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny("llama"), peft.CPTConfig(**settings, task_type="CAUSAL_LM")).train()
        model = lemo_fx.transform(model, HEAD) if transformed else model
        mask = torch.ones_like(ids)
        found.append(
            step(model, {"input_ids": ids, "labels": ids, "attention_mask": mask, "input_type_mask": 4 * mask})
        )
    assert_same_step(found[1], found[0], "fp32")


class Other(transformers.LlamaForCausalLM):
    """A head that makes its loss module while it runs, as remote code does."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs)[0])
        loss = torch.nn.CrossEntropyLoss()(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_loss_module_made_in_the_forward_is_left_alone():
    model = tiny("llama")
    model.__class__ = Other
    inputs = batch(2, 43)
    expected = step(model, inputs)
    lemo_fx.transform(model, HEAD)
    assert any("loss not segmented" in note for note in lemo_fx.report(model).notes)
    assert_same_step(step(model, inputs), expected, "fp32")
