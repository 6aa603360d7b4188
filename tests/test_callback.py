"""The Trainer callbacks: what reporters get, the dense finish, and resuming."""

import pytest
import torch
from tiny import Recorder, assert_same_step, batch, step, tiny, with_lora
from torch._dynamo.testing import CompileCounterWithBackend
from training import Rows, losses, plan, run
from transformers import TrainerCallback

import lemo_fx
from lemo_fx import DenseFinish, LemoCallback
from lemo_fx.callback import _kept_shares
from lemo_fx.fitting.training import Recipe
from lemo_fx.measure import saved_bytes


class Reporter(TrainerCallback):
    """Stands where TensorBoard stands: made by the Trainer, hence before every added callback."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})


@pytest.fixture(scope="module")
def predictors():
    rows = [Rows()[i]["input_ids"] for i in range(4)]
    return lemo_fx.fit(tiny("llama"), rows, plan(), recipe=Recipe(width=4, epochs=2), progress=False)


@pytest.fixture
def predicted(predictors):
    """Makes a model with predictors in every site."""
    return lambda: lemo_fx.transform(with_lora(tiny("llama"), dropout=0.1), plan(), predictors=predictors)


def logged(model, folder, recall_every=None, **settings):
    reporter = Reporter()
    trainer = run(
        model, folder, None, callbacks=[lambda _: reporter, lambda t: LemoCallback(t, recall_every)], **settings
    )
    entries = [{k: v for k, v in e.items() if k != "epoch"} for e in trainer.state.log_history if "loss" in e]
    reported = [{k: v for k, v in e.items() if k != "epoch"} for e in reporter.logs if "loss" in e]
    assert entries[-len(reported) :] == reported
    return entries, trainer


def test_reporters_get_kept_share_memory_and_recall(predicted, tmp_path):
    entries, trainer = logged(predicted(), tmp_path, 2, eval_strategy="steps", eval_steps=3)
    assert all(e["lemo/kept_attention"] == e["lemo/kept_mlp"] == 0.5 for e in entries)
    assert all(e["lemo/peak_memory_gib"] > 0.05 for e in entries)
    with_recall = [e["step"] for e in entries if "lemo/recall_attention" in e and "lemo/recall_mlp" in e]
    assert with_recall == [2, 4, 6]
    assert all(0.25 <= e["lemo/recall_mlp"] <= 1 for e in entries if e["step"] in with_recall)
    assert not any("lemo/kept_mlp" in e for e in trainer.state.log_history if "eval_loss" in e)
    assert not trainer.model._forward_pre_hooks


def test_tensorboard_gets_them(predicted, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged(predicted(), tmp_path, 2, report_to=["tensorboard"], max_steps=2)
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/lemo/kept_mlp", "train/lemo/recall_attention"} <= set(events.Tags()["scalars"])


def test_measuring_recall_changes_no_step(predicted, tmp_path):
    with_recall, _ = logged(predicted(), tmp_path, 1)
    without, _ = logged(predicted(), tmp_path, None)
    assert [e["loss"] for e in with_recall] == [e["loss"] for e in without]


def test_resume(predicted, tmp_path):
    def run_once(resume=None):
        entries, trainer = logged(predicted(), tmp_path, 2, save_strategy="steps", save_steps=3, resume=resume)
        return [{k: v for k, v in e.items() if k != "lemo/peak_memory_gib"} for e in entries], trainer

    entries, _ = run_once()
    again, _ = run_once(str(tmp_path / "checkpoint-3"))
    assert again == entries


def test_nothing_to_log_is_an_error(tmp_path):
    with pytest.raises(lemo_fx.NotTransformedError):
        logged(tiny("llama"), tmp_path)
    with pytest.raises(lemo_fx.ConfigError, match="recall_every"):
        LemoCallback(None, 0)


@pytest.mark.parametrize("padding", [None, "both"])
@pytest.mark.parametrize("keep", [{"keep": 0.5}, {"keep": 0.5, "balance": True}, {"threshold": 5.0}])
def test_recall_equals_the_overlap_of_two_models_choices(predictors, keep, padding):
    """`exact` leaves the stream as it is, so that a second model's measured choices are the true ones."""
    inputs = batch(2, 125, padding=padding)
    settings = {"keep": None} | keep | {"eliminated": "exact"}
    model = lemo_fx.transform(tiny("llama"), plan(**settings), predictors=predictors)
    chosen = []
    for one in (model, lemo_fx.transform(tiny("llama"), plan(**settings, score="measured"))):
        with Recorder(one) as seen:
            one(**inputs)
        chosen.append([set_of(tokens[0], inputs.get("attention_mask")) for tokens in seen.tokens.values()])
    random_state = torch.get_rng_state()
    found = [site.recall for site in lemo_fx.report(model, recall_on=inputs).sites]
    assert found == pytest.approx([len(p & m) / len(m) for p, m in zip(*chosen, strict=True)])
    assert min(found) < 1
    assert torch.equal(torch.get_rng_state(), random_state)


