"""`lemo-fx compare`: whole runs on the same data, one page."""

import json
import math
import shutil

import numpy as np
import pytest
from tiny import tiny
from typer.testing import CliRunner

from lemo_fx.cli import compare, data, prepare
from lemo_fx.cli.app import app
from lemo_fx.cli.compare import CUT, FEWER, WORDS, Contestant
from lemo_fx.cli.demo import ASSETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny("llama", layers=4, vocab_size=2048).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "model" / name, folder / "model")
    (folder / "text.txt").write_text((ASSETS / "documents" / "train_sqlite_vtab.txt").read_text()[:12000])
    return folder


def run(folder, out, *options):
    given = ["--context", "256", "--steps", "4", "--eval-windows", "2", "--eval-every", "2", "--rate", "1e-2"]
    return CliRunner().invoke(
        app, ["compare", str(folder / "model"), str(folder / "text.txt"), "--out", str(out), *given, *options]
    )


@pytest.mark.rendered
def test_all_are_measured_on_the_same_windows_and_stand_in_one_page(folder, tmp_path):
    result = run(folder, tmp_path / "out", "--plans", "careful,cut,fewer", "--same-time")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / compare.FIGURES).read_text())["runs"]
    by_name = {one["name"]: one for one in found}
    assert [one["name"] for one in found][:3] == ["LoRA", "careful", WORDS[CUT]]
    # Before training they are one and the same model, read in whole windows.
    assert len({round(one["before"], 6) for one in found}) == 1
    assert by_name["careful"]["steps"] == by_name[WORDS[CUT]]["steps"] == 4
    assert by_name["careful"]["after"] != by_name["LoRA"]["after"]
    cut = json.loads((tmp_path / "out" / "LoRA-sequences-cut-to-half" / "summary.json").read_text())
    whole = json.loads((tmp_path / "out" / "LoRA" / "summary.json").read_text())
    # The last window may be short.
    assert 2 * whole["data"]["windows"] - 1 <= cut["data"]["windows"] <= 2 * whole["data"]["windows"]
    assert cut["data"]["heldout_windows"] == whole["data"]["heldout_windows"]
    assert (cut["settings"]["batch"], whole["settings"]["batch"]) == (2, 1)
    shown = (tmp_path / "out" / compare.PAGE).read_text()
    for name in by_name:
        assert name in shown
    assert "One seed" in shown
    # What is said of the data is said once, and of every run what it is and how far it came.
    assert result.stdout.count("read from") == 1
    assert result.stdout.count("step 4/4: held-out loss") >= 3
    again = run(folder, tmp_path / "out", "--plans", "careful")
    assert again.exit_code == 2
    assert "holds a comparison already" in again.stderr


def test_bad_options(folder, tmp_path):
    result = run(folder, tmp_path / "out", "--plans", "carful")
    assert result.exit_code == 2
    assert "'carful' is not one of cut, fewer, careful" in result.stderr
    assert "whole runs" in run(folder, tmp_path / "out", "--resume").stderr


def test_windows_are_cut_for_training_alone_and_no_token_is_lost():
    def document(first, length):
        ids = np.arange(first, first + length, dtype=np.int32)
        return data.Document(ids, ids)

    window = [document(0, 70), document(100, 30)]
    prepared = prepare.Prepared([window, [document(200, 100)]], [window], 100)
    halves = prepare.cut(prepared, 2)
    assert halves.heldout == prepared.heldout
    assert [[len(piece) for piece in one] for one in halves.train] == [[50], [20, 30], [50], [50]]
    tokens = [token for one in halves.train for piece in one for token in piece.ids.tolist()]
    assert tokens == [*range(70), *range(100, 130), *range(200, 300)]


def one(name, after, seconds, before=3.0):
    return Contestant(name, 10, seconds / 10, 1.0, before, after, [(0.0, before), (seconds, after)])


def test_the_verdict_says_what_the_figures_say():
    words = "\n".join(compare.verdict([one("LoRA", 2.0, 100), one("careful", 2.01, 50), one(WORDS[FEWER], 2.1, 50)]))
    assert f"by {1 - math.exp(-1):.1%}" in words
    assert "careful: 99% of what LoRA learns, in 0.50 of its time; perplexity +1.01% beside it." in words
    assert "learns most: careful." in words
    assert "did not learn" in compare.verdict([one("LoRA", 3.1, 100), one("careful", 3.2, 50)])[0]


def test_without_float8_the_presets_that_need_it_are_not_compared(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compare.kinds_of(None) == ("careful", CUT, FEWER)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lemo_fx.cli.compare.has_float8", lambda device: True)
    assert compare.kinds_of(None) == ("careful", "balanced", "fast", CUT, FEWER)
