"""`lemo-fx train`: run files, models and data by Hub name, going on, other runs beside, quantised bases, processes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from tiny import TOLERANCE, tiny
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import TrainerState
from typer.testing import CliRunner

from lemo_fx.cli import page
from lemo_fx.cli.app import app
from lemo_fx.cli.demo import ASSETS
from lemo_fx.cli.options import Job, PlanOptions, Settings
from lemo_fx.cli.watch import Bars
from lemo_fx.config import PRESETS, LemoConfig
from lemo_fx.errors import InputError

SHORT = ["--context", "64", "--block-size", "8", "--eval-windows", "2", "--rate", "1e-2", "--rank", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the shipped tokenizer, and prompts with completions."""
    folder = tmp_path_factory.mktemp("train")
    tiny("llama", layers=4, vocab_size=2048).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "model" / name, folder / "model")
    text = (ASSETS / "documents" / "train_sqlite_vtab.txt").read_text()
    rows = [{"prompt": text[i : i + 60], "completion": text[i + 60 : i + 120]} for i in range(0, 4800, 120)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def lemo_train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def first(folder):
    """A run by a run file: its result, its folder, and the windows of its first step."""
    file = folder / "run.yaml"
    given = {
        "model": str(folder / "model"), "data": str(folder / "data.json"), "out": str(folder / "first"), "context": 64,
        "block-size": 8, "eval_windows": 2, "steps": 3, "rate": 0.01, "rank": 4, "alpha": 12, "dropout": 0.25,
        "scheduler": "linear", "warmup": 2, "offload": True, "targets": ["up_proj", "down_proj"], "batch": 2,
        "report_to": "tensorboard", "merge": True, "seed": 1, "keep": None, "save-every": 1,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(given))
    seen, rates = [], []
    with pytest.MonkeyPatch.context() as patch:
        step = transformers.Trainer.training_step

        def noted(self, model, inputs, *args):
            seen.append(inputs["input_ids"][0].tolist())
            rates.append(self.optimizer.param_groups[0]["lr"])
            return step(self, model, inputs, *args)

        patch.setattr(transformers.Trainer, "training_step", noted)
        result = lemo_train("--config", file, "--seed", 2)
    assert result.exit_code == 0, result.output
    return result, folder / "first", seen, rates


def test_a_run_file_says_all_and_what_is_given_beside_it_wins(folder, first):
    _, out, _, rates = first
    found = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (4, 12, 0.25)
    assert sorted(found["target_modules"]) == ["down_proj", "up_proj"]
    assert found["base_model_name_or_path"] == str(folder / "model")
    # Two steps of warm-up, two windows a step; the third step has the whole rate.
    assert rates == [0.0, 0.0, 0.005, 0.005, 0.01, 0.01]
    settings = summary(out)["settings"]
    assert (settings["seed"], settings["scheduler"]) == (2, "linear")
    assert summary(out)["report"]["config"]["offload"] is True
    assert next((out / "checkpoints").rglob("events.out.tfevents*"))


def test_the_run_file_that_a_run_leaves_gives_the_run_again(first, tmp_path):
    _, out, _, _ = first
    result = lemo_train("--config", out / "run.yaml", "--out", tmp_path / "again", "--no-merge")
    assert result.exit_code == 0, result.output
    one, other = summary(out), summary(tmp_path / "again")
    assert one["settings"] == other["settings"]
    assert one["heldout_loss"] == other["heldout_loss"]
    names = {name for group in (Job, PlanOptions, Settings) for name in group.__dataclass_fields__}
    assert {*yaml.safe_load((out / "run.yaml").read_text())} == names - {"heldout"} | {"eval"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("contxt: 3", "there is no option 'contxt'"),
        ("[3]", "must hold options and values"),
        ("a: [", "cannot be read as YAML"),
        ("plan: {keep: 0.5}", "plan must be one value"),
        ("attention: {keep: 0.5}\nblock_size: 8", "attention must be one value"),
        ("dense_layers: [1]", "a LemoConfig goes behind --plan"),
        ("model: a\ndata: b\nsteps: many", "Invalid value for '--steps'"),
        ("out: x", "Missing"),
    ],
)
def test_a_bad_run_file_is_one_line(tmp_path, content, says):
    (tmp_path / "run.yaml").write_text(content)
    result = lemo_train("--config", tmp_path / "run.yaml")
    assert result.exit_code == 2, result.output
    assert says.lower() in result.stderr.lower()
    assert result.stderr.count("\n") == 1


