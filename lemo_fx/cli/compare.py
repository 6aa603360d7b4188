"""`lemo-fx compare`: what LoRA, plans and the cheaper ways to save the same time do to a model on the user's own data.

Each is a whole run of `lemo-fx train` from the same model on the same data, measured on the same held-out windows with
every token. The page answers: what does it cost in quality, in time and in memory?
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lemo_fx.cli import page
from lemo_fx.cli.machine import check_alone
from lemo_fx.cli.options import Job, PlanOptions, Settings
from lemo_fx.cli.prepare import Say
from lemo_fx.cli.run import Run
from lemo_fx.cli.train import train
from lemo_fx.errors import InputError
from lemo_fx.files import check_folder, write_json, write_text
from lemo_fx.kernels.float8_linear.op import has_float8

LORA, CUT, FEWER = "LoRA", "cut", "fewer"
KINDS = (CUT, FEWER, "careful", "balanced", "fast")
WORDS = {CUT: "LoRA, sequences cut to half", FEWER: "LoRA, fewer steps"}
PAGE, FIGURES = "compare.html", "compare.json"
MORE = ", more steps"


@dataclass(frozen=True)
class Contestant:
    """One run's figures; its curve is (seconds of training, held-out loss) at every evaluation."""

    name: str
    steps: int
    step_seconds: float
    peak_gib: float
    before: float
    after: float
    curve: Sequence[tuple[float, float]]

    @property
    def seconds(self) -> float:
        """Of all its steps, by the median one."""
        return self.steps * self.step_seconds


