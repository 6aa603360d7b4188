"""fit: true scores as targets, weights untouched, memory bounded, resumable."""

import importlib

import pytest
import torch
from processes import fit_and_be_killed_in, in_clean_process

import lemo_fx
from lemo_fx import Elimination, LemoConfig, PredictorError, Predictors
from lemo_fx.fitting.thresholds import Tuning
from lemo_fx.fitting.training import Recipe
from tests.helpers.tiny import TOLERANCE, VOCABULARY, tiny, with_lora

CONFIG = LemoConfig(block_size=8, dense_layers=())
RECIPE = Recipe(width=4, mlp_width=4, epochs=7)


def texts(count=12, length=64):
    return torch.randint(3, VOCABULARY, (count, length))


def fit(model, sequences, config=CONFIG, **settings):
    return lemo_fx.fit(model, sequences, config, **{"recipe": RECIPE, "progress": False, **settings})


def test_fit_changes_no_weight_and_leaves_nothing_behind():
    model = with_lora(tiny("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    predictors = fit(model, texts())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [name for name, _ in model.named_modules()] == modules
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert len(predictors.predictor_bytes) == 4
    assert all(predictors.has_predictor(i, "mlp") for i in range(2))
    record = predictors.record["training"]["layers.0.attention"]
    assert 0 <= record["recall"] <= 1
    assert len(record["losses"]) == 21
    assert record["heldout_losses"]
    lemo_fx.transform(model, CONFIG, predictors=predictors)
    assert {s.score for s in lemo_fx.report(model).sites if s.eliminated != "dense"} == {"predicted"}


@pytest.mark.parametrize("architecture", ["gpt_neox", "opt", "gemma3", "mixtral"])
def test_fit_and_transform_other_architectures(architecture):
    model = with_lora(tiny(architecture))
    predictors = fit(model, texts(3), recipe=Recipe(width=4, mlp_width=4, epochs=2))
    lemo_fx.transform(model, CONFIG, predictors=predictors)
    model(input_ids=texts(1), labels=texts(1)).loss.backward()


def test_targets_are_the_true_scores(tmp_path, monkeypatch):
    """What the profiling pass writes is what `score="measured"` ranks by: causal and with position embedding."""
    model, sequences = tiny("llama"), texts(3)
    monkeypatch.setattr(fit_function_module(), "_trained", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sequences, folder=tmp_path)
    work = tmp_path / "unfinished"
    profile = fit_function_module().Profile.read(work, 0)
    keep_all = Elimination(keep=1.0)
    config = LemoConfig(attention=keep_all, mlp=keep_all, block_size=8, dense_layers=(), active="always")
    lemo_fx.transform(model, config)
    seen = {}
    for kind in ("attention", "mlp"):
        part = next(m for n, m in model.named_modules() if n.endswith(f"layers.1.lemo_{kind}_score"))
        part.register_forward_hook(lambda _, __, out, kind=kind: seen.update({kind: out}))
    with torch.no_grad():
        model.eval()(input_ids=sequences)
    for kind, scores in seen.items():
        found = profile.blocks(work, f"layers.1.{kind}", 8)
        torch.testing.assert_close(found.block_scores, scores, **TOLERANCE["fp32"])
        torch.testing.assert_close(found.stream.float().square().mean(-1), torch.ones(3, 64), **TOLERANCE["compiled"])


@pytest.mark.parametrize("side", ["left", "right", "both", None])
def test_padding_is_left_out(side):
    """Rows with an attention_mask give what their real tokens give."""
    sequences = [row[: 64 - 9 * number].tolist() for number, row in enumerate(texts(3))]
    rows = []
    for ids in sequences:
        before = {"left": 64 - len(ids), "right": 0, "both": (64 - len(ids)) // 2, None: 0}[side]
        after = 0 if side is None else 64 - len(ids) - before
        mask = [0] * before + [1] * len(ids) + [0] * after
        rows.append({"input_ids": [1] * before + ids + [1] * after, "attention_mask": mask})
    rows[0]["attention_mask"] = torch.tensor(rows[0]["attention_mask"]).bool()
    rows[1]["attention_mask"] = rows[1]["attention_mask"] if side else None
    expected, found = fit(tiny("llama"), sequences), fit(tiny("llama"), rows)
    assert found.record["tokens"] == sum(map(len, sequences))
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


def fit_function_module():
    return importlib.import_module("lemo_fx.fitting.fit")


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_killed_run_goes_on_from_its_last_finished_layer(tmp_path, monkeypatch):
    """Killed by the system in the profiling pass, then again while training: no handler of Python's runs."""
    module = fit_function_module()
    sequences = texts()
    whole = fit(tiny("llama"), sequences)
    victims = {"statistics._append": 9, "fit.train": 2}
    in_clean_process(fit_and_be_killed_in, tmp_path, sequences.tolist(), CONFIG, RECIPE, victims)
    rest, real = [], module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: rest.append(1) or real(*a, **k))
    monkeypatch.setattr(module, "run_probes", stop)
    again = fit(tiny("llama"), sequences, folder=tmp_path)
    assert len(rest) == 2
    assert all(torch.equal(again.tensors[name], value) for name, value in whole.tensors.items())
    assert not (tmp_path / "unfinished").exists()
    assert Predictors.load(tmp_path).tensors.keys() == whole.tensors.keys()


def test_layers_in_groups_give_the_same(monkeypatch):
    whole = fit(tiny("llama"), texts := torch.randint(3, VOCABULARY, (4, 64)))
    monkeypatch.setattr(fit_function_module(), "SCRATCH", 1)
    passes, real = [], fit_function_module().run_probes
    monkeypatch.setattr(fit_function_module(), "run_probes", lambda *a: passes.append(a[2]) or real(*a))
    parts = fit(tiny("llama"), texts)
    assert passes == [[0], [1]]
    assert all(torch.equal(parts.tensors[name], value) for name, value in whole.tensors.items())


def test_other_arguments_do_not_resume(tmp_path, monkeypatch):
    module = fit_function_module()
    model, sequences = tiny("llama"), texts(4)
    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sequences, folder=tmp_path)
    monkeypatch.undo()
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    fresh = fit(model, sequences)
    resumed = fit(model, sequences, folder=tmp_path)
    assert all(torch.equal(resumed.tensors[name], value) for name, value in fresh.tensors.items())


def test_a_site_with_another_score_gets_no_predictor():
    config = LemoConfig(mlp=Elimination(score="random"), block_size=8, dense_layers=())
    predictors = fit(tiny("llama"), texts(2), config)
    assert predictors.has_predictor(0, "attention")
    assert not predictors.has_predictor(0, "mlp")
    assert predictors.stand_in(0, "mlp")


def test_thresholds_and_budgets(tmp_path):
    model = with_lora(tiny("llama", layers=3))
    keep = Elimination(keep=0.5)
    config = LemoConfig(attention=keep, mlp=keep, block_size=4, dense_layers=(0,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predictors = fit(model, texts(20, 64), config, thresholds=True, folder=tmp_path)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert model.training
    tuning = predictors.record["tuning"]
    assert (tuning["sequences"], tuning["length"], len(tuning["losses"])) == (2, 64, 4)
    loaded = Predictors.load(tmp_path)
    for kind in ("attention", "mlp"):
        budgets, thresholds = loaded.budgets(kind), loaded.thresholds(kind)
        assert (budgets[0], thresholds[0]) == (1.0, 0.0)
        # The mean share is the one asked for, up to one block of a sequence.
        assert sum(budgets[1:]) / 2 == pytest.approx(0.5, abs=1 / 16)
    for setting, read in (("threshold", loaded.thresholds), ("keep", loaded.budgets)):
        plan = LemoConfig(
            **{kind: Elimination(**{setting: read(kind)}) for kind in ("attention", "mlp")},
            block_size=4,
            dense_layers=(0,),
        )
        lemo_fx.transform(model, plan, predictors=loaded)
        model(input_ids=texts(1), labels=texts(1)).loss.backward()
        assert all(0 < s.kept_share <= 1 for s in lemo_fx.report(model).sites if s.eliminated != "dense")
    with pytest.raises(PredictorError, match="thresholds=True"):
        fit(model, texts(2)).thresholds("mlp")


def test_tuning_gives_more_to_the_layer_that_needs_more():
    """Of two layers, the second adds nothing to the stream: its budget is worth less."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    config = LemoConfig(attention=Elimination(keep=0.5, score="measured"), mlp=None, block_size=4, dense_layers=())
    # Texts that the model itself writes: what elimination changes is a loss.
    own = model.eval().generate(texts(6, 4), max_new_tokens=60, min_new_tokens=60, do_sample=True)
    tuning = Tuning(model, list(own[:, None]), config, None)
    shares, losses = tuning.run()
    assert shares[0, "attention"] > shares[1, "attention"] + 0.1
    assert min(losses) < losses[0]
    assert sum(shares.values()) / 2 == pytest.approx(0.5, abs=0.05)


def test_sequences_of_several_lengths():
    rows = [list(range(3, 3 + length)) for length in (5, 40, 64)]
    predictors = fit(tiny("llama"), rows)
    assert predictors.record["tokens"] == 109


def test_fit_refuses_no_tokens():
    with pytest.raises(lemo_fx.InputError):
        fit(tiny("llama"), [])
    with pytest.raises(lemo_fx.InputError):
        fit(tiny("llama"), torch.randn(2, 8))
