"""The loss in segments is the model's own loss, without full logits."""

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    NO_SDPA,
    TOLERANCE,
    VOCABULARY,
    Largest,
    assert_same_step,
    batch,
    gradients,
    step,
    tiny,
    with_lora,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lemo_fx
from lemo_fx import LemoConfig, distributed
from lemo_fx.runtime import loss as segmented
from lemo_fx.runtime.logits import LateLogits


def only_loss(segments="auto", **settings):
    return LemoConfig(**({"attention": None, "mlp": None, "loss_segments": segments} | settings))


def compare(model, inputs, segments="auto", tolerance="fp32"):
    expected = step(model, inputs)
    lemo_fx.transform(model, only_loss(segments))
    found = step(model, inputs)
    assert_same_step(found, expected, tolerance)


@pytest.mark.parametrize("segments", [1, 2, 7, "auto"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_segments(architecture, segments):
    compare(tiny(architecture), batch(2, 43, padding="right"), segments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture):
    assert architecture in NO_SDPA or tiny(architecture).config._attn_implementation == "sdpa"
    model = tiny(architecture)
    compare(model, batch(2, 43))
    assert isinstance(model(**batch(2, 43)).logits, LateLogits)
    assert not any("not segmented" in note for note in lemo_fx.report(model).notes)


@pytest.mark.parametrize("count", [11, torch.tensor(11), torch.tensor(11.0)])
def test_num_items_in_batch(count):
    compare(tiny("llama"), {**batch(2, 43), "num_items_in_batch": count})


def test_shift_labels():
    inputs = batch(2, 43)
    shifted = torch.cat([inputs["labels"][:, 1:], torch.full((2, 1), -100)], 1)
    shifted[0, 5] = 3
    compare(tiny("llama"), {**inputs, "shift_labels": shifted})


def test_ignore_index():
    inputs = batch(2, 43)
    inputs["labels"][inputs["labels"] == -100] = 7
    compare(tiny("llama"), {**inputs, "ignore_index": 7})


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(7)}])
@pytest.mark.parametrize("adapted_head", [False, True])
def test_no_labels_give_torchs_loss_and_no_gradient(items, adapted_head):
    inputs = {**batch(2, 43), **items}
    inputs["labels"][:] = -100
    model = with_lora(tiny("llama"), targets=["q_proj", "lm_head"] if adapted_head else ["q_proj"])
    expected = model(**inputs).loss
    lemo_fx.transform(model, only_loss())
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("keep", [10, slice(-10, None), slice(0, 10), torch.arange(3, 13)])
def test_logits_to_keep(architecture, keep):
    inputs = batch(2, 43)
    where = slice(-keep, None) if isinstance(keep, int) else keep
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:][:, where]
    compare(tiny(architecture), {**inputs, "logits_to_keep": keep, "shift_labels": shifted.contiguous()})


def test_logits_to_keep_that_do_not_meet_their_labels():
    model = lemo_fx.transform(tiny("llama"), only_loss())
    with pytest.raises(lemo_fx.InputError, match="logits_to_keep"):
        model(**batch(2, 43), logits_to_keep=10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_tied_and_frozen_heads(tied, frozen):
    model = tiny("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.lm_head.weight.requires_grad_(not frozen)
    compare(model, batch(2, 43))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("how", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head(how, before):
    model = tiny("llama")
    inputs = batch(2, 43)
    if before:
        lemo_fx.transform(model, only_loss())
        model = with_lora(model, **how)
        found = step(model, inputs)
        lemo_fx.revert(model)
        assert_same_step(found, step(model, inputs), "fp32")
    else:
        compare(with_lora(model, **how), inputs)


def test_a_hooked_head_runs_its_hook():
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    compare(model, batch(2, 43))


def test_autocast():
    model, inputs = tiny("llama"), batch(2, 43)
    found = []
    for transformed in (False, True):
        if transformed:
            lemo_fx.transform(model, only_loss())
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(model, inputs))
    assert_same_step(found[1], found[0], "bf16")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lora", [None, "body", "head"])
def test_full_logits_never_exist(architecture, lora):
    model = tiny(architecture, 1, vocab_size=2003)
    if lora:
        model = with_lora(model, targets="all-linear" if lora == "body" else ["lm_head"])
    inputs = batch(2, 64)
    full = 2 * 64 * 2003
    with Largest() as seen:
        model(**inputs).loss.backward()
    assert seen.numel >= full, "the original does make them: this test can tell"
    lemo_fx.transform(model, only_loss(4))
    with Largest() as seen:
        model(**inputs).loss.backward()
    assert seen.numel <= full / 2


def test_evaluation_gives_logits_as_before():
    model, inputs = tiny("llama").eval(), batch(2, 43)
    before = model(**inputs)
    lemo_fx.transform(model, only_loss())
    after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    torch.testing.assert_close(after.loss, before.loss, **TOLERANCE["fp32"])


def test_no_labels_gives_logits_in_training():
    model, inputs = tiny("llama"), batch(2, 43)["input_ids"]
    before = model(inputs).logits
    lemo_fx.transform(model, only_loss())
    assert torch.equal(model(inputs).logits, before)
    assert torch.equal(model(inputs, labels=None).logits, before)


def test_a_tuple_holds_the_logits_in_their_place():
    model, inputs = tiny("llama"), {**batch(2, 43), "use_cache": False, "return_dict": False}
    expected = model(**inputs)
    lemo_fx.transform(model, only_loss())
    assert len(expected) == 2
    torch.testing.assert_close(model(**inputs), expected, **TOLERANCE["fp32"])
    assert isinstance(model(**{**inputs, "return_dict": True}).logits, LateLogits)
    site = lemo_fx.Elimination(keep=0.5)
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
    loss, logits = model(**inputs)
    assert not torch.allclose(logits, expected[1]), "the layers stay sparse"
    torch.testing.assert_close(model(**{**inputs, "return_dict": True}).loss, loss, **TOLERANCE["fp32"])


def test_positional_arguments_and_hidden_states():
    model, inputs = tiny("llama"), batch(2, 43, padding="right")
    before = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], output_hidden_states=True)
    lemo_fx.transform(model, only_loss())
    after = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], output_hidden_states=True)
    torch.testing.assert_close(after.loss, before.loss, **TOLERANCE["fp32"])
    assert len(after.hidden_states) == len(before.hidden_states)