def test_without_a_terminal_lines_say_how_far_it_is(first):
    result, _, _, _ = first
    assert re.search(r"step 1/3: loss \d", result.stdout)
    assert re.search(r"step 3/3: held-out loss \d", result.stdout)
    assert "\n\n" not in result.stdout


def test_in_a_terminal_the_last_losses_stand_beside_the_bar(capsys):
    bars, state = Bars(), TrainerState(max_steps=3, is_world_process_zero=True)
    bars.on_train_begin(None, state, None)
    for logs in ({"loss": 2.5}, {"eval_loss": 1.25}, {"loss": 1.5, "learning_rate": 0.1}):
        bars.on_log(None, state, None, logs=logs)
    shown = bars.training_bar.postfix
    bars.on_train_end(None, state, None)
    assert shown == "loss=1.500, held-out loss=1.250"
    assert "learning_rate" not in "".join(capsys.readouterr())


def test_a_preview_shows_the_first_steps_windows_and_trains_nothing(folder, first, tmp_path):
    _, _, seen, _ = first
    result = lemo_train("--config", folder / "run.yaml", "--seed", 2, "--preview", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    shown = re.split(r"window \d of the first step.*\n", result.stdout)[1:]
    assert len(shown) == 2
    for text, ids in zip(shown, seen, strict=False):
        plain = re.sub(r"\[\[|\]\]|\n-{40}\n", "", text)
        assert plain.strip() == tokenizer.decode(ids).strip()
    learnt = re.findall(r"\[\[(.*?)\]\]", shown[0], re.DOTALL)
    rows = json.loads((folder / "data.json").read_text())
    assert all(any(part.removesuffix("<|endoftext|>").strip() in row["completion"] for row in rows) for part in learnt)


def test_the_merged_model_is_the_adapted_one(folder, first):
    _, out, _, _ = first
    ids = torch.arange(3, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(merged, adapted, **TOLERANCE["fp32"])
    assert (merged - before).abs().max() > 1e-3
    assert (out / "merged" / "tokenizer.json").exists()


def test_the_adapter_has_a_card(first):
    _, out, _, _ = first
    card = huggingface_hub.ModelCard.load(out / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "held-out loss" in card.text
    assert "seed 2" in card.text


def test_stopped_resumed_and_made_longer(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [folder / "model", folder / "data.json", "--out", out, *SHORT, "--save-every", "1"]
    step = transformers.Trainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    result = lemo_train(*arguments, "--steps", "3")
    assert result.exit_code == 130
    assert "stopped at step 2 of 3: the same command with --resume goes on from its last checkpoint, checkpoint-2" in (
        result.stderr
    )
    monkeypatch.setattr(transformers.Trainer, "training_step", step)
    fewer = lemo_train(*arguments, "--steps", "2", "--resume")
    assert fewer.exit_code == 2
    assert "holds a run of 3 steps: resume it with as many, or more" in fewer.stderr
    longer = lemo_train(*arguments, "--steps", "5", "--resume")
    assert longer.exit_code == 0, longer.output
    assert "5 steps instead of 3" in longer.stdout
    assert [e["step"] for e in summary(out)["history"] if "loss" in e] == [1, 2, 3, 4, 5]
    assert yaml.safe_load((out / "run.yaml").read_text())["steps"] == 5


@pytest.mark.rendered
def test_a_dense_run_and_another_one_beside_it_on_the_page(folder, first, tmp_path):
    _, other, _, _ = first
    options = ["--preset", "dense", "--steps", "1", "--compare-with", other]
    result = lemo_train(folder / "model", folder / "data.json", "--out", tmp_path / "out", *SHORT, *options)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Kept tokens" not in text
    assert "Beside another run" in text
    assert page.figures_of(summary(other))["held-out loss"] in text
    differing = page.differing(summary(tmp_path / "out"), summary(other))
    assert {"steps", "alpha", "batch", "seed"} <= {*differing}
    assert "rank" not in differing
    assert len(differing) == len({*differing})
    # The plans are told apart.
    assert "attention dense, mlp dense, block_size 8" in text
    assert "attention keep" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [(1, "1"), (0, "0"), (1.0, "1.0"), (0.0, "0.0"), (True, "yes"), (False, "no"), (None, "default"), ((1, 0), "1, 0"),
     (4096, "4,096"), ("a", "a"), ((), "none"), ({"a": 1, "b": None, "c": False}, "a 1, c no")],
)  # fmt: skip
def test_a_value_on_the_page(value, words):
    assert page.in_words(value) == words


def test_a_plan_in_words():
    for name, preset in PRESETS.items():
        assert page.plan_in_words(dataclasses.asdict(preset)) == f'preset "{name}"'
    half = dataclasses.asdict(LemoConfig(attention=None, loss_segments=None, dense_layers=(0,)))
    for config in (half, json.loads(json.dumps(half))):
        words = page.plan_in_words(config)
        assert words.startswith("attention dense, mlp keep 0.4375")
        assert "dense_layers 0" in words
        assert "loss_segments none, all logits at once" in words


def test_a_cell_of_a_few_words_stays_in_one_line_and_a_long_one_does_not():
    made = page.table(("a", "b"), [("LoRA, sequences cut to half", "word " * 20)])
    assert '<td class="short">LoRA, sequences cut to half</td><td class="long">word ' in made
    assert made.startswith('<div class="scroll">')


def test_few_steps_are_said_to_be_few_and_none_is_without_a_rate(folder, tmp_path):
    rows = json.loads((folder / "data.json").read_text())[:8]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    options = [*SHORT, "--context", "128", "--out", tmp_path / "out"]
    result = lemo_train(folder / "model", tmp_path / "few.json", *options)
    assert result.exit_code == 0, result.output
    steps = summary(tmp_path / "out")["steps"]
    assert steps < 20
    assert f"note: {steps} steps are few to learn from" in result.stdout
    assert page.entries(summary(tmp_path / "out")["history"], "learning_rate")[0]["learning_rate"] > 0
    preview = lemo_train(folder / "model", tmp_path / "few.json", *options, "--context", "512", "--preview")
    assert preview.exit_code == 0, preview.output
    # A packed window is shown in part.
    assert preview.stdout.count("-" * 40) == 4
    assert "more documents" in preview.stdout


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains_and_merges(folder, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    options = ["--steps", "2", "--load-in", bits, "--merge"]
    result = lemo_train(folder / "model", folder / "data.json", "--out", out, *SHORT, *options)
    assert result.exit_code == 0, result.output
    assert any(site["kept_share"] for site in summary(out)["report"]["sites"])
    found = summary(out)["parameters"]
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert found["all"] - found["trained"] == base.num_parameters()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not hasattr(merged.config, "quantization_config")


def in_processes(folder, out, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lemo_fx"]
    command = [*launch, "train", str(folder / "model"), str(folder / "data.json"), "--out", str(out), *SHORT, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, tmp_path):
    options = ["--preset", "dense", "--steps", "2", "--batch", "2", "--eval-every", "1"]
    done = in_processes(folder, tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = lemo_train(folder / "model", folder / "data.json", "--out", tmp_path / "one", *SHORT, *options)
    assert alone.exit_code == 0, alone.output
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("loss", "eval_loss"):
        mine, others = ([e[name] for e in page.entries(s["history"], name)] for s in (one, two))
        assert mine == pytest.approx(others, rel=1e-4), name
    assert done.stdout.count("step 2/2: held-out loss") == 1


@pytest.mark.slow
def test_two_processes_fit_once_train_sparsely_and_refuse_in_words(folder, tmp_path):
    done = in_processes(folder, tmp_path / "out", "--steps", "2", "--score", "predicted", "--keep", "0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "out")["settings"]["batch"] == 2
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    done = in_processes(folder, tmp_path / "other", "--batch", "3")
    assert "error: --batch 3 cannot be shared by 2 processes: give a multiple of 2" in done.stderr


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """A cache of the Hub that holds the model as owner/tiny, and no network."""
    place = tmp_path / "hub" / "models--owner--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(folder / "model", place / "snapshots" / "abc")
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def test_a_model_by_its_name_on_the_hub(folder, cache):
    out = cache / "out"
    result = lemo_train("owner/tiny", folder / "data.json", "--out", out, *SHORT, "--steps", "1")
    assert result.exit_code == 0, result.output
    found = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == "owner/tiny"
    assert huggingface_hub.ModelCard.load(out / "adapter" / "README.md").data.base_model == "owner/tiny"
    assert json.loads((out / "settings.json").read_text())["model"] == "owner/tiny"


@pytest.mark.parametrize("command", ["train", "fit", "inspect", "bench"])
def test_a_model_that_neither_the_hub_nor_its_cache_gives(folder, cache, command):
    given = ["owner/absent"] if command in ("inspect", "bench") else ["owner/absent", str(folder / "data.json")]
    result = CliRunner().invoke(app, [command, *given, "--out", str(cache / "out")])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(
        "error: owner/absent is no folder here, and the Hub cannot be reached (offline?) nor has its cache all of it: "
    )
    assert result.stderr.count("\n") == 1


def test_data_by_their_name_on_the_hub(cache, monkeypatch):
    from lemo_fx.cli.rows import Text, read_rows

    with pytest.raises(InputError, match=r"owner/absent cannot be read: .*neither the Hub nor its cache gave it"):
        read_rows("owner/absent")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": "a"}] if split else {"train": [{"text": "b"}], "test": []}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [row.content for row in read_rows("owner/data:small@test[:9]")] == [Text("a")]
    assert [row.content for row in read_rows("owner/data")] == [Text("b")]
    assert asked == [("owner/data", "small", "test[:9]"), ("owner/data", None, None)]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: {"test": []})
    with pytest.raises(InputError, match="owner/data has no part 'train': give one of test as owner/data@PART"):
        read_rows("owner/data")


def test_an_adapter_is_uploaded_where_that_was_asked_for(folder, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    arguments = [folder / "model", folder / "data.json", "--out", out, *SHORT, "--steps", "1", "--push", "me/it"]
    monkeypatch.setattr("lemo_fx.cli.run.get_token", lambda: None)
    refused = lemo_train(*arguments)
    assert refused.exit_code == 2
    assert "hf auth login" in refused.stderr
    assert not out.exists()

    class Api:
        def create_repo(self, name, **kwargs):
            calls.append((name, kwargs["private"]))

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            if len(calls) == 2:
                raise OSError("no route")

    monkeypatch.setattr("lemo_fx.cli.run.get_token", lambda: "token")
    monkeypatch.setattr("lemo_fx.cli.results.HfApi", Api)
    failed = lemo_train(*arguments)
    assert failed.exit_code == 2
    assert "the run is done, but me/it was not uploaded: no route; try `hf upload me/it" in failed.stderr
    again = lemo_train(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert calls[-2:] == [("me/it", True), ("me/it", ["README.md", "adapter_config.json", "adapter_model.safetensors"])]


@pytest.mark.parametrize("asked", [None, 512])
def test_a_window_is_as_long_as_the_longest_document_and_no_longer_than_the_model_reads(asked):
    from lemo_fx.cli.data import Document
    from lemo_fx.cli.prepare import context_of

    def of(*lengths):
        return [Document(torch.zeros(n).numpy(), torch.zeros(n).numpy()) for n in lengths]

    config = transformers.LlamaConfig(max_position_embeddings=8192)
    said = []
    found = [context_of(of(*lengths), asked, config, said.append) for lengths in ((100, 300), (5000, 9), (20_000, 9))]
    assert found == ([4096, 5000, 8192] if asked is None else [512] * 3)
    assert said[-1] == "1 of 2 documents are longer than a window and are cut into several"


def test_every_preset_is_a_choice_of_every_command(folder, tmp_path):
    helped = CliRunner().invoke(app, ["inspect", "--help"]).output
    assert all(name in helped for name in PRESETS)
    result = CliRunner().invoke(app, ["inspect", str(folder / "model"), "--preset", "dense", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "left dense by the plan" in result.output


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"lemo-fx \d+\.\d+.*\n", result.stdout)
