import errno
import itertools
import json
from types import SimpleNamespace

import pytest
import transformers
from tiny import tiny
from transformers import LlamaConfig, T5Config
from typer.testing import CliRunner

from lemo_fx.cli import demo
from lemo_fx.cli.app import app
from lemo_fx.cli.options import PlanOptions
from lemo_fx.config import Elimination, LemoConfig
from lemo_fx.errors import StorageError
from lemo_fx.files import writing

runner = CliRunner()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    size = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    path.write_text(size.to_json_string(use_diff=False))
    return path


def test_help_of_every_command():
    whole = runner.invoke(app, ["--help"])
    assert whole.exit_code == 0
    for command in app.registered_commands:
        name = command.callback.__name__
        assert name in whole.output
        helped = runner.invoke(app, [name, "--help"])
        assert helped.exit_code == 0
        assert "--out" in helped.output or name == "estimate"


@pytest.mark.slow
def test_no_bar_of_loaded_weights_lies_over_a_command(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    transformers.logging.enable_progress_bar()
    for command in ("inspect", "bench", "estimate"):
        options = {"inspect": [], "bench": ["--context", "256", "--steps", "1"], "estimate": []}[command]
        where = [] if command == "estimate" else ["--out", str(tmp_path / command)]
        result = runner.invoke(app, [command, str(tmp_path / "model"), *options, *where])
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        transformers.logging.enable_progress_bar()


@pytest.mark.rendered
def test_inspect_a_config(config, tmp_path):
    out, dump = tmp_path / "out", tmp_path / "dump"
    result = runner.invoke(app, ["inspect", str(config), "--layer", "1", "--out", str(out), "--dump", str(dump)])
    assert result.exit_code == 0, result.output
    assert "random weights" in result.output
    assert "4 of the 6 decoder layers" in result.output
    assert "attention_restored" in result.output
    assert (out / "model.layers.1.png").stat().st_size > 10_000
    assert (out / "model.layers.1.svg").exists()
    stages = sorted(path.name for path in dump.glob("model.layers.1.*"))
    assert stages[0] == "model.layers.1.0_captured.py"
    assert len(stages) > 4


def test_options_change_a_preset():
    # Of four layers the second is a third of the way from the lowest share to the highest.
    for given, keep in (
        ({}, 0.3542),
        ({"preset": "fast"}, 0.275),
        ({"keep": 0.9}, 0.9),
        ({"slope": 0.2}, 0.4042),
        ({"score": "random"}, 0.3542),
        ({"eliminated": "skip"}, 0.4375),
    ):
        plan = PlanOptions(**given).config()
        assert plan.attention.at_layer("keep", 1, 4) == pytest.approx(keep, abs=1e-4)
        assert plan.float8_everywhere == ("preset" in given)
        assert plan.attention.score == given.get("score", "auto")
        assert plan.attention.eliminated == given.get("eliminated", "exact")


def test_inspect_shows_what_transform_would_do(config, tmp_path):
    result = runner.invoke(app, ["inspect", str(config), "--out", str(tmp_path), "--preset", "fast"])
    row = next(line for line in result.output.splitlines() if "model.layers.1" in line and "attention" in line)
    assert [cell.strip() for cell in row.split("│")[3:6]] == ["exact", "step", "keep 0.275"]
    assert "float8" in row
    result = runner.invoke(app, ["inspect", str(config), "--out", str(tmp_path), "--score", "predicted"])
    assert result.exit_code == 0, result.output
    assert "predictors: untrained, of their real size" in result.output


def test_inspect_reads_a_plan(config, tmp_path):
    plan = tmp_path / "lemo.json"
    plan.write_text(json.dumps({"attention": {"keep": 0.25}, "mlp": None, "dense_layers": []}))
    result = runner.invoke(app, ["inspect", str(config), "--plan", str(plan), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "0.25" in result.output
    assert "dense (None in the config)" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{config}", "--keep", "2"], "keep=2.0"),
        (["{config}", "--layer", "9"], "4 decoder layers"),
        (["{config}", "--score", "best"], "score='best'"),
        (["{config}x"], "does not exist"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(config, tmp_path, arguments, says):
    arguments = [argument.format(config=config) for argument in arguments]
    result = runner.invoke(app, ["inspect", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "inspect", "fit", "train", "bench"])
@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "/proc/nope"])
def test_where_nothing_can_be_written_is_said_first(tmp_path, monkeypatch, command, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    given = {"demo": [], "inspect": ["no_model"], "bench": ["no_model"]}.get(command, ["no_model", "no_data"])
    result = runner.invoke(app, [command, *given, "--out", place])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: cannot write in {place}: ")
    assert result.stderr.count("\n") == 1
    assert "space" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("given", [["train", "no_model", "no_data"], ["bench", "no_model"]])
def test_flex_attention_needs_a_gpu(tmp_path, monkeypatch, given):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = runner.invoke(app, [*given, "--out", str(tmp_path / "out"), "--attention", "flex_attention"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: --attention flex_attention trains on a GPU only")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_only_a_full_disk_asks_for_space(tmp_path):
    with pytest.raises(StorageError, match="give another folder"), writing(tmp_path):
        (tmp_path / "nothing" / "file").write_text("")
    with pytest.raises(StorageError, match="free some space"), writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("command", ["inspect", "fit", "train"])
def test_a_model_of_another_kind_is_named_in_one_line(tmp_path, command):
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    T5Config().save_pretrained(model)
    (model / "model.safetensors").touch()
    data.write_text('{"text": "some words"}\n')
    files = [str(model)] if command == "inspect" else [str(model), str(data)]
    result = runner.invoke(app, [command, *files, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr == f"error: {model}: a t5 model is no causal language model\n"


def test_fit_refuses_data_without_text(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"words": "none"}\n')
    result = runner.invoke(app, ["fit", str(tmp_path), str(data), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "needs a field `text`" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--limit", "-3"], "--limit -3 must be at least 1"),
        (["--max-length", "0"], "--max-length 0 must be at least 1"),
    ],
)
def test_fit_refuses_numbers_at_once(tmp_path, options, says):
    result = runner.invoke(app, ["fit", "no_model", "no_data", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert result.stderr == f"error: {says}\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--plans", "foo"], "plan 'foo' is not one of careful, balanced, fast, lemo"),
        (["--plans", "careful,"], "plan '' is not one of"),
        (["--seed", "-1"], "seed=-1 must be a number from 0"),
        (["--rate", "-1"], "rate=-1.0"),
        (["--rate", "nan"], "rate=nan"),
    ],
)
def test_demo_refuses_a_plan_before_it_trains(tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("lemo_fx.cli.demo.load", None)
    result = runner.invoke(app, ["demo", "--out", str(tmp_path), *options])
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.rendered
def test_demo(tmp_path):
    arguments = ["demo", "--steps", "2", "--context", "512", "--windows", "1", "--out", str(tmp_path)]
    result = runner.invoke(app, [*arguments, "--graph", "--predicted", "--plans", "fast,lemo"])
    assert result.exit_code == 0, result.output
    assert "less than a minute" in result.output
    assert "held-out perplexity after" in result.output
    assert "attention_restored" in result.output
    assert "not worth while" in result.output
    assert result.output.rstrip().endswith("an adapter and a report")
    for name in ("demo.png", "graph.png", "graph.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert set(figures) == {"settings", "runs", "ratios", "fit_seconds", "recall", "reports", "layer", "environment"}
    assert figures["reports"]["LeMo's own rule"]["sites"][0]["score"] == "predicted"
    assert all(0 < found <= 1 for found in figures["recall"].values())
    assert {"command", "date", "torch", "transformers", "cpu"} <= set(figures["environment"])
    plain, exact, sparse = figures["runs"].values()
    assert sparse["flops"] < plain["flops"]
    assert exact["flops"] < plain["flops"]
    assert sparse["saved_bytes"] < plain["saved_bytes"]
    assert plain["perplexity_before"] == sparse["perplexity_before"] < 100
    # A preset's forward is the plain one, and so is its first loss; elimination changes the gradient only.
    assert len(plain["losses"]) == len(plain["seconds"]) == 2
    assert exact["losses"][0] == pytest.approx(plain["losses"][0], abs=1e-4)
    assert sparse["losses"][0] != pytest.approx(plain["losses"][0], abs=1e-2)
    assert any(site["kept_share"] == 0.5 for site in figures["reports"]["LeMo's own rule"]["sites"])


def test_the_demo_shows_the_default_and_a_preset_and_lemos_rule():
    assert demo.plan_of("careful", predicted=False) == LemoConfig()
    assert demo.plan_of("fast", predicted=False) == LemoConfig.preset("fast", forward="model", backward="model")
    assert demo.plan_of("lemo", predicted=False).attention == Elimination(score="measured")
    assert not demo.plan_of("lemo", predicted=False).predicts


def test_figures_over_the_demos_bars_do_not_touch():
    runs = {
        name: demo.Run(
            saved_bytes=int(saved * 2**20), flops=2 * 10**11, perplexity_before=9, step_seconds=12.25, losses=[2, 1]
        )
        for name, saved in {"LoRA": 4150, "careful": 2350, "fast": 2340, "lemo": 2500}.items()
    }
    for run in runs.values():
        run.seconds = [0.0, 1.0]
    figure = demo.plot(SimpleNamespace(runs=runs))
    figure.draw_without_rendering()
    bars = figure.axes[-1]
    boxes = [text.get_window_extent() for text in bars.texts]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.y1 < bars.title.get_window_extent().y0 for box in boxes)


def test_demo_refuses_a_context_the_model_does_not_read(tmp_path):
    result = runner.invoke(app, ["demo", "--context", "9999", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "4096" in result.stderr