def test_a_loss_function_of_the_users_own_is_called():
    model, inputs = tiny("llama"), batch(2, 43)
    lemo_fx.transform(model, only_loss())
    model.loss_function = lambda logits, labels, **kwargs: logits.mean()
    assert torch.equal(model(**inputs).loss, model(inputs["input_ids"]).logits.mean())


def labelled(share, length=64):
    """Labels in one run of a share of the tokens, as an answer has them; the first sample has none."""
    inputs = batch(2, length)
    inputs["labels"][:] = -100
    inputs["labels"][1, length - int(share * 2 * length) :] = inputs["input_ids"][1, length - int(share * 2 * length) :]
    return inputs


@pytest.mark.parametrize("head", ["plain", "trained", "adapted", "softcapped"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("segments", ["auto", 7])
def test_the_head_runs_for_rows_with_labels_alone(share, segments, head):
    model = tiny("gemma2" if head == "softcapped" else "llama")
    if head in ("adapted", "plain"):
        model = with_lora(model, targets=["lm_head"] if head == "adapted" else "all-linear")
    inputs = labelled(share)
    expected = step(model, inputs)
    lemo_fx.transform(model, only_loss(segments))
    with Rows() as seen:
        found = step(model, inputs)
    if share:
        assert_same_step(found, expected, "fp32")
    else:
        assert found[0].isnan()
        assert not any(g.any() for g in found[1].values())
    assert max(seen.rows, default=0) <= max(1, int(share * 128))


class Rows(TorchDispatchMode):
    """Rows of every product into the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.lemo_fx.segmented_cross_entropy.default:
            self.rows.append(args[0].shape[0])
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and out.shape[1] == VOCABULARY:
            self.rows.append(out.shape[0])
        return out


def test_labels_everywhere_move_no_row():
    model = lemo_fx.transform(tiny("llama"), only_loss())
    with Rows() as seen:
        step(model, batch(2, 64))
    assert 128 in seen.rows


def test_a_recompute_of_the_whole_model_does_as_its_forward_did():
    model, inputs = lemo_fx.transform(tiny("llama"), only_loss()), labelled(0.05)
    expected = step(model, inputs)
    model.zero_grad()
    loss = checkpoint(lambda: model(**inputs).loss, use_reentrant=False)
    model(**batch(2, 64)).loss.detach()
    loss.backward()
    assert_same_step((loss.detach(), gradients(model)), expected, "fp32")


def test_a_compiled_model_reads_no_label_on_the_host():
    model, inputs = tiny("llama", 1), labelled(0.05)
    expected = step(model, inputs)
    lemo_fx.transform(model, only_loss())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step((*step(compiled, inputs)[:1], gradients(model)), expected, "compiled")
    torch.compiler.reset()


def test_two_losses_one_backward():
    model = lemo_fx.transform(tiny("llama"), only_loss())
    one, two = batch(2, 43), batch(2, 43, seed=1)
    expected = step(model, one)[1], step(model, two)[1]
    model.zero_grad()
    (model(**one).loss + 2 * model(**two).loss).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[0][name] + 2 * expected[1][name], **TOLERANCE["fp32"])


def test_without_labels_one_row_is_left_to_launch_kernels_on():
    rows, targets = segmented._labelled(torch.randn(5, 3), torch.full((5,), -100), -100)
    assert rows.shape == (1, 3)
    assert targets.tolist() == [-100]


def test_a_head_called_once_keeps_a_forward_of_its_own():
    """A compiled or wrapped one, as an attribute of the module, is there again after a sharded head's loss."""
    head = torch.nn.Linear(4, 2)
    assert distributed.call_once(head, lambda x: x + 1, torch.zeros(4)).tolist() == [1, 1, 1, 1]
    assert "forward" not in vars(head)
    head.forward = own = lambda x: x * 0
    assert distributed.call_once(head, lambda x: x + 1, torch.zeros(4)).tolist() == [1, 1, 1, 1]
    assert head.forward is own
