"""`lemo-fx train`, from files to an adapter, a page and a summary."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from statistics import fmean

import pytest
import torch
from peft import PeftModel
from tiny import TOLERANCE, tiny
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from lemo_fx.cli.app import app
from lemo_fx.cli.demo import ASSETS
from lemo_fx.cli.prepare import Windows, one_window

SHORT = ["--context", "128", "--block-size", "8", "--steps", "6", "--eval-windows", "2", "--rate", "1e-2"]
KILL = """
import os, pathlib, signal, sys, transformers
from lemo_fx.cli.app import app
step = transformers.Trainer.training_step
def killed(self, *args, **kwargs):
    if self.state.global_step == 4:
        half = pathlib.Path(self.args.output_dir, "checkpoint-5")
        half.mkdir()
        (half / "trainer_state.json").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
transformers.Trainer.training_step = killed
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the shipped tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("train")
    tiny("llama", layers=4, vocab_size=2048).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "model" / name, folder / "model")
    text = (ASSETS / "documents" / "train_sqlite_vtab.txt").read_text()
    (folder / "texts").mkdir()
    (folder / "texts" / "long.txt").write_text(text[:4000])
    rows = [{"text": text[i : i + 150]} for i in range(4000, 7000, 150)] + [{"input_ids": [*range(3, 90)]}]
    (folder / "texts" / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def lemo_train(folder, out, *options, data="texts", model="model"):
    return CliRunner().invoke(app, ["train", str(folder / model), str(folder / data), "--out", str(out), *options])


def summary(out):
    return json.loads((out / "summary.json").read_text())


def training_losses(out):
    return {entry["step"]: entry["loss"] for entry in summary(out)["history"] if "loss" in entry}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.pictures = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            given = dict(attributes)
            self.pictures[given["alt"]] = base64.b64decode(given["src"].partition("base64,")[2])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.rendered
def test_the_whole_job(folder, tmp_path):
    """Fits predictors, trains, and saves an adapter that has the held-out loss of the page without lemo_fx."""
    heldout = [*range(3, 90), *range(3, 90), *range(3, 20)]
    (folder / "heldout.jsonl").write_text(json.dumps({"input_ids": heldout}))
    options = ["--keep", "0.5", "--score", "predicted", "--eval", str(folder / "heldout.jsonl"), "--batch", "2"]
    result = lemo_train(folder, tmp_path / "out", *SHORT, *options, "--targets", "up_proj,down_proj", "--rate", "0.05")
    assert result.exit_code == 0, result.output
    assert "documents together" in result.stdout
    out = tmp_path / "out"
    assert (out / "predictors" / "predictors.json").exists()
    found = summary(out)
    assert found["steps"] == 6
    assert found["heldout_loss"]["after"] < found["heldout_loss"]["before"] - 0.01
    logged = [entry for entry in found["history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5, 6]
    for kind in ("attention", "mlp"):
        assert all(0.4 < s < 0.6 for e in logged for s in e["lemo_fx/kept"][kind][1:3])
        assert all(e["lemo_fx/kept"][kind][i] == 1 for e in logged for i in (0, 3))
    assert all(e["lemo/peak_memory_gib"] > 0.05 and e["lemo_fx/seconds"] > 0 for e in logged)
    assert all("lemo/recall_mlp" in entry for entry in logged)
    assert {"command", "torch", "device"} <= set(found["environment"])

    text = (out / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert set(page.pictures) == {"Loss", "Kept tokens", "Memory", "A rewritten layer", "Recall of the predictors"}
    assert all(b"<svg" in picture and len(picture) > 5000 for picture in page.pictures.values())
    assert not re.search(r"(src|href)=.https?:", text)
    assert f"{found['heldout_loss']['after']:.4f}" in text

    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (16, ["down_proj", "up_proj"])
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.tensor(heldout)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids.split(128)]
    assert fmean(losses) == pytest.approx(found["heldout_loss"]["after"], rel=TOLERANCE["fp32"]["rtol"])


def test_a_run_that_diverged_saves_no_adapter(folder, tmp_path):
    result = lemo_train(folder, tmp_path / "out", *SHORT, "--rate", "1e30")
    assert result.exit_code == 2
    assert "no adapter is saved: try a lower --rate" in result.stderr
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.slow
def test_compiled_layers_train_alike(folder, tmp_path, monkeypatch):
    """Windows of several lengths, evaluation between steps, and the graph on the page drawn of a compiled model."""
    compiled = []

    def compile_without_inductor(layer):
        compiled.append(layer)
        # The third layer is sparse and follows another one's choice; the others take as long again and show no more.
        if len(compiled) == 3:
            layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    for name, options in {"plain": [], "compiled": ["--compile"]}.items():
        torch.compiler.reset()
        counters.clear()
        result = lemo_train(folder, tmp_path / name, *SHORT, *options, "--no-pack", "--rank", "4")
        assert result.exit_code == 0, result.output
        assert len(compiled) == (4 if name == "compiled" else 0)
        # For the first window's length and for any length; evaluations run the layers as they are.
        assert counters["stats"]["unique_graphs"] == (2 if name == "compiled" else 0)
    torch.compiler.reset()
    losses = training_losses(tmp_path / "compiled")
    assert losses == pytest.approx(training_losses(tmp_path / "plain"), rel=TOLERANCE["fp32"]["rtol"])


@pytest.mark.slow
def test_killed_and_resumed(folder, tmp_path):
    """kill -9 in a step, with a checkpoint half written: the resumed run's losses are the uninterrupted run's."""
    options = [*SHORT, "--eliminated", "exact", "--score", "random", "--save-every", "2", "--eval-every", "3"]
    whole = lemo_train(folder, tmp_path / "whole", *options)
    assert whole.exit_code == 0, whole.output
    arguments = ["train", str(folder / "model"), str(folder / "texts"), "--out", str(tmp_path / "killed"), *options]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILL, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not (tmp_path / "killed" / "summary.json").exists()

    again = lemo_train(folder, tmp_path / "killed", *options)
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    other = lemo_train(folder, tmp_path / "killed", *options, "--resume", "--rank", "2", "--keep", "0.25")
    assert other.exit_code == 2
    changed = "plan.attention.keep, plan.attention.slope, plan.mlp.keep, plan.mlp.slope, settings.rank"
    assert changed in other.stderr

    resumed = lemo_train(folder, tmp_path / "killed", *options, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "going on from" in resumed.stdout
    assert "checkpoint-4" in resumed.stdout
    assert training_losses(tmp_path / "killed") == training_losses(tmp_path / "whole")
    assert len(training_losses(tmp_path / "killed")) == 6
    evaluated = [
        [(e["step"], e["eval_loss"]) for e in summary(tmp_path / run)["history"] if "eval_loss" in e]
        for run in ("whole", "killed")
    ]
    assert [step for step, _ in evaluated[0]] == [0, 3, 6]
    assert evaluated[1] == evaluated[0]

    # A finished run has nothing left to do but its page.
    (tmp_path / "killed" / "report.html").unlink()
    assert lemo_train(folder, tmp_path / "killed", *options, "--resume").exit_code == 0
    assert (tmp_path / "killed" / "report.html").exists()
    assert training_losses(tmp_path / "killed") == training_losses(tmp_path / "whole")


def test_evaluation_never_holds_the_logits_of_a_window(folder, tmp_path, monkeypatch):
    """A window that trains must not run out of memory when its held-out loss is taken."""
    seen = []
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *a, **k: seen.append(a[0].shape) or loss(*a, **k))
    result = lemo_train(folder, tmp_path / "out", *SHORT, "--steps", "1", "--no-checkpointing", "--no-pack")
    assert result.exit_code == 0, result.output
    assert not seen
    assert "together" not in result.stdout


def bad_folder(folder, name, **files):
    made = folder / name
    made.mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json") if "config_json" in files else ():
        shutil.copy(ASSETS / "model" / file, made)
    for file, content in files.items():
        (made / file.replace("_json", ".json").replace("_safetensors", ".safetensors")).write_text(content)
    return name


CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, num_hidden_layers=1, architectures=["LlamaForCausalLM"]
).to_json_string()
BAD = {
    "no model": ({"model": "absent"}, [], "absent does not exist: give a local model folder"),
    "config only": ({"model": ("config_only", {"config_json": CONFIG})}, [], "no *.safetensors"),
    "unknown type": (
        {"model": ("unknown", {"config_json": '{"model_type": "abacus"}', "model_safetensors": ""})},
        [],
        "does not describe a model",
    ),
    "damaged weights": ({"model": ("torn", {"config_json": CONFIG, "model_safetensors": "x"})}, [], "cannot be loaded"),
    "no data": ({"data": "absent"}, [], "does not exist"),
    "empty data": ({"data": ("empty", {"a.txt": ""})}, [], "holds no text"),
    "too little data": ({"data": ("little", {"a.txt": "a"})}, [], "too little text"),
    "context": ({}, ["--context", "513"], "choose --context 512 or less"),
    "small context": ({}, ["--context", "100"], "under four blocks"),
    "keep": ({}, ["--keep", "2"], "keep=2.0"),
    "two plans": ({}, ["--plan", "lemo.json", "--keep", "0.5"], "leave out --preset, --keep, --slope"),
    "preset": ({}, ["--preset", "quick"], "'careful', 'balanced', 'fast'"),
    "rank": ({}, ["--rank", "0"], "rank=0"),
    "seed": ({}, ["--seed", "-1"], "seed=-1 must be a number from 0 to 4294967295"),
    "large seed": ({}, ["--seed", "4294967296"], "seed=4294967296"),
    "rate": ({}, ["--rate", "inf"], "rate=inf must be a number greater than 0"),
    "targets": ({}, ["--targets", "no_such_proj"], "no_such_proj"),
    "predictors": ({}, ["--predictors", "absent"], "there is no folder absent"),
    "attention": ({}, ["--attention", "abacus"], "abacus"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_run(folder, tmp_path, case):
    names, options, says = BAD[case]
    names = {what: bad_folder(folder, given[0], **given[1]) if isinstance(given, tuple) else given
             for what, given in names.items()}  # fmt: skip
    size = [] if "--context" in options else ["--context", "256"]
    result = lemo_train(folder, tmp_path / "out", *size, *options, **names)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_windows_of_one_document_carry_no_positions():
    """transformers would make a square mask of them."""
    assert set(one_window([{"input_ids": torch.arange(3), "labels": torch.arange(3)}])) == {"input_ids", "labels"}
    assert len(Windows([])) == 0
