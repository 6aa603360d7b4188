"""The page that a training run leaves: one HTML file with its pictures inside, made from the run's summary."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lemo_fx import draw
from lemo_fx.config import PRESETS

GREY, BLUE, GREEN, YELLOW = draw.COLOURS
GB_IN_GIB = 2**30 / 1e9
SHORT = 32
"""Characters up to which a table's cell stays in one line; a table that is too wide scrolls in its box."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px; margin: 2.5rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.12rem; margin: 2.2rem 0 .4rem; }
figure { margin: .6rem 0; } img { max-width: 100%; min-width: 46rem; height: auto; }
figcaption, .note { color: #555; font-size: .88rem; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
dl div { border: 1px solid #ddd; border-radius: 6px; padding: .55rem .9rem; }
dt { color: #555; font-size: .8rem; } dd { margin: 0; font-size: 1.12rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
td, th { text-align: left; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
th { color: #555; font-weight: 600; } td { font-variant-numeric: tabular-nums; } .short { white-space: nowrap; }
.long { min-width: 14rem; overflow-wrap: anywhere; }
"""


def entries(history: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The entries of a Trainer's history that hold a value."""
    return [entry for entry in history if name in entry]


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a Trainer's history."""
    found = entries(history, name)
    return [entry["step"] for entry in found], [entry[name] for entry in found]


def pictures(
    summary: Mapping[str, Any], graph: Figure | None, other: Mapping[str, Any] | None = None
) -> dict[str, tuple[Figure, str]]:
    """Heading -> (picture, caption), in the order of the page.

    Args:
        graph: of a rewritten layer; None where there is none. other: the summary of a run to compare with.
    """
    history = summary["history"]
    made = {
        "Loss": (
            losses(history, None if other is None else other["history"]),
            "Training loss is the loss of the rewritten layers where eliminated tokens are skipped; held-out loss is "
            "that of the model's original code with every token, a mean over the held-out windows.",
        )
    }
    if graph is not None:
        made["Kept tokens"] = (
            kept(history),
            "Share of the tokens that each decoder layer works on, in the last window of each logged step. A layer "
            "that is left dense keeps all.",
        )
    made["Memory"] = (memory(history, summary["environment"]["device"]), "Peak of each logged step.")
    if graph is not None:
        made["A rewritten layer"] = (graph, "The middle one of the rewritten decoder layers, before and after.")
    if entries(history, "lemo/recall_attention") or entries(history, "lemo/recall_mlp"):
        text = "How many of the tokens that the measured scores would keep the predictors keep, on a training window."
        made["Recall of the predictors"] = (recall(history), text)
    return made


def losses(history: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]] | None = None) -> Figure:
    """Training and held-out loss by step: apart, since the loss of skipping layers is a good deal higher."""
    figure, (training, heldout) = _figure(3.2, 2)
    steps, values = series(history, "loss")
    many = len(steps) > 20
    training.plot(steps, values, "-" if many else "o-", color=BLUE, lw=1.2, ms=3.5, alpha=0.4 if many else 1)
    if many:
        width = len(steps) // 10
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        training.plot(steps[width - 1 :], smooth, color=BLUE, lw=1.8, label=f"mean of {width} logs")
        training.legend(frameon=False, fontsize=8)
    heldout.plot(*series(history, "eval_loss"), "o-", color=GREEN, ms=4, label="this run")
    if other is not None:
        heldout.plot(*series(other, "eval_loss"), "s--", color=GREY, ms=4, label="compared with")
        heldout.legend(frameon=False, fontsize=8)
    training.set_title("training", fontsize=9.5)
    training.set(ylabel="nats per token")
    heldout.set_title("held out, every token", fontsize=9.5)
    return figure


def kept(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Heat maps of the kept share by layer and step, for attention and for the MLP."""
    logged = entries(history, "lemo_fx/kept")
    layers = len(logged[0]["lemo_fx/kept"]["attention"])
    figure = Figure(figsize=(9.4, min(1.7 + 0.14 * layers, 6)), layout="constrained")
    for axes, (kind, title) in zip(
        figure.subplots(1, 2, sharey=True), {"attention": "attention", "mlp": "MLP"}.items(), strict=True
    ):
        shares = np.array([entry["lemo_fx/kept"][kind] for entry in logged]).T
        edges = (0.5, logged[-1]["step"] + 0.5, layers - 0.5, -0.5)
        image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=edges, interpolation="none")
        mean = shares.mean()
        axes.set_title(f"{title}: {mean:.0%} of the tokens, mean over layers and steps", fontsize=9.5)
        axes.set(xlabel="step")
        axes.locator_params(integer=True)
    figure.axes[0].set(ylabel="decoder layer")
    figure.colorbar(image, ax=figure.axes, label="kept share", pad=0.01)
    return figure


def memory(history: Sequence[Mapping[str, Any]], device: str) -> Figure:
    """Peak memory by step."""
    figure, (axes,) = _figure(2.6)
    steps, peaks = series(history, "lemo/peak_memory_gib")
    peaks = [GB_IN_GIB * peak for peak in peaks]
    axes.fill_between(steps, peaks, color=YELLOW, alpha=0.2, lw=0)
    axes.plot(steps, peaks, "o-" if len(steps) <= 20 else "-", color=YELLOW, lw=1.2, ms=3.5)
    axes.set_title("resident memory of the process" if device == "cpu" else f"allocated on {device}", fontsize=9.5)
    axes.set(ylabel="GB", ylim=(0, 1.15 * max(peaks)))
    return figure


def recall(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall of the predictors by step."""
    figure, (axes,) = _figure(2.6)
    for colour, kind in ((BLUE, "attention"), (GREEN, "mlp")):
        steps, values = series(history, f"lemo/recall_{kind}")
        if steps:
            axes.plot(steps, values, "o-", color=colour, ms=4, label=kind)
    axes.set(ylabel="recall", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return figure


def _figure(height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure as wide as the page, with `columns` diagrams over the steps."""
    figure = Figure(figsize=(9.4, height), layout="constrained")
    for axes in figure.subplots(1, columns, squeeze=False)[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel="step")
        axes.locator_params(axis="x", integer=True)
    return figure, figure.axes


def html(
    summary: Mapping[str, Any], figures: Mapping[str, tuple[Figure, str]], other: Mapping[str, Any] | None = None
) -> str:
    """The page as one string that needs no other file; with `other`, beside the figures of that run."""
    title = f"Fine-tuning {Path(summary['model']).name}"
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures_of(summary).items())
    parts = [f"<h1>{escape(title)}</h1>", f"<dl>{shown}</dl>"]
    if other is not None:
        parts += ["<h2>Beside another run</h2>", _comparison(summary, other)]
    for heading, (figure, caption) in figures.items():
        parts.append(shown_picture(heading, figure, caption))
    parts += ["<h2>Sites</h2>", _sites(summary["report"])]
    parts += [f'<p class="note">{escape(note)}</p>' for note in summary["report"]["notes"]]
    data = {f"data: {name}": value for name, value in summary["data"].items()}
    tables = {
        "Plan": _said(summary["report"]["config"]),
        "Settings": {"model": summary["model"], **data, **summary["settings"]},
        "Environment": summary["environment"],
    }
    for heading, facts in tables.items():
        parts += [f"<h2>{heading}</h2>", table(None, [(name, in_words(value)) for name, value in facts.items()])]
    return whole(title, parts)


def whole(title: str, parts: Sequence[str]) -> str:
    """A page of parts that are HTML already."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def shown_picture(heading: str, figure: Figure, caption: str) -> str:
    """A picture under a heading, as HTML."""
    image = f'<div class="scroll"><img src="{_inline(figure)}" alt="{escape(heading)}"></div>'
    return f"<h2>{escape(heading)}</h2><figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def figures_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The figures that a reader wants first: words -> value."""
    before, after = summary["heldout_loss"]["before"], summary["heldout_loss"]["after"]
    change = math.exp(after - before) - 1
    trained = summary["parameters"]["trained"]
    return {
        "held-out loss": f"{before:.4f} → {after:.4f}",
        "held-out perplexity": f"{_perplexity(before)} → {_perplexity(after)} ({change:+.1%})",
        "steps": f"{summary['steps']:,}",
        "step, median": f"{summary['median_step_seconds']:.2f} s",
        "peak memory": gigabytes(summary["peak_memory_gib"]),
        "trained parameters": f"{trained:,} ({trained / summary['parameters']['all']:.2%})",
    }


def differing(summary: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What besides the plan is not the same in two runs, so that their figures say more than what the plan does."""
    found = [name for name in ("model", "data") if summary[name] != other[name]]
    found += [f"device: {other['environment']['device']}"] * (
        summary["environment"]["device"] != other["environment"]["device"]
    )
    names = {**summary["settings"], **other["settings"]}
    return found + [name for name in names if summary["settings"].get(name) != other["settings"].get(name)]


def _comparison(summary: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Two runs' figures side by side, and what else differs."""
    mine, others = figures_of(summary), figures_of(other)
    plans = [("plan", *(plan_in_words(each["report"]["config"]) for each in (summary, other)))]
    rows = plans + [(name, value, others.get(name, "")) for name, value in mine.items()]
    differ = differing(summary, other)
    note = f"Not the same besides: {', '.join(differ)}." if differ else "All but the plan is the same in both."
    return table(("", "this run", "compared with"), rows) + f'<p class="note">{escape(note)}</p>'


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3f}" if loss < 50 else "over 1e21"


def _sites(report: Mapping[str, Any]) -> str:
    rows = []
    for site in report["sites"]:
        share = "" if site["kept_share"] is None else f"{site['kept_share']:.0%}"
        rows.append([*(site[k] for k in ("module", "site", "eliminated", "score", "budget")), share, site["note"]])
    columns = ("layer", "site", "eliminated tokens", "score", "budget", "kept in the last step", "note")
    return f"<details><summary>{len(rows)} sites</summary>{table(columns, rows)}</details>"


def table(columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """A table, as HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns or ())
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def _cell(text: str) -> str:
    return f'<td class="{"short" if len(text) <= SHORT else "long"}">{escape(text)}</td>'


def gigabytes(gib: float) -> str:
    """Memory in the unit of `estimate`, `bench` and the sellers of GPUs."""
    return f"{GB_IN_GIB * gib:.2f} GB"


def plan_in_words(config: Mapping[str, Any]) -> str:
    """A plan by its preset's name, where it is one, or by its fields."""
    given = json.loads(json.dumps(config))
    for name, preset in PRESETS.items():
        if given == json.loads(json.dumps(dataclasses.asdict(preset))):
            return f'preset "{name}"'
    return in_words(_said(config))


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan, with words for those whose None is not what they are by default."""
    absent = {"attention": "dense", "mlp": "dense", "loss_segments": "none, all logits at once"}
    return {name: absent.get(name) if value is None else value for name, value in config.items()}


def in_words(value: Any) -> str:
    """A setting as a reader wants it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    # Not by a dict's keys: 1 is True there, and 0 False.
    if value is None or isinstance(value, bool):
        return "default" if value is None else "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _inline(figure: Figure) -> str:
    """The picture as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        picture = draw.save(figure, Path(folder) / "picture.svg").read_bytes()
    return "data:image/svg+xml;base64," + base64.b64encode(picture).decode()
