"""What a transformed model still is: the same object, saved, copied, adapted, evaluated and reverted as before."""

import copy
import dataclasses
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tiny import ARCHITECTURES, Recorder, anatomy, assert_same_step, batch, selections, step, tiny, with_lora

import lemo_fx
from lemo_fx import Elimination, LemoConfig

SPARSE = LemoConfig(Elimination(keep=0.5), Elimination(keep=0.5), block_size=8, dense_layers=())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_object_class_keys_and_outputs_and_back(architecture, lora):
    model = tiny(architecture)
    model = with_lora(model) if lora else model
    inputs = batch(2, 48, padding="left")
    expected = step(model, inputs)
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        text = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
        )
    model.train()
    before = anatomy(model)
    assert lemo_fx.transform(model, SPARSE) is model
    after = anatomy(model)
    assert after["keys"] == before["keys"]
    names = {name: kind for name, kind in before["classes"]}
    for name, module in model.named_modules():
        if name in names:
            assert type(module).__name__ == names[name].__name__
            assert isinstance(module, names[name])
    assert not torch.equal(step(model, inputs)[0], expected[0]), "training is sparse"
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
        again = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
        )
    assert torch.equal(again, text)
    model.train()
    assert lemo_fx.revert(model) is model
    assert anatomy(model) == before
    assert_same_step(step(model, inputs), expected, "same")


def test_active_always_is_sparse_in_evaluation():
    model = tiny("llama").eval()
    inputs = batch(2, 48)["input_ids"]
    with torch.no_grad():
        dense = model(inputs).logits
        lemo_fx.transform(model, LemoConfig(SPARSE.attention, SPARSE.mlp, 8, (), active="always"))
        assert not torch.equal(model(inputs).logits, dense)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("eliminated", ["skip", "exact"])
def test_generate_in_training_mode(eliminated, checkpointing, use_cache):
    model = with_lora(tiny("llama", layers=4))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    how = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    inputs = batch(2, 40)
    expected = model.generate(input_ids=inputs["input_ids"], **how)
    site = Elimination(keep=0.3, eliminated=eliminated)
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8))
    before = step(model, inputs)
    assert model.training
    assert torch.equal(model.generate(input_ids=inputs["input_ids"], **how), expected)
    with pytest.raises(TypeError):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens="6")
    assert not lemo_fx.report(model).dense
    assert_same_step(step(model, inputs), before, "same")


def test_generate_with_active_always():
    model = tiny("llama").eval()
    prompt = batch(1, 40)["input_ids"]
    lemo_fx.transform(model, LemoConfig(Elimination(keep=1.0), Elimination(keep=1.0), 8, (), active="always"))
    sparse = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    lemo_fx.revert(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False), sparse)


@pytest.mark.parametrize("lora", [False, True])
def test_a_deep_copy_trains_on_its_own(lora):
    model = tiny("llama")
    model = lemo_fx.transform(with_lora(model) if lora else model, SPARSE)
    inputs = batch(2, 48)
    expected = step(model, inputs)
    twin = copy.deepcopy(model)
    assert_same_step(step(twin, inputs), expected, "same")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_step(step(twin, inputs), expected, "same")
    lemo_fx.revert(model)
    assert len(selections(twin)) == 4
    lemo_fx.revert(twin)
    assert not selections(twin)


def test_shared_classes():
    """One class per distinct graph: layers of one kind look alike to a compiler and to FSDP."""
    model = lemo_fx.transform(tiny("llama", 4), SPARSE)
    other = lemo_fx.transform(tiny("llama", 3), SPARSE)
    assert len({type(layer) for layer in [*model.model.layers, *other.model.layers]}) == 1


def test_adapters_after_the_transform():
    inputs = batch(2, 48)
    before = lemo_fx.transform(with_lora(tiny("llama")), SPARSE)
    after = with_lora(lemo_fx.transform(tiny("llama"), SPARSE))
    assert_same_step(step(after, inputs), step(before, inputs), "same")
    assert list(after.state_dict()) == list(before.state_dict())
    assert "lemo" not in " ".join(after.peft_config["default"].target_modules)
    assert lemo_fx.transform(after, SPARSE) is after
    assert "kept in last step" in str(lemo_fx.report(after))
    lemo_fx.revert(after)
    assert not selections(after)


