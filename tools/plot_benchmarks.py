"""Draw committed results: time against memory of each model benchmark; throughput by GPUs of a shape's scaling runs.

Scaling runs get a table as well, in markdown.

python tools/plot_benchmarks.py benchmarks/model/*.json
python tools/plot_benchmarks.py benchmarks/scaling/llama3-8b-{1,2}.json
python tools/plot_benchmarks.py --lengths lengths.png benchmarks/model/llama3-8b-{32k-float8,128k}.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

WORDS = (
    (r"^exact-([\d.]+)", r"exact \1, a choice a site"),
    (r"^step-([\d.]+)", r"exact \1"),
    (r"^(skip|truncated|tokentune)-([\d.]+)", r"\1 \2"),
    (r"^lora", "LoRA"),
    (r"^longlora", "LongLoRA"),
    (r"^truncated ([\d.]+)", r"sequences cut to \1"),
    (r"-0.5-steps", ", half the steps"),
    (r"-half-batch", ", half the windows"),
    (r"-more$", ", more steps"),
    (r"-both-float8", ", all float8"),
    (r"-last-two", ", last two dense"),
    (r"-more-finish", ", more steps, dense end"),
    (r"-slope-([\d.]+)", r", slope \1"),
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
    lengths = sorted({run["tokens"] for run in runs})
    for run in runs:
        marker = "s" if run["variant"].startswith(("lora", "longlora")) else "o"
        label = words(run["variant"]) + (f", {run['tokens']} tokens" if len(lengths) > 1 else "")
        axes.plot(run["peak_allocated_gb"], run["step_ms"], ls="", ms=8, label=label, marker=marker)
    axes.set(
        xlabel="peak memory, GB (weights included)",
        ylabel="step, ms",
        title=f"{result['shape']}, {' and '.join(map(str, lengths))} tokens, {result['environment']['device']}",
        ylim=(0, None),
    )
    axes.axvline(runs[0]["weights_gb"], color="#b8b8b8", lw=1, ls=":")
    axes.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=150)
    return out


def draw_lengths(paths: list[Path], out: Path) -> Path:
    """Times faster than checkpointed LoRA of the same file, and share of its memory, by length of the sequence."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for result in (json.loads(path.read_text()) for path in paths):
        runs = [run for run in result["runs"] if "step_ms" in run]
        for run in runs:
            lora = next(r for r in runs if r["tokens"] == run["tokens"] and r["variant"] == "lora-checkpointed")
            faster, memory = lora["step_ms"] / run["step_ms"], run["peak_allocated_gb"] / lora["peak_allocated_gb"]
            found.setdefault(run["variant"], []).append((run["tokens"], faster, memory))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant, points in found.items():
        if len(points) < 2 or variant == "lora-checkpointed":
            continue
        tokens, faster, memory = zip(*sorted(points), strict=True)
        for axes, values in ((left, faster), (right, memory)):
            axes.plot(tokens, values, marker="o", label=words(variant.removesuffix("-checkpointed")))
            axes.axhline(1, color="#999", lw=0.8, ls=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(tokens, [f"{n // 1024}K" for n in tokens])
            axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="tokens", ylabel="times faster than checkpointed LoRA", ylim=(0, None))
    right.set(xlabel="tokens", ylabel="share of its peak memory", ylim=(0, 1.1))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(out, dpi=150)
    return out


def draw_scaling(paths: list[Path]) -> Path:
    """Tokens per second by number of GPUs, one panel per sample length, from one file per number of GPUs."""
    results, runs = _scaling_runs(paths)
    lengths = sorted({run["tokens"] for run in runs})
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    labelled: set[str] = set()
    figure = Figure(figsize=(5.2 * len(lengths), 4.6), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        for number, variant in enumerate(variants):
            for wrap, line in (("ddp", "-"), ("fsdp2", "--"), ("sequence", "-.")):
                points = [r for r in runs if (r["tokens"], r["variant"]) == (length, variant)]
                points = [r for r in points if r["wrap"] in (wrap, "none")]
                # A variant that only one process ran is drawn once.
                if all(r["wrap"] == "none" for r in points) and (wrap != "ddp" or not points):
                    continue
                gpus, rates = [r["gpus"] for r in points], [r["tokens_per_s"] for r in points]
                label = f"{words(variant)}, {wrap}"
                label = None if label in labelled else label
                labelled.add(f"{words(variant)}, {wrap}")
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


def _scaling_runs(paths: list[Path]) -> tuple[list[dict], list[dict]]:
    """(results by number of GPUs, their measured runs with "gpus" and, where one GPU ran the same, "efficiency")."""
    results = sorted((json.loads(path.read_text()) for path in paths), key=lambda result: result["processes"])
    runs = [{**run, "gpus": result["processes"]} for result in results for run in result["runs"] if "step_ms" in run]
    alone = {(run["tokens"], run["variant"]): run["tokens_per_s"] for run in runs if run["gpus"] == 1}
    for run in runs:
        if (run["tokens"], run["variant"]) in alone:
            run["efficiency"] = run["tokens_per_s"] / (run["gpus"] * alone[run["tokens"], run["variant"]])
    return results, runs


def scaling_table(paths: list[Path]) -> str:
    """Markdown: every measured run of one shape, with its share of linear scaling and its speed-up over LoRA's."""
    _, runs = _scaling_runs(paths)
    lora = {
        (run["tokens"], run["gpus"], run["wrap"]): run["tokens_per_s"]
        for run in runs
        if run["variant"] == "lora-checkpointed"
    }
    lines = [
        "| tokens a sample | variant | GPUs | | step | tokens/s | of linear | against LoRA | peak memory a GPU "
        "| communication (of it overlapped) | loss off one process's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: (-run["tokens"], run["gpus"], run["wrap"])):
        base = lora.get((run["tokens"], run["gpus"], run["wrap"]))
        share = run.get("communication_share")
        cells = [
            f"{run['tokens']:,}",
            words(run["variant"]),
            str(run["gpus"]),
            {"none": "", "ddp": "DDP", "fsdp2": "FSDP2", "sequence": "shared sequence"}[run["wrap"]],
            f"{run['step_ms']:,.0f} ms",
            f"{run['tokens_per_s']:,}",
            f"{run['efficiency']:.1%}" if "efficiency" in run else "",
            f"{run['tokens_per_s'] / base:.2f}x" if base else "",
            f"{run['peak_allocated_gb']:.1f} GB" if "peak_allocated_gb" in run else "",
            "" if share is None else f"{share:.1%} ({run['communication_overlapped']:.0%})",
            f"{abs(run['loss'] / run['loss_one_process'] - 1):.1e}" if run["loss_one_process"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    results: list[Path],
    lengths: Annotated[Path | None, typer.Option(help="draw all files into this one picture, by length")] = None,
) -> None:
    """Draw each result file beside itself; scaling runs of one shape together, with a table."""
    if lengths is not None:
        print(draw_lengths(results, lengths))
        return
    shapes: dict[str, list[Path]] = {}
    for path in results:
        result = json.loads(path.read_text())
        if "processes" in result:
            shapes.setdefault(result["shape"], []).append(path)
        else:
            print(draw(path))
    for paths in shapes.values():
        picture = draw_scaling(paths)
        table = picture.with_suffix(".md")
        table.write_text(scaling_table(paths))
        print(picture, table, sep="\n")


if __name__ == "__main__":
    typer.run(main)