def set_of(tokens, mask):
    """{(row, token)} of the real tokens."""
    return {(b, int(t)) for b, row in enumerate(tokens) for t in row if mask is None or mask[b, t]}


def test_report_without_predictors_has_no_recall():
    model = lemo_fx.transform(tiny("llama"), plan())
    found = lemo_fx.report(model, recall_on=batch())
    assert all(site.recall is None for site in found.sites)
    assert "recall" not in str(found)


# --- the dense finish


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_dense_is_the_original_step(treatment, checkpointing):
    model, inputs = with_lora(tiny("llama")), batch(2, 61, padding="both")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    expected = step(model, inputs)
    lemo_fx.transform(model, plan(eliminated=treatment, score="random"))
    sparse = step(model, inputs)
    lemo_fx.set_dense(model)
    assert_same_step(step(model, inputs), expected, "fp32")
    assert "original code for now" in str(lemo_fx.report(model))
    assert _kept_shares(model) == {"lemo/kept_attention": 1.0, "lemo/kept_mlp": 1.0}
    lemo_fx.set_dense(model, False)
    assert_same_step(step(model, inputs), sparse, "same")


def test_dense_layers_are_checkpointed_as_the_original_ones_are():
    model, inputs = tiny("llama"), batch(2, 64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    original = saved_bytes(lambda: model(**inputs).loss.backward(), model)
    lemo_fx.set_dense(lemo_fx.transform(model, plan()))
    assert saved_bytes(lambda: model(**inputs).loss.backward(), model) <= original


def test_switching_compiles_twice():
    torch.compiler.reset()
    model, inputs = tiny("llama", 1), {**batch(2, 64), "use_cache": False}
    counter = CompileCounterWithBackend("eager")
    lemo_fx.transform(model, plan(score="random"))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = {}
    for dense in (False, True, False, True):
        lemo_fx.set_dense(model, dense)
        found = step(compiled, inputs)
        assert_same_step(found, expected.setdefault(dense, found), "same")
    assert counter.frame_count == 2


class Watch(TrainerCallback):
    def __init__(self):
        self.dense = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.dense.append(lemo_fx.report(model).dense)


def test_the_last_steps_of_a_run_are_dense_also_after_resuming(tmp_path):
    def finish(resume=None, share=0.34):
        model, watch = with_lora(tiny("llama")), Watch()
        trainer = run(
            model,
            tmp_path,
            plan(score="random"),
            resume,
            [lambda _: DenseFinish(share), lambda _: watch, LemoCallback],
            save_strategy="steps",
            save_steps=5,
            gradient_accumulation_steps=2,
        )
        assert not lemo_fx.report(model).dense
        assert list(losses(trainer, "lemo/kept_mlp").values())[-1] == (1.0 if share else 0.5)
        return watch.dense, losses(trainer)

    dense, expected = finish()
    assert dense == [False] * 4 + [True] * 2
    dense, again = finish(str(tmp_path / "checkpoint-5"))
    assert dense == [True]
    assert again == expected
    dense, sparse = finish(share=0)
    assert dense == [False] * 6
    assert [sparse[i] == expected[i] for i in range(1, 7)] == [True] * 4 + [False] * 2


def test_bad_shares_and_models():
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(lemo_fx.ConfigError, match="share"):
            DenseFinish(share)
    with pytest.raises(lemo_fx.NotTransformedError):
        lemo_fx.set_dense(tiny("llama"))
