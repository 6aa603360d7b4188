"""Draw committed results: time against memory of each model benchmark; throughput by GPUs of a shape's scaling runs.

python tools/plot_benchmarks.py benchmarks/model/*.json
python tools/plot_benchmarks.py benchmarks/scaling/llama3-8b-*.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer
from matplotlib.figure import Figure

WORDS = (
    (r"^exact-([\d.]+)", r"exact \1, a choice a site"),
    (r"^step-([\d.]+)", r"exact \1"),
    (r"^(skip|truncated|tokentune)-([\d.]+)", r"\1 \2"),
    (r"^lora", "LoRA"),
    (r"^truncated ([\d.]+)", r"sequences cut to \1"),
    (r"-0.5-steps", ", half the steps"),
    (r"-half-batch", ", half the windows"),
    (r"-more$", ", 1.36 times the steps"),
    (r"-shared", ", one selection"),
    (r"-attention-kept", ", attention kept"),
    (r"-elementwise", ", elementwise recompute"),
    (r"-lean", ", aggressive recomputation"),
    (r"-dense-", ", dense: "),
    (r"-(float8|offload|eager|compiled|checkpointed|liger|finish|double-rate|block-\d+|all-layers)", r", \1"),
)


def words(name: str) -> str:
    """What a variant of `bench_model` or a plan of `study_accuracy` is, for a picture."""
    for pattern, text in WORDS:
        name = re.sub(pattern, text, name)
    return name


def draw(path: Path) -> Path:
    """Step time and peak memory of every variant of one result file; returns the picture's path."""
    result = json.loads(path.read_text())
    runs = [run for run in result["runs"] if "step_ms" in run and "note" not in run]
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        marker = "s" if run["variant"].startswith(("lora", "longlora")) else "o"
        axes.plot(run["peak_allocated_gb"], run["step_ms"], ls="", ms=8, label=words(run["variant"]), marker=marker)
    axes.set(
        xlabel="peak memory, GB (weights included)",
        ylabel="step, ms",
        title=f"{result['shape']}, {runs[0]['tokens']} tokens, {result['environment']['device']}",
        ylim=(0, None),
    )
    axes.axvline(runs[0]["weights_gb"], color="#b8b8b8", lw=1, ls=":")
    axes.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=150)
    return out


def draw_scaling(paths: list[Path]) -> Path:
    """Tokens per second by number of GPUs, one panel per sample length, from one file per number of GPUs."""
    results = sorted((json.loads(path.read_text()) for path in paths), key=lambda result: result["processes"])
    runs = [{**run, "gpus": result["processes"]} for result in results for run in result["runs"] if "step_ms" in run]
    lengths = sorted({run["tokens"] for run in runs})
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    figure = Figure(figsize=(5.2 * len(lengths), 4.6), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        for number, variant in enumerate(variants):
            for wrap, line in (("ddp", "-"), ("fsdp2", "--")):
                points = [r for r in runs if (r["tokens"], r["variant"]) == (length, variant)]
                points = [r for r in points if r["wrap"] in (wrap, "none")]
                gpus, rates = [r["gpus"] for r in points], [r["tokens_per_s"] for r in points]
                label = f"{words(variant)}, {wrap}" if length == lengths[0] else None
                axes.plot(gpus, rates, ls=line, marker="o", ms=4, color=f"C{number}", label=label)
                if gpus and gpus[0] == 1:
                    axes.plot(gpus, [rates[0] * n for n in gpus], color="#b8b8b8", lw=1, ls=":")
        axes.set(xlabel="GPUs (dotted: linear)", ylabel="tokens per second", title=f"{length} tokens a sample")
        axes.set_xticks(sorted({run["gpus"] for run in runs}))
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results[0]['shape']}, {results[0]['environment']['device']}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    out = paths[0].with_name(f"{results[0]['shape']}.png")
    figure.savefig(out, dpi=150)
    return out


def main(results: list[Path]) -> None:
    """Draw each result file beside itself; scaling runs of one shape together."""
    shapes: dict[str, list[Path]] = {}
    for path in results:
        result = json.loads(path.read_text())
        if "processes" in result:
            shapes.setdefault(result["shape"], []).append(path)
        else:
            print(draw(path))
    for paths in shapes.values():
        print(draw_scaling(paths))


if __name__ == "__main__":
    typer.run(main)
