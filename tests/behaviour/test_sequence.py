"""Ranks that share a sequence: loss, gradients and choices are one process's, and nothing hangs when a rank fails."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import ended, start
from tiny import TOLERANCE, VOCABULARY, Recorder, assert_same_step, batch, packed, step, tiny, with_lora
from transformers import AutoModelForCausalLM

import lemo_fx
from lemo_fx import Elimination, LemoConfig, distributed
from lemo_fx.graph.anatomy import anatomy_of
from lemo_fx.kernels.block_scores import reference as scoring
from lemo_fx.kernels.select_blocks import reference as selection
from lemo_fx.planning.proof_of_parts import prove_parts
from lemo_fx.runtime import parts

SHARED = Path(__file__).parents[1] / "helpers" / "shared.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "checks"),
    [(2, ()), (4, ("losses_and_gradients_equal_those_of_one_process", "samples_and_parts_on_a_mesh"))],
)
def test_ranks(count, checks, tmp_path):
    """See tests/helpers/shared.py for what the ranks check."""
    assert ended(*start(SHARED, tmp_path, count, str(tmp_path), *checks), 600) == [0] * count


@pytest.mark.slow
def test_a_rank_that_fails_does_not_hang_the_others(tmp_path):
    """It ends in the middle of a step; the other one is in an exchange, and says so."""
    processes, logs = start(SHARED, tmp_path, 2, str(tmp_path), "one_rank_fails")
    codes = ended(processes, logs, 500)
    assert codes[0] == 0
    assert codes[1] == 7


@pytest.mark.slow
def test_the_example(tmp_path):
    assert ended(*start(SHARED, tmp_path, 2, str(tmp_path), "the_example"), 500) == [0, 0]
    assert "loss" in (tmp_path / "rank0.log").read_text()
    base = AutoModelForCausalLM.from_pretrained(Path(lemo_fx.__file__).parent / "demo_assets" / "model")
    adapter = PeftModel.from_pretrained(base, tmp_path / "example")
    assert all(p.abs().max() > 0 for n, p in adapter.named_parameters() if "lora_B" in n)


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    assert ended(*start(SHARED, tmp_path, 2, str(tmp_path), "the_benchmark"), 500) == [0, 0]
    result = json.loads((tmp_path / "scaling" / "tiny-2.json").read_text())
    (run,) = result["runs"]
    assert run["samples"] == 1
    assert run["loss"] == pytest.approx(run["loss_one_process"], rel=1e-6)
    assert 0 < run["communication_share"] < 1
    assert result["gate"]["sequence"]["gradient"] < 1e-4


def config(keep=0.5, treatment="exact", score="step", **more) -> LemoConfig:
    site = Elimination(keep=keep, eliminated=treatment, score=score)
    return LemoConfig(site, site, **{"block_size": 8, "dense_layers": (), **more})


def test_every_part_keeps_as_many_blocks():
    """Chosen from each part as from a sequence of its own; the whole choice is what other parts' would be."""
    model = lemo_fx.transform(tiny("llama"), config(0.5, sequence_parts=4))
    with Recorder(model) as recorder:
        step(model, batch(2, 128))
    for choices in recorder.tokens.values():
        for tokens in choices:
            assert tokens.shape == (2, 64)
            assert torch.equal((tokens // 32).sort().values, tokens // 32)
            assert all(torch.equal((row // 32).bincount(), torch.full((4,), 16)) for row in tokens)


def test_a_part_alone_chooses_as_in_the_whole():
    stream = torch.randn(2, 96, 16)
    whole = scoring.random_scores(stream, torch.tensor([3]), 8, parts=3)
    for number, part in enumerate(stream.chunk(3, dim=1)):
        own = scoring.random_scores(part, torch.tensor([3]), 8, first=number)
        assert torch.equal(own, whole[:, 4 * number : 4 * number + 4])
    assert torch.equal(scoring.random_scores(stream, torch.tensor([3]), 8, parts=1)[:, :0], whole[:, :0])
    labelled = torch.rand(2, 96) < 0.03
    tokens = selection.select_blocks(whole, None, labelled, 96, 8, (1, 2), parts=3)
    for number in range(3):
        here = slice(32 * number, 32 * number + 32)
        own = selection.select_blocks(whole[:, 4 * number : 4 * number + 4], None, labelled[:, here], 32, 8, (1, 2))
        assert torch.equal(tokens[:, 16 * number : 16 * number + 16], own + 32 * number)


def test_parts_of_no_whole_blocks():
    model = lemo_fx.transform(tiny("llama"), config(sequence_parts=4))
    with pytest.raises(lemo_fx.InputError, match="pad its end to a multiple of 32"):
        model(**batch(1, 72))


@pytest.mark.parametrize("layers", [(), (0,), (0, 1)])
def test_the_choice_is_the_first_layers(layers):
    """Dense or not, it draws from the embeddings: the same choice however the layers are computed."""
    choices = []
    for scale in (1.0, 1.0 + 1e-6):
        model = with_lora(tiny("llama", 3))
        settings = config(0.5, dense_layers=layers, sequence_parts=2)
        lemo_fx.transform(model, settings)
        model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.data *= scale
        with Recorder(model) as recorder:
            step(model, batch(1, 256))
        choices.append(recorder.tokens)
    for one, other in zip(*(found.values() for found in choices), strict=True):
        assert torch.equal(one[0], other[0])


def test_what_a_part_is_told():
    """No rows for plain causal order, one for padding at the end, two for documents or other padding."""
    assert parts.tell(None, None).shape == (1, 1, 0, 0)
    end = torch.tensor([[True, True, False]])
    assert parts.tell(end, None).tolist() == [[[[1, 1, 0]]]]
    begin = torch.tensor([[False, True, True]])
    assert parts.tell(begin, None).tolist() == [[[[0, 1, 1], [-1, 0, 0]]]]
    restarting = torch.tensor([[0, 1, 0]])
    assert parts.tell(None, restarting).tolist() == [[[[1, 1, 1], [0, 0, 1]]]]
    assert parts.tell(end, None, torch.tensor([[5, -100, -100]])).shape == (1, 1, 1, 3)
    assert parts.tell(end, None, torch.tensor([[5, 6, 7]])).tolist() == [[[[1, 1, 0], [0, 0, -1]]]]
    assert parts.tell(end, restarting).tolist() == [[[[1, 1, 0], [0, 0, -1]]]]
    for rows in (parts.tell(None, None), parts.tell(end, None)):
        assert parts.is_told(rows)
    assert not parts.is_told(torch.zeros(1, 1, 3, 3))
    assert not parts.is_told(torch.ones(1, 3, dtype=torch.int64))


def test_one_rank_alone(gloo):
    """A group of one: what several ranks do, without another."""
    inputs = batch(2, 64)
    expected = step(lemo_fx.transform(tiny("llama"), config()), inputs)
    model = lemo_fx.transform(tiny("llama"), config(), sequence_group=gloo)
    assert_same_step(step(model, lemo_fx.shard_sequence(model, inputs)), expected, "fp32")
    assert "each sequence is shared by 1 ranks" in str(lemo_fx.report(model))
    lemo_fx.revert(model)
    assert_same_step(step(model, inputs), step(tiny("llama"), inputs), "same")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"fused_lm_head": True}, "with the whole sequences"),
        ({"return_dict": False}, "return_dict=True"),
        ({"output_router_logits": True}, "auxiliary loss of a part"),
        ({"attention_mask": torch.ones(1, 64)}, "the batch holds shift_labels"),
        ({"num_items_in_batch": None}, "num_items_in_batch"),
    ],
)
def test_calls_that_a_part_cannot_make(more, why, gloo):
    model = lemo_fx.transform(tiny("mixtral"), config(), sequence_group=gloo)
    part = lemo_fx.shard_sequence(model, batch(1, 64))
    with pytest.raises(lemo_fx.InputError, match=why):
        model(**{**part, **more})


def test_a_call_looks_once_at_how_the_process_is_set_up(gloo, monkeypatch):
    model = lemo_fx.transform(tiny("llama"), config(), sequence_group=gloo)
    shared_by, refuse = [], distributed.refuse_process
    monkeypatch.setattr(
        distributed, "refuse_process", lambda model, ranks=1: shared_by.append(ranks) or refuse(model, ranks)
    )
    model(**batch(1, 64))
    model.eval()(**batch(1, 64))
    assert shared_by == [1]


def test_a_whole_batch(gloo):
    """The model cuts it: the loss is the whole one, as are values of tokens; logits would not be."""
    model = lemo_fx.transform(tiny("llama"), config(), sequence_group=gloo)
    inputs = packed([40, 17])
    expected = step(model, lemo_fx.shard_sequence(model, inputs))
    unread = {"cu_seq_lens_q": torch.tensor([0, 40, 57]), "output_hidden_states": False, "logits_to_keep": 0}
    assert_same_step(step(model, {**inputs, **unread}), expected, "same")
    output = model(**inputs)
    assert output.logits.shape == (1, 57, VOCABULARY)
    with pytest.raises(lemo_fx.InputError, match="logits of its part only"):
        output.logits.sum()


PADDED = {"left": slice(0, 40), "a hole": slice(20, 45), "right": slice(40, 64), "a whole row": slice(None)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", PADDED)
def test_padding_that_predicts_labels(where, attention, gloo):
    """Most collators count the first token after padding, some the padding itself; it sees what is real before it."""
    mask, ids = torch.ones(2, 64, dtype=torch.long), batch(2, 64)["input_ids"]
    mask[1, PADDED[where]] = 0
    inputs, steps = {"input_ids": ids, "labels": ids, "attention_mask": mask}, []
    for treatment in ("exact", "skip"):
        for group in (None, gloo):
            model = tiny("llama", attention=attention)
            steps.append(step(lemo_fx.transform(model, config(0.5, treatment), sequence_group=group), inputs))
        assert_same_step(steps[-1], steps[-2], "fp32")


def test_batches_that_differ_in_anything():
    """The same numbers in other places, rows in another order, another count of labels."""
    cpu, inputs = torch.device("cpu"), {**batch(2, 64, padding="both"), "num_items_in_batch": torch.tensor(90)}
    found = [int(parts._content({**inputs, "num_items_in_batch": 91}, cpu))]
    for name in ("input_ids", "labels", "attention_mask"):
        value = inputs[name]
        others = (None, value.flip(0), value.flip(1), value.roll(1, 1), value[:1], value[:, :32])
        found += [int(parts._content({**inputs, name: other}, cpu)) for other in others]
    expected = int(parts._content(inputs, cpu))
    assert len({expected, *found}) == 1 + len(found)
    assert expected == int(parts._content({**inputs, "num_items_in_batch": 90}, cpu))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_positions_that_restart(checkpointing, gloo):
    """They are documents where the original model takes them for some: not where it makes a cache."""
    inputs = {name: value for name, value in packed([40, 24]).items() if name != "use_cache"}
    steps = []
    for group in (None, gloo):
        model = lemo_fx.transform(tiny("llama"), config(), sequence_group=group)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        steps.append(step(model, inputs))
    assert_same_step(*reversed(steps), "fp32")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"labels": None}, "call it with labels"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.ones(1, 64, 32), "input_ids": None}, "inputs_embeds"),
        ({"cache_position": torch.arange(64)}, "cache_position"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask"),
        ({"return_dict": False}, "return_dict=True"),
        ({"use_cache": True}, "use_cache=False"),
    ],
)
def test_whole_batches_that_are_not_cut(more, why, gloo):
    model = lemo_fx.transform(tiny("llama"), config(), sequence_group=gloo)
    with pytest.raises(lemo_fx.InputError, match=why):
        model(**{**batch(1, 64), **more})


