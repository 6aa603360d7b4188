"""fit: true scores as targets, weights untouched, memory bounded, resumable."""

import json
import sys

import pytest
import torch

import lemo_fx
from lemo_fx import Elimination, LemoConfig, Predictors
from lemo_fx.predictor_training import Recipe
from tests.helpers.tiny import VOCABULARY, tiny, with_lora

CONFIG = LemoConfig(block_size=8, dense_layers=())
RECIPE = Recipe(width=4, epochs=20)


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
    assert len(record["losses"]) == 20
    assert record["heldout_losses"]
    lemo_fx.transform(model, CONFIG, predictors=predictors)
    assert {s.score for s in lemo_fx.report(model).sites if s.eliminated != "dense"} == {"predicted"}


@pytest.mark.parametrize("architecture", ["gpt_neox", "opt", "gemma3", "mixtral"])
def test_fit_and_transform_other_architectures(architecture):
    model = with_lora(tiny(architecture))
    predictors = fit(model, texts(3), recipe=Recipe(width=4, epochs=2))
    lemo_fx.transform(model, CONFIG, predictors=predictors)
    model(input_ids=texts(1), labels=texts(1)).loss.backward()


def test_targets_are_the_true_scores(tmp_path, monkeypatch):
    """What the profiling pass writes is what `score="measured"` ranks by: causal and with position embedding."""
    model, sequences = tiny("llama"), texts(3)
    monkeypatch.setattr(fit_function_module(), "_trained", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sequences, folder=tmp_path)
    profile = fit_function_module().Profile
    work = tmp_path / "unfinished"
    found = profile(**json.loads((work / "profile.json").read_text())).blocks(work, "layers.0.attention", 32)
    seen = []
    config = LemoConfig(attention=Elimination(keep=1.0), mlp=None, block_size=8, dense_layers=(), active="always")
    lemo_fx.transform(model, config)
    part = next(m for n, m in model.named_modules() if n.endswith("layers.0.lemo_attention_score"))
    part.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model.eval()(input_ids=sequences)
    torch.testing.assert_close(found.scores, seen[0], rtol=1e-4, atol=1e-5)


def fit_function_module():
    return sys.modules["lemo_fx.fit"]


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_killed_run_goes_on_from_its_last_finished_layer(tmp_path, monkeypatch):
    module = fit_function_module()
    model, sequences = tiny("llama"), texts()
    whole = fit(model, sequences)
    trained, real = [], module.train

    def dies_at_the_third(*args, **kwargs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sequences, folder=tmp_path)
    rest = []
    monkeypatch.setattr(module, "train", lambda *a, **k: rest.append(1) or real(*a, **k))
    monkeypatch.setattr(module, "_profile", stop)
    again = fit(model, sequences, folder=tmp_path)
    assert len(rest) == 2
    assert all(torch.equal(again.tensors[name], value) for name, value in whole.tensors.items())
    assert not (tmp_path / "unfinished").exists()
    assert Predictors.load(tmp_path).tensors.keys() == whole.tensors.keys()


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


def test_sequences_of_several_lengths():
    rows = [list(range(3, 3 + length)) for length in (5, 40, 64)]
    predictors = fit(tiny("llama"), rows)
    assert predictors.record["tokens"] == 109


def test_fit_refuses_no_tokens():
    with pytest.raises(lemo_fx.InputError):
        fit(tiny("llama"), [])
    with pytest.raises(lemo_fx.InputError):
        fit(tiny("llama"), torch.randn(2, 8))
