"""What `lemo-fx bench` shows of its runs: lines, a table, a picture, and the files it leaves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from lemo_fx import draw
from lemo_fx.cli.bench import LORA, UNTOUCHED, Outcome
from lemo_fx.cli.machine import environment
from lemo_fx.files import write_json, writing


def _in_short(failed: str) -> str:
    """Why a run failed, for a cell of the table; the whole is in its line."""
    kind, _, reason = failed.partition(": ")
    return f"{kind}: {textwrap.shorten(reason.partition(': ')[0], 24)}" if kind == "refused" else kind


def table(outcome: Outcome) -> Table:
    """All runs beside LoRA of the same length."""
    shown = Table("tokens", "", "tokens kept", "step", "", "peak memory", "", "first loss")
    for column in shown.columns[2:]:
        column.justify = "right"
    for run in outcome.runs:
        if run.step_seconds is None or run.peak_bytes is None:
            shown.add_row(f"{run.context:,}", run.plan, "", "", "", _in_short(run.failed or ""), "", "")
            continue
        lora = outcome.beside(run)
        faster = memory = ""
        if lora is not None and lora is not run:
            assert lora.step_seconds is not None
            assert lora.peak_bytes is not None
            faster = f"{lora.step_seconds / run.step_seconds:.2f}x as fast"
            memory = f"{run.peak_bytes / lora.peak_bytes:.2f}x"
        shown.add_row(
            f"{run.context:,}",
            run.plan,
            "" if run.kept_share is None else f"{run.kept_share:.0%}",
            f"{1e3 * run.step_seconds:,.0f} ms",
            faster,
            f"{run.peak_bytes / 1e9:.2f} GB",
            memory,
            f"{run.first_loss:.4f}",
        )
    return shown


def title(outcome: Outcome) -> str:
    """The model by file, type and size without adapters, and the device."""
    size = outcome.parameters["all"] - outcome.parameters["trained"]
    words = next(
        (f"{size / n:.1f} {word}" for n, word in ((1e9, "billion"), (1e6, "million")) if size >= n), f"{size:,}"
    )
    name = Path(outcome.model).resolve().name
    return f"{name}: {outcome.model_type}, {words} parameters\n{outcome.device}"


def _style(name: str, number: int) -> dict[str, Any]:
    """A plan's marker: the script as it is lies on top and is hollow, since LoRA may cost the same."""
    if name == UNTOUCHED:
        return {"marker": "s", "color": draw.COLOURS[0], "mfc": "none", "ms": 12, "zorder": 4}
    return (
        {"marker": "s", "color": draw.COLOURS[0], "ms": 8}
        if name == LORA
        else {"marker": "o", "color": f"C{number}", "ms": 8}
    )


def plot(outcome: Outcome) -> Figure:
    """Step time against peak memory, one panel a length."""
    contexts = outcome.settings.contexts
    figure = Figure(figsize=(4.6 * len(contexts) + 0.6, 4.4), layout="constrained")
    labels: dict[str, Any] = {}
    for axes, context in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        for number, name in enumerate(outcome.plans):
            for run in outcome.runs:
                if (run.plan, run.context) == (name, context) and run.step_seconds is not None and run.peak_bytes:
                    point = axes.plot(run.peak_bytes / 1e9, run.step_seconds, ls="", **_style(name, number))
                    labels[name] = point[0]
        axes.set(title=f"{context:,} tokens", xlabel="peak memory, GB", ylabel="seconds a step")
        _from_nothing(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(outcome), fontsize=10)
    columns = 3 * len(contexts)
    figure.legend(
        list(labels.values()), list(labels), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return figure


def _from_nothing(axes: Any) -> None:
    """Both axes from 0 to beyond the largest point, so that every marker is whole."""
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    if points:
        rightmost, highest = map(max, zip(*points, strict=True))
        axes.set(xlim=(0, 1.12 * rightmost), ylim=(0, 1.12 * highest))


def line(outcome: Outcome) -> str:
    """The last run in one line."""
    run = outcome.runs[-1]
    if run.step_seconds is None or run.peak_bytes is None:
        return f"{run.context:,} tokens, {run.plan}: {run.failed}"
    step, memory = f"{1e3 * run.step_seconds:,.0f} ms a step", f"{run.peak_bytes / 1e9:.2f} GB"
    return f"{run.context:,} tokens, {run.plan}: {step}, {memory}, first step {run.first_seconds:,.0f} s"


def write(outcome: Outcome, out: Path, command: str) -> list[Path]:
    """bench.json and bench.png, also of an unfinished comparison; returns their paths."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        figures = out / "bench.json"
        write_json(figures, {**outcome.to_dict(), "environment": environment(command)})
        return [figures, draw.save(plot(outcome), out / "bench.png")]