def test_merge_and_unload_after_the_transform():
    model = lemo_fx.transform(with_lora(tiny("llama")), SPARSE)
    inputs = batch(2, 48)
    expected = step(model, inputs)[0]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.train()(**inputs).loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_adapter_loads_where_lemo_fx_cannot_be_imported(tmp_path):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = lemo_fx.transform(with_lora(base), SPARSE)
    step(model, batch(2, 48))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(parameter.grad)
    model.save_pretrained(tmp_path / "adapter")
    ids = batch(1, 20)["input_ids"]
    torch.save((ids, model.eval()(ids).logits.detach()), tmp_path / "expected.pt")
    script = f"""
        import sys
        sys.modules["lemo_fx"] = None
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}),
                                          {str(tmp_path / "adapter")!r}).eval()
        ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
        torch.testing.assert_close(model(ids).logits, expected)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_saving_the_whole_model(tmp_path):
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert type(loaded).__name__ in (tmp_path / "config.json").read_text()
    model.load_state_dict(loaded.state_dict())


def test_transform_twice_is_idempotent_or_plans_anew():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    inputs = batch(2, 48)
    expected, parts = step(model, inputs), list(selections(model).values())
    lemo_fx.transform(model, LemoConfig(Elimination(keep=0.5), Elimination(keep=0.5), block_size=8, dense_layers=()))
    assert all(a is b for a, b in zip(selections(model).values(), parts, strict=True))
    assert_same_step(step(model, inputs), expected, "same")
    lemo_fx.transform(model, LemoConfig(None, Elimination(keep=0.2), block_size=8, dense_layers=(0,)))
    assert list(selections(model)) == ["model.layers.1.lemo_mlp_select"]
    lemo_fx.transform(model, SPARSE)
    assert_same_step(step(model, inputs), expected, "same")


def test_default_plan_leaves_the_ends_dense():
    model = lemo_fx.transform(tiny("llama", 5), LemoConfig(block_size=8))
    assert {name.split(".")[2] for name in selections(model)} == {"1", "2", "3"}
    assert [n for n in lemo_fx.report(model).notes if "dense" in n] == [
        "model.layers.0: dense (dense_layers)",
        "model.layers.4: dense (dense_layers)",
    ]
    # Rows are those of layers that the plan changes, at either end.
    assert {site.module for site in lemo_fx.report(model).sites} == {f"model.layers.{i}" for i in (1, 2, 3)}
    lemo_fx.transform(model, LemoConfig(block_size=8, recompute="projections"))
    assert {site.module for site in lemo_fx.report(model).sites} == {f"model.layers.{i}" for i in range(5)}


def test_keep_per_layer():
    model = tiny("llama", 2)
    site = Elimination(keep=[0.25, 0.75], score="random")
    lemo_fx.transform(model, LemoConfig(site, site, block_size=8, dense_layers=()))
    with Recorder(model) as recorder:
        model(**batch(2, 64))
    assert [t[0].shape[1] for t in recorder.tokens.values()] == [16, 16, 48, 48]


def test_report_and_graphs():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    report = lemo_fx.report(model)
    assert [s.kept_share for s in report.sites] == [None] * 4
    model(**batch(2, 64))
    report = lemo_fx.report(model)
    assert [(s.site, s.kept_tokens, s.total_tokens) for s in report.sites] == [
        ("attention", 32, 64),
        ("mlp", 32, 64),
    ] * 2
    assert report.to_dict()["sites"][0]["kept_share"] == 0.5
    assert set(lemo_fx.graphs(model)) == {"", "model.layers.0", "model.layers.1"}
    with pytest.raises(lemo_fx.NotTransformedError):
        lemo_fx.report(lemo_fx.revert(model))


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not_reentrant"])
def test_the_report_forgets_what_was_kept_when_a_step_runs_the_original_code(checkpointing):
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()

    def shares():
        return [site.kept_share for site in lemo_fx.report(model).sites]

    for original in ("short", "dense"):
        step(model, batch(2, 64))
        assert shares() == [0.5] * 4
        model.eval()
        with torch.no_grad():
            model(**batch(2, 7))
            model(**batch(2, 64))
        model.train()
        assert shares() == [0.5] * 4, "an evaluation is no step"
        lemo_fx.set_dense(model, original == "dense")
        step(model, batch(2, 7 if original == "short" else 64))
        assert shares() == [None] * 4
        lemo_fx.set_dense(model, False)
        assert shares() == [None] * 4


@pytest.fixture(scope="module")
def long_report():
    model = with_lora(tiny("llama", 12))
    return lemo_fx.report(lemo_fx.transform(model, LemoConfig(block_size=8, forward="float8", backward="float8")))


@pytest.mark.parametrize("width", [None, 60, 90])
def test_the_printed_report_names_every_layer(long_report, width):
    report = long_report
    text = str(report)
    if width is not None:
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(report)
        text = console.file.getvalue()
    # The cells of the first column, one after another.
    column = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert [name for name in {site.module for site in report.sites} if name not in column] == []
    assert "…" not in text
    if width is None:
        assert all(site.module in text for site in report.sites)


def test_graphs_are_found_by_their_name_in_the_base_model():
    model = lemo_fx.transform(with_lora(tiny("llama", 4)), dataclasses.replace(SPARSE, dense_layers=None))
    graphs = lemo_fx.graphs(model)
    assert [name for name in graphs if graphs[name] is graphs["model.layers.2"]] == ["base_model.model.model.layers.2"]
    for name in ("model.layers.0", "layers", "2.1", "", "ers.2"):
        with pytest.raises(KeyError, match=r"base_model\.model\.model\.layers\.1, "):
            graphs[name]
        assert name not in graphs
        assert graphs.get(name) is None
        assert graphs.get(name, 3) == 3
    for name in ("model.layers.2", "layers.2", *graphs):
        assert name in graphs
        assert graphs.get(name) is graphs[name]
    assert 2 not in graphs


def test_outputs_with_hidden_states_keep_their_shape():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    out = model(**batch(2, 48), output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 48, 32)] * 3


def test_half_precision_and_moving():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    keys = list(model.state_dict())
    model.bfloat16()
    loss, _ = step(model, batch(2, 48))
    assert loss.isfinite()
    assert list(model.state_dict()) == keys
    assert all(len(m.record.choices) == 1 for m in selections(model).values())


def test_dump_writes_the_graph_before_and_after_each_pass(tmp_path):
    lemo_fx.transform(tiny("llama"), SPARSE, dump=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.layers.0.0_captured.py" in names
    assert any("outline_branches" in name for name in names)
    assert any("loss_head" in name for name in names)


@pytest.mark.parametrize("before", [False, True], ids=["patched_after", "patched_before"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_forward_on_the_instance_does_not_hide_the_labels(lora, before):
    """As TRL and accelerate do it: the layers still keep the few labelled blocks, and `revert` takes nothing away."""
    model = with_lora(tiny("llama")) if lora else tiny("llama")
    head = model.get_base_model() if lora else model

    def patch():
        forward = head.forward
        head.forward = lambda *args, labels=None, **kwargs: forward(*args, **kwargs)

    if before:
        patch()
    site = Elimination(keep=0.5, score="random")
    lemo_fx.transform(model, LemoConfig(attention=site, mlp=site, block_size=8, dense_layers=()))
    if not before:
        patch()
    inputs = batch(2, 64)
    inputs["labels"][:, :] = -100
    inputs["labels"][0, 30] = inputs["labels"][1, 50] = 5
    with Recorder(model) as seen:
        assert model(**inputs).logits is not None
    for tokens in seen.tokens.values():
        assert {29, 30} <= set(tokens[0][0].tolist())
        assert {49, 50} <= set(tokens[0][1].tolist())
    lemo_fx.revert(model)
    assert "forward" in vars(head)
    assert model(**inputs).logits is not None
    del head.forward
    assert model(**inputs).loss is not None


def test_a_forward_that_its_class_got_since_is_the_one_that_runs(monkeypatch):
    """Liger gives a class another forward; a model that was rewritten before must not hide it from the next."""
    config = LemoConfig(attention=None, mlp=None, loss_segments=None)
    lemo_fx.transform(tiny("llama"), config)
    model = tiny("llama")
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: "another")
    assert lemo_fx.transform(model, config)() == "another"


def _replicated(model):
    targets = ["q_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=targets, layer_replication=[[0, 2], [0, 2]], task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


@pytest.mark.parametrize("how", ["layer_replication", "deepcopy"])
def test_a_copied_layer_belongs_to_the_model(how):
    """It knows the labels, takes the step's choice, obeys `set_dense` and `generate`, is listed and reverted."""
    site = Elimination(keep=0.25, score="step")
    config = LemoConfig(site, site, block_size=8, dense_layers=(), forward="float8", backward="float8")
    model = lemo_fx.transform(tiny("llama"), config)
    if how == "layer_replication":
        model = _replicated(model)
    else:
        model.model.layers.extend(copy.deepcopy(layer) for layer in list(model.model.layers))
        model.config.num_hidden_layers = 4
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
    inputs = batch(2, 64)
    inputs["labels"][:, :] = -100
    inputs["labels"][:, 30:36] = 5
    with Recorder(model) as seen:
        step(model, inputs)
    choices = [tokens[0] for tokens in seen.tokens.values()]
    assert len(choices) == 8
    assert all(torch.equal(choice, choices[0]) for choice in choices)
    assert {30, 35} <= set(choices[0][0].tolist())
    report = lemo_fx.report(model)
    assert [site.kept_tokens for site in report.sites] == [16] * 8
    assert len({site.module for site in report.sites}) == 4
    assert len(lemo_fx.graphs(model)) == 5
    with Recorder(model) as seen:
        lemo_fx.set_dense(model)(**inputs)
        lemo_fx.set_dense(model, False).generate(input_ids=inputs["input_ids"], max_new_tokens=2, use_cache=False)
    assert not seen.tokens
    twin = copy.deepcopy(model)
    lemo_fx.set_dense(twin)
    assert not lemo_fx.report(model).dense
    lemo_fx.revert(model)
    assert not selections(model)
    assert len(selections(twin)) == 8
    lemo_fx.transform(model, config)
    assert len(selections(model)) == 8


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["model", "float8"])
def test_a_pickled_model_is_the_original(lora, precision, tmp_path):
    """In the workers of `datasets.map`, in a file of `torch.save`."""
    config = LemoConfig(block_size=8, dense_layers=(), forward=precision, backward=precision)
    model = with_lora(tiny("llama")) if lora else tiny("llama")
    inputs = batch(2, 64)
    expected = step(model, inputs)
    lemo_fx.transform(model, config)
    sparse = step(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert anatomy(lemo_fx.revert(copy.deepcopy(model)))["classes"] == anatomy(loaded)["classes"]
    assert not selections(loaded)
    with pytest.raises(lemo_fx.NotTransformedError):
        lemo_fx.report(loaded)
    assert_same_step(step(loaded, inputs), expected, "same")
    assert_same_step(step(lemo_fx.transform(loaded, config), inputs), sparse, "same")
    assert_same_step(step(model, inputs), sparse, "same")
    assert_same_step(step(copy.deepcopy(model), inputs), sparse, "same")
    dill = pytest.importorskip("dill")
    assert_same_step(step(dill.loads(dill.dumps(model)), inputs), expected, "same")


def test_a_shallow_copy_of_a_layer_is_rewritten_too():
    model = lemo_fx.transform(tiny("llama"), SPARSE)
    twin = copy.copy(model.model.layers[0])
    assert type(twin) is type(model.model.layers[0])
    assert vars(twin) == vars(model.model.layers[0])