def kinds_of(asked: str | None) -> tuple[str, ...]:
    """The runs beside plain LoRA."""
    if asked is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Where there are no products in float8, presets that use them round as if, and take longer.
        float8 = device.type == "cuda" and has_float8(device)
        return (*(("careful", "balanced", "fast") if float8 else ("careful",)), CUT, FEWER)
    kinds = tuple(kind.strip() for kind in asked.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--plans {kind!r} is not one of {', '.join(KINDS)}")
    return kinds


def compare(
    job: Job, settings: Settings, kinds: Sequence[str], same_time: bool, command: str, say: Say
) -> list[Contestant]:
    """Train LoRA, then every kind for as many steps; "fewer" for the time of the fastest plan. See the options."""
    check_alone()
    check_folder(job.out)
    if job.resume or job.preview:
        raise InputError("compare makes whole runs: leave out --resume and --preview")
    if (job.out / FIGURES).exists():
        raise InputError(f"{job.out} holds a comparison already: choose another --out")
    found: list[Contestant] = []
    said: set[str] = set()

    def once(line: str) -> None:
        # All runs read the same data.
        if line not in said:
            said.add(line)
            say(line)

    def run(name: str, preset: str, cut: int = 1, **changes: Any) -> Contestant:
        say(f"--- {name}")
        folder = name.replace(",", "").replace(" ", "-")
        one = Run(
            dataclasses.replace(job, out=job.out / folder),
            PlanOptions(preset=preset),
            dataclasses.replace(settings, **changes),
            command,
            cut,
        )
        summary = train(one, say, of_data=once)
        assert summary is not None
        # The model of a run is gone before the next one is loaded.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step, heldout = summary["median_step_seconds"], summary["heldout_loss"]
        curve = [(at * step, loss) for at, loss in zip(*page.series(summary["history"], "eval_loss"), strict=True)]
        figures = (summary["steps"], step, summary["peak_memory_gib"], heldout["before"], heldout["after"])
        found.append(Contestant(name, *figures, curve))
        write(found, job, settings, command)
        return found[-1]

    lora = run(LORA, "dense")
    plans = [run(kind, kind, steps=lora.steps) for kind in kinds if kind not in WORDS]
    if CUT in kinds:
        run(WORDS[CUT], "dense", cut=2, steps=lora.steps, batch=2 * (settings.batch or 1))
    if FEWER in kinds:
        fastest = min((plan.step_seconds for plan in plans), default=lora.step_seconds / 2)
        fewer = max(1, round(lora.steps * min(1.0, fastest / lora.step_seconds)))
        if fewer < lora.steps:
            run(WORDS[FEWER], "dense", steps=fewer)
    for plan in plans if same_time else []:
        steps = round(lora.seconds / plan.step_seconds)
        if steps > lora.steps:
            run(plan.name + MORE, plan.name, steps=steps)
    return found


HEADINGS = ("", "steps", "held-out loss", "perplexity beside LoRA", "one step", "training", "peak memory")


def rows(found: Sequence[Contestant]) -> list[tuple[str, ...]]:
    """The table, beside LoRA."""
    lora = found[0]
    return [
        (
            one.name,
            f"{one.steps:,}",
            f"{one.after:.4f}",
            "" if one is lora else f"{math.exp(one.after - lora.after) - 1:+.2%}",
            f"{one.step_seconds:.2f} s",
            f"{one.seconds:,.0f} s" + ("" if one is lora else f" ({one.seconds / lora.seconds:.2f}x)"),
            page.gigabytes(one.peak_gib),
        )
        for one in found
    ]


def verdict(found: Sequence[Contestant]) -> list[str]:
    """What the figures answer, a sentence or two a line."""
    lora, *others = found
    if lora.after >= lora.before:
        return [
            "LoRA itself did not learn: its held-out loss did not fall. More data, more steps or another --rate come "
            "first; what is said of the others means nothing yet."
        ]
    words = [f"LoRA lowers held-out perplexity by {1 - math.exp(lora.after - lora.before):.1%}."]
    for one in others:
        lost = math.exp(one.after - lora.after) - 1
        share, time = (one.after - lora.after) / (lora.before - lora.after), one.seconds / lora.seconds
        beside = f"{1 - share:.0%} of what LoRA learns, in {time:.2f} of its time; perplexity {lost:+.2%} beside it."
        words.append(f"{one.name}: {beside}")
    quicker = [one for one in others if one.seconds < lora.seconds]
    if quicker:
        best = min(quicker, key=lambda one: one.after)
        words.append(f"Of those quicker than LoRA this one learns most: {best.name}.")
    words.append("One seed: differences that another --seed turns around mean nothing.")
    return words


def picture(found: Sequence[Contestant]) -> Figure:
    """Held-out loss against time of training, and against memory."""
    figure = Figure(figsize=(9.4, 3.8), layout="constrained")
    by_time, by_memory = figure.subplots(1, 2, sharey=True)
    for number, one in enumerate(found):
        colour = page.GREY if number == 0 else f"C{number - 1}"
        times, losses = zip(*one.curve, strict=True)
        by_time.plot(times, losses, color=colour, lw=1, alpha=0.6)
        by_time.plot(one.seconds, one.after, "s" if number == 0 else "o", color=colour, label=one.name)
        by_memory.plot(one.peak_gib * page.GB_IN_GIB, one.after, "s" if number == 0 else "o", color=colour)
    last = [one.after for one in found]
    room = max(max(last) - min(last), 1e-3)
    by_time.set(xlabel="seconds of training", ylabel="held-out loss, nats per token")
    by_time.set_ylim(max(min(last) - room, 0), max(last) + 2 * room)
    # From nothing: runs whose memory hardly differs are to look so.
    by_memory.set(xlabel="peak memory, GB", xlim=(0, 1.1 * page.GB_IN_GIB * max(one.peak_gib for one in found)))
    for axes in (by_time, by_memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def html(found: Sequence[Contestant], job: Job, settings: Settings) -> str:
    """The page."""
    title = f"{Path(job.model).name} on {Path(job.data).name}: what a plan costs"
    device = "the process's resident memory, of all runs" if not torch.cuda.is_available() else "allocated on the GPU"
    caption = (
        "Lines are the held-out losses while a run trained, points its end. Held-out loss is that of the model's "
        f"original code with every token, on the same whole windows for all. Memory: {device}."
    )
    facts = [(name, page.in_words(value)) for name, value in dataclasses.asdict(settings).items()]
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in verdict(found)) + "</ul>",
        page.table(HEADINGS, rows(found)),
        page.shown_picture("Quality against time and memory", picture(found), caption),
        "<h2>Settings of all</h2>",
        page.table(None, [("model", job.model), ("data", job.data), *facts]),
        '<p class="note">Each run has a page of its own in a folder beside this one.</p>',
    ]
    return page.whole(title, parts)


def write(found: Sequence[Contestant], job: Job, settings: Settings, command: str) -> list[Path]:
    """compare.json and compare.html of what is known so far; returns their paths."""
    figures, shown = job.out / FIGURES, job.out / PAGE
    write_json(figures, {"command": command, "runs": [dataclasses.asdict(one) for one in found]})
    write_text(shown, html(found, job, settings))
    return [shown, figures]