def test_values_of_tokens(gloo):
    """What TRL's fused head returns for each token [B, S - 1], and its gradient."""
    utils = pytest.importorskip("trl.trainer.utils")
    inputs, found = {**batch(2, 61), "fused_lm_head": True}, []
    for group in (None, gloo):
        model = lemo_fx.transform(tiny("llama"), config(), sequence_group=group)
        utils.add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
        output = model(**inputs)
        output.log_probs.square().sum().backward()
        found.append((output.log_probs, output.is_top1, output.label_mask, model.lm_head.weight.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **TOLERANCE["fp32"])


def test_layers_alone(gloo):
    model = lemo_fx.transform(tiny("llama"), config(), sequence_group=gloo)
    part = lemo_fx.shard_sequence(model, batch(1, 64))
    with pytest.raises(lemo_fx.InputError, match="without being told"):
        model.model(input_ids=part["input_ids"])


def test_a_model_compiled_as_a_whole(gloo):
    model = lemo_fx.transform(tiny("llama"), config(), sequence_group=gloo)
    inputs = batch(1, 64)
    expected = step(model, inputs)
    loss, found = step(torch.compile(model, backend="eager"), inputs)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    assert_same_step((loss, found), expected, "compiled")


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_batches_are_padded(gloo, size):
    """To whole blocks in every part; padding is no token, no label and no document."""
    inputs = {**batch(1, 61), "position_ids": torch.cat([torch.arange(40), torch.arange(21)])[None]}
    pieces = [
        parts.shard(inputs, dataclasses.replace(parts.SequenceGroup.of(gloo), rank=rank, size=size), 8 * size)
        for rank in range(size)
    ]
    whole = {
        name: torch.cat([part[name] for part in pieces], dim=1) for name in ("input_ids", "labels", "shift_labels")
    }
    padded = -(-61 // (8 * size)) * 8 * size
    assert all(value.shape == (1, padded) for value in whole.values())
    assert torch.equal(whole["input_ids"][:, :61], inputs["input_ids"])
    assert torch.equal(whole["shift_labels"][:, :60], inputs["labels"][:, 1:])
    assert (whole["labels"][:, 61:] == -100).all()
    assert (whole["shift_labels"][:, 60:] == -100).all()
    assert {int(part["num_items_in_batch"]) for part in pieces} == {int((inputs["labels"][:, 1:] != -100).sum())}
    real, documents = pieces[0]["attention_mask"][0, 0]
    assert real.tolist() == [1] * 61 + [0] * (padded - 61)
    assert documents.tolist() == [0] * 40 + [1] * 21 + [-1] * (padded - 61)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
SHORT = {"original_max_position_embeddings": 64}
UNPROVEN = {
    "documents ignored": (lambda: tiny("opt"), "the mask of layer 0"),
    "position embeddings by the longest position": (
        lambda: tiny("phi3", rope_parameters={**LONG, "rope_theta": 1e4, **SHORT}, **SHORT),
        "position_embeddings of layer 0",
    ),
    "a loss of its own": (lambda: _with_another_loss(tiny("llama")), "losses add up"),
    "positions ignored": (lambda: _without_positions(tiny("llama")), "position_embeddings of layer 0"),
}
REFUSED = {
    "positions from the mask": (lambda: tiny("opt"), "hidden_states of layer 0 is another for a part"),
    "positions that stretch": (
        lambda: tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type 'dynamic'",
    ),
    "no loss": (lambda: tiny("llama").model, "no loss head"),
    "a forward of its own": (lambda: _with_forward(tiny("llama")), "a forward of its own"),
    "flex attention": (lambda: tiny("llama", attention="flex_attention"), "attn_implementation='sdpa'"),
}


def _with_another_loss(model):
    loss = model.loss_function
    model.loss_function = lambda *args, num_items_in_batch=None, **kwargs: loss(*args, **kwargs)
    return model


def _without_positions(model):
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])
    return model


def _with_forward(model):
    model.forward = functools.partial(type(model).forward, model)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_sequences_cannot_be_shared(name, gloo):
    make, why = REFUSED[name]
    model = make()
    kept = [vars(module).copy() for module in model.modules()]
    with pytest.raises(lemo_fx.UnsupportedModelError, match=why):
        lemo_fx.transform(model, config(), sequence_group=gloo)
    assert [vars(module).keys() for module in model.modules()] == [attributes.keys() for attributes in kept]


@pytest.mark.parametrize("name", UNPROVEN)
def test_parts_that_are_no_parts(name):
    make, why = UNPROVEN[name]
    assert why in prove_parts(anatomy_of(make()), 2)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "phi", "gpt2"])
def test_parts_are_proven(architecture):
    """A probe of two documents and one with padding, cut into parts."""
    assert not prove_parts(anatomy_of(tiny(architecture, 3)), 4)


def test_settings():
    with pytest.raises(lemo_fx.ConfigError, match="sequence_parts=0"):
        LemoConfig(sequence_parts=0)
    with pytest.raises(lemo_fx.ConfigError, match="threshold"):
        LemoConfig(Elimination(threshold=0.1), sequence_parts=2)
