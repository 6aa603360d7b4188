"""Draw the committed results of the model benchmark: time against memory, one picture per file.

python tools/plot_benchmarks.py benchmarks/model/*.json
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from matplotlib.figure import Figure


def draw(path: Path) -> Path:
    """Step time and peak memory of every variant of one result file; returns the picture's path."""
    result = json.loads(path.read_text())
    runs = [run for run in result["runs"] if "step_ms" in run]
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        baseline = run["variant"].startswith("lora")
        style = {"marker": "s", "color": "#6b7178"} if baseline else {"marker": "o", "color": f"C{number}"}
        axes.plot(run["peak_allocated_gb"], run["step_ms"], ls="", ms=8, label=run["variant"], **style)
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


def main(results: list[Path]) -> None:
    """Draw each result file beside itself."""
    for path in results:
        print(draw(path))


if __name__ == "__main__":
    typer.run(main)
