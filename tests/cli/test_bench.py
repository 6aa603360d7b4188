import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    CLIPConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
    TrainingArguments,
)
from typer.testing import CliRunner

from lemo_fx.cli import bench, bench_page
from lemo_fx.cli.app import app
from lemo_fx.cli.options import BenchSettings
from lemo_fx.cli.prepare import check_context
from lemo_fx.cli.trainer import checkpointing
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError

runner = CliRunner()


def test_checkpointing_is_switched_by_the_name_that_transformers_keeps(tmp_path, recwarn):
    arguments = TrainingArguments(str(tmp_path), report_to=[], **checkpointing(True))
    assert arguments.gradient_checkpointing
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert [str(found.message) for found in recwarn if "deprecated" in str(found.message)] == []


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    size = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    path.write_text(size.to_json_string(use_diff=False))
    return path


def invoke(config, tmp_path, *options):
    return runner.invoke(app, ["bench", str(config), "--out", str(tmp_path / "out"), "--steps", "2", *options])


@pytest.mark.slow
@pytest.mark.rendered
def test_every_plan_at_every_length(config, tmp_path):
    result = invoke(config, tmp_path, "--context", "256,320", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "random, weights too" in result.output
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000
    assert (figures["weights"], figures["device"]) == ("random", "cpu")
    assert {"command", "date", "torch"} <= set(figures["environment"])
    runs = {(run["plan"], run["context"]): run for run in figures["runs"]}
    assert list(runs) == [(plan, context) for context in (256, 320) for plan in bench.PLANS]
    for (plan, context), run in runs.items():
        assert run["failed"] is None
        assert run["slowest_seconds"] >= run["step_seconds"] > 0
        assert run["peak_bytes"] > 0
        assert run["kept_share"] == (None if plan in (bench.UNTOUCHED, bench.LORA) else pytest.approx(0.5, abs=0.2))
        # Every plan among them computes all of the forward; float8 rounds it.
        beside = runs[bench.UNTOUCHED, context]["first_loss"]
        assert run["first_loss"] == pytest.approx(beside, abs=5e-3 if plan in ("balanced", "fast") else 1e-4)


@pytest.mark.rendered
def test_one_plan_of_ones_own(config, tmp_path):
    result = invoke(config, tmp_path, "--context", "256", "--keep", "0.25", "--eliminated", "skip", "--score", "random")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    _, lora, plan = figures["runs"]
    assert [run["plan"] for run in figures["runs"]] == [bench.UNTOUCHED, bench.LORA, "the plan"]
    assert plan["kept_share"] == 0.5  # two of four blocks, the least there is
    assert plan["first_loss"] != pytest.approx(lora["first_loss"], abs=1e-6)
    assert "256 tokens, the plan: " in result.output


def test_a_base_in_four_bits(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = invoke(config, tmp_path, "--context", "256", "--preset", "careful", "--load-in", "4bit", "--steps", "1")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (figures["weights"], figures["settings"]["load_in"]) == ("random", "4bit")
    assert figures["parameters"]["all"] > 4 * 32 * 64 * 3
    _, lora, plan = figures["runs"]
    assert plan["failed"] is None
    assert plan["first_loss"] == pytest.approx(lora["first_loss"], abs=1e-4)
    wrong = invoke(config, tmp_path, "--load-in", "3bit")
    assert wrong.exit_code == 2
    assert "'4bit', '8bit'" in wrong.stderr


def test_the_picture_shows_every_point():
    runs = [
        bench.Run(name, 512, step_seconds=0.2, peak_bytes=peak)
        for name, peak in ((bench.UNTOUCHED, 901_000_000), (bench.LORA, 900_000_000), ("careful", 899_000_000))
    ]
    parameters = {"all": 8_130_000_000, "trained": 30_000_000}
    settings = BenchSettings("512,1024")
    outcome = bench.Outcome("some/config.json", "llama", True, False, parameters, "cpu", settings, bench.PLANS, runs)
    figure = bench_page.plot(outcome)
    assert figure.get_suptitle() == "config.json: llama, 8.1 billion parameters\ncpu"
    axes = figure.axes[0]
    assert axes.get_xlim() == pytest.approx((0, 1.12 * 0.901))
    assert axes.get_ylim() == pytest.approx((0, 1.12 * 0.2))
    untouched, lora, _ = axes.lines
    assert untouched.get_markerfacecolor() == "none"
    assert untouched.get_markersize() > lora.get_markersize()
    assert untouched.get_zorder() > lora.get_zorder()
    figure.canvas.draw()


def test_what_does_not_fit_is_noted(config, tmp_path, monkeypatch):
    real = bench.Bench.run

    def run(self, name, *rest):
        if name == bench.UNTOUCHED:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nAnd more.")
        return real(self, name, *rest)

    monkeypatch.setattr(bench.Bench, "run", run)
    result = invoke(config, tmp_path, "--context", "256", "--preset", "careful")
    assert result.exit_code == 0, result.output
    first, lora, careful = json.loads((tmp_path / "out" / "bench.json").read_text())["runs"]
    assert first["failed"] == "out of memory: CUDA out of memory. Tried to allocate 1.00 GiB."
    assert first["step_seconds"] is None
    assert lora["failed"] is careful["failed"] is None


@pytest.mark.slow
def test_refused_steps_are_noted(tmp_path):
    path = tmp_path / "config.json"
    size = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=2, output_router_logits=True, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    path.write_text(size.to_json_string(use_diff=False))
    result = invoke(path, tmp_path, "--context", "256", "--keep", "0.5", "--targets", "q_proj")
    assert result.exit_code == 0, result.output
    first, lora, plan = json.loads((tmp_path / "out" / "bench.json").read_text())["runs"]
    assert first["failed"] is lora["failed"] is None
    assert plan["failed"].startswith("refused: output_router_logits: the auxiliary loss counts")
    assert f"256 tokens, the plan: {plan['failed']}\n" in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("│") and "the plan" in line)
    assert "refused: output_router_logits" in row


def test_what_was_measured_before_a_stop_stays(config, tmp_path, monkeypatch):
    real = bench.Bench.run

    def run(self, name, *rest):
        if name == "careful":
            raise KeyboardInterrupt
        return real(self, name, *rest)

    monkeypatch.setattr(bench.Bench, "run", run)
    assert invoke(config, tmp_path, "--context", "256").exit_code != 0
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [run["plan"] for run in figures["runs"]] == [bench.UNTOUCHED, bench.LORA]


@pytest.mark.parametrize(
    ("config", "has"),
    [
        (LlamaConfig(), False),
        (LlamaConfig(attention_dropout=0.1), True),
        (GPT2Config(), True),
        (GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), False),
        (OPTConfig(dropout=0.1), True),
        (GPTNeoXConfig(), False),
        (Gemma3Config(text_config={"attention_dropout": 0.1}), True),
    ],
)
def test_dropout_is_seen_in_the_config(config, has):
    assert bench.has_dropout(config) == has


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_is_said_beside_the_loss(config, tmp_path, monkeypatch, dropout):
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": dropout}))
    monkeypatch.setattr(bench.Bench, "run", lambda self, name, plan, context, tick: bench.Run(name, context))
    result = invoke(config, tmp_path, "--context", "256", "--preset", "careful")
    assert result.exit_code == 0, result.output
    assert ("where the model has no dropout; this one has." in result.output.replace("\n", " ")) == (dropout > 0)


SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32}
HEADS = {"num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (T5Config(), "a t5 model is no causal language model"),
        (CLIPConfig(), "a clip model is no causal language model"),
        (BertConfig(**SMALL, **HEADS), "a bert model has no decoder layers with causal attention, which plans are for"),
        (MambaConfig(**SMALL), "a mamba model has no decoder layers with causal attention, which plans are for"),
    ],
)
def test_other_models_are_named_in_one_line(tmp_path, model, says):
    path = tmp_path / "config.json"
    path.write_text(model.to_json_string(use_diff=False))
    result = invoke(tmp_path, tmp_path, "--context", "256")
    assert result.exit_code == 2, result.output
    assert result.stderr == f"error: {tmp_path}: {says}\n"


def test_each_length_is_measured_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.Bench, "run", lambda self, name, plan, context, tick: bench.Run(name, context))
    result = invoke(config, tmp_path, "--context", "512,256,512", "--preset", "careful")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert figures["settings"]["contexts"] == [512, 256]
    assert [run["context"] for run in figures["runs"]] == [512] * 3 + [256] * 3


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (LlamaConfig(), "2048 or less, or set rope scaling in the model's config.json"),
        (GPT2Config(), "1024 or less: its positions are learned"),
        (OPTConfig(), "2048 or less: its positions are learned"),
    ],
)
def test_rope_scaling_is_for_models_with_rope(config, advice):
    with pytest.raises(InputError) as error:
        check_context(config, LemoConfig(), 4096)
    assert str(error.value).endswith(f"choose --context {advice}")


@pytest.mark.parametrize(("load", "warns"), [(3.0, True), (0.1, False)])
def test_a_busy_machine_is_said(config, tmp_path, monkeypatch, load, warns):
    monkeypatch.setattr("lemo_fx.cli.machine.other_load", lambda: load)
    monkeypatch.setattr(bench.Bench, "run", lambda self, name, plan, context, tick: bench.Run(name, context))
    result = invoke(config, tmp_path, "--context", "256", "--preset", "careful")
    assert result.exit_code == 0, result.output
    assert ("Other programs are running" in result.output) == warns


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "long"], "--context 'long'"),
        (["--context", "4096"], "1024"),
        (["--context", "0"], "0"),
        (["--context", "256", "--steps", "0"], "steps=0"),
        (["--context", "256", "--batch", "-1"], "batch=-1"),
        (["--context", "256", "--preset", "best"], "best"),
        (["--context", "256", "--keep", "2"], "keep=2.0"),
        (["--context", "256", "--targets", "nothing"], "nothing"),
        (["--context", "256", "--predictors", "none"], "none"),
    ],
)
def test_errors_come_before_the_first_step(config, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr(bench.Bench, "run", None)
    if options[1] in ("4096", "0"):
        # Said before the weights are made, which may be many.
        monkeypatch.setattr(bench, "load", None)
    result = invoke(config, tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_run_of_a_model_is_under_autocast(config, monkeypatch):
    def on_the_cpu(*args, **settings):
        return TrainingArguments(*args, **settings, use_cpu=True)

    monkeypatch.setattr(bench, "TrainingArguments", on_the_cpu)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(config)).bfloat16()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    settings = BenchSettings("64", steps=1, compile=False)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    benched = bench.Bench(model, settings, None)
    for plan in (None, LemoConfig.preset("dense"), LemoConfig.preset("dense")):
        benched.run("a plan", plan, 64, lambda: None)
        # What a transform tries out is before the steps.
        assert seen[-2:] == [True, True]
        seen.clear()
