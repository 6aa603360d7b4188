"""Figures on the pages are those of the committed result files, and of `lemo-fx estimate`."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer

from lemo_fx.cli import demo, estimate

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "benchmarks" / "bench"
ROWS = {
    "as it is": ["as it is", "without"],
    "LoRA": ["LoRA"],
    "careful": ['"careful"'],
    "balanced": ['"balanced"'],
    "balanced, base in float8": ['base="float8"', "base held in float8"],
    "fast": ['"fast"'],
    "keep 0.25, every key": ['keys="every"'],
    "keep 0.25, every key, float8": ["all in float8"],
}


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a text, its head left out, stars and quotes too."""
    text = (ROOT / page).read_text()
    table = re.search(r"(?:^\|.*\n)+", text[text.index(heading) :], re.MULTILINE)
    lines = table.group().splitlines()[2:]
    return [[cell.strip().replace("*", "") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("page", "heading", "file"),
    [
        ("README.md", "## Measured", "llama3-8b-32k"),
        ("docs/results.md", "## Whole Trainer", "llama3-8b-32k"),
        ("docs/results.md", "| `bench/llama3-8b-32k-qlora.json`", "llama3-8b-32k-qlora"),
        ("docs/results.md", "| `bench/llama3-8b-32k-qlora-float8.json`", "llama3-8b-32k-qlora-float8"),
        ("docs/results.md", "| `bench/llama3-8b-32k-every-key.json`", "llama3-8b-32k-every-key"),
    ],
)
def test_whole_steps_are_those_of_the_file(page, heading, file):
    runs = {run["plan"]: run for run in json.loads((BENCH / f"{file}.json").read_text())["runs"]}
    lora = runs["LoRA"]
    rows = rows_of(page, heading)
    assert len(rows) == len(runs)
    for row, (plan, run) in zip(rows, runs.items(), strict=True):
        assert any(word in row[0] for word in ROWS[plan])
        cells = " ".join(row[1:])
        assert f"{1e3 * run['step_seconds']:,.0f} ms" in cells
        assert f"{run['peak_bytes'] / 1e9:.1f} GB" in cells
        if plan != "LoRA":
            assert f"{lora['step_seconds'] / run['step_seconds']:.2f}x" in cells
            assert f"{run['peak_bytes'] / lora['peak_bytes']:.2f}x" in cells


def test_other_results_of_bench_on_their_page():
    rows = iter(rows_of("docs/results.md", "## Whole Trainer steps, other lengths"))
    for name, context in (
        ("llama3-8b-8k", 8192),
        ("qwen3-4b-32k", 32768),
        ("qwen3-30b-a3b-half-32k", 32768),
    ):
        every = json.loads((BENCH / f"{name}.json").read_text())["runs"]
        runs = [run for run in every if run["context"] == context]
        lora = next(run for run in runs if run["plan"] == "LoRA")
        for run in runs:
            row = " ".join(next(rows))
            assert f"`{name}.json`" in row
            assert run["plan"] in row
            assert f"{1e3 * run['step_seconds']:,.0f} ms" in row
            assert f"{run['peak_bytes'] / 1e9:.1f} GB" in row
            if run is not lora:
                assert f"{lora['step_seconds'] / run['step_seconds']:.2f}x" in row
                assert f"{run['peak_bytes'] / lora['peak_bytes']:.2f}x" in row
    assert next(rows, None) is None


def test_the_demo():
    runs = json.loads((ROOT / "benchmarks" / "demo" / "demo.json").read_text())["runs"]
    for row, (name, (title, show)) in zip(rows_of("docs/results.md", "## The shipped"), demo.ROWS.items(), strict=True):
        assert row[0] == title
        for cell, run in zip(row[1:], runs.values(), strict=True):
            assert cell.startswith(show(run[name]))


def test_the_longest_contexts_are_what_estimate_says():
    shape = estimate.shape_of(BENCH / "config-llama3-8b.json")
    names = ("LoRA", "careful", "QLoRA", "careful, QLoRA")
    for row, name in zip(rows_of("README.md", "## Which GPU"), names, strict=True):
        lengths = [estimate.longest(shape, name, size * 1e9, 8) for size in (24, 48, 80, 141)]
        assert row[1:5] == [f"{length:,}" for length in lengths]


def test_the_share_of_gemma_4s_per_layer_inputs():
    with torch.device("meta"):
        layer = Gemma4TextDecoderLayer(Gemma4TextConfig(), 0)
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.dim() == 2}
    share = sum(size for name, size in sizes.items() if "per_layer" in name) / sum(sizes.values())
    (row,) = [row for row in rows_of("docs/architectures.md", "## What the report says") if "per_layer_input" in row[0]]
    assert f"{100 * share:.1f} % of a layer's matrices" in row[1]


def test_the_readme_is_short_and_opens_with_what_the_default_does():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) < 9000
    assert "Every token is computed" in text[:300]
    assert "It does not pay" in text[:2000]
