"""The demonstration: fine-tune a small real Llama on long documents, plainly and transformed, and compare.

Model and documents ship with the package. Everything printed but time is the same on every run on one machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedTokenizerBase

import lemo_fx
from lemo_fx import draw
from lemo_fx.cli.load import load_model, load_tokenizer
from lemo_fx.cli.machine import environment
from lemo_fx.cli.options import DEMO_PLANS, LEMO, DemoSettings
from lemo_fx.cli.results import RewrittenLayer, rewritten_layer
from lemo_fx.cli.trainer import adapted
from lemo_fx.config import Elimination, LemoConfig
from lemo_fx.errors import ConfigError
from lemo_fx.files import write_json
from lemo_fx.fitting.training import Recipe
from lemo_fx.measure import counts

ASSETS = Path(__file__).parents[1] / "demo_assets"

PLAIN = "LoRA"


FITTED = 4
"""Training windows on which the predictors are trained."""

RANK = 8
RECIPE = Recipe(most_steps=60, epochs=60, batch=1)


def plan_of(name: str, predicted: bool) -> LemoConfig:
    """A preset, or `LEMO` (predicted: its blocks are named by predictors): the first and last layer dense."""
    if name != LEMO:
        # A CPU has no products in float8, and rounding as if it had takes longer than it saves.
        return LemoConfig.preset(name, forward="model", backward="model")
    site = Elimination(score="predicted" if predicted else "measured")
    return LemoConfig(attention=site, mlp=site)


@dataclass
class Run:
    """What one fine-tuning run cost and gave.

    Attributes:
        saved_bytes, flops: of one step, see `lemo_fx.measure`.
        step_seconds: median over the timed steps; seconds: when each step ended, from the end of the first.
        losses: training loss by step; with eliminated tokens it is the loss of the rewritten graph.
        perplexity_before, perplexity_after: held-out, by the model's original code with every token.
    """

    saved_bytes: int
    flops: int
    perplexity_before: float
    perplexity_after: float = math.nan
    step_seconds: float = math.nan
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """All runs by name, the plain one first, and one layer of the first transformed model before and after.

    Attributes:
        fit_seconds: time that training the predictors took; 0 without them.
    """

    settings: DemoSettings
    runs: dict[str, Run]
    reports: dict[str, lemo_fx.Report]
    fit_seconds: float
    layer: RewrittenLayer

    @property
    def recall(self) -> dict[str, float]:
        """Mean recall of the predicted choices, by kind of site."""
        return {kind: mean for report in self.reports.values() for kind, mean in report.means("recall").items()}

    def to_dict(self) -> dict[str, Any]:
        """All figures, in plain types."""
        return {
            "settings": asdict(self.settings),
            "runs": {name: asdict(run) for name, run in self.runs.items()},
            "ratios": {name: ratios(run, self.runs[PLAIN]) for name, run in self.runs.items() if name != PLAIN},
            "fit_seconds": self.fit_seconds,
            "recall": self.recall,
            "reports": {name: report.to_dict() for name, report in self.reports.items()},
            "layer": self.layer.name,
        }


def load(seed: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The shipped model with LoRA adapters, in float32, and its tokenizer."""
    model = load_model(ASSETS / "model", torch.float32)
    torch.manual_seed(seed)
    return adapted(model, RANK, "all-linear"), load_tokenizer(ASSETS / "model")


def windows(tokenizer: PreTrainedTokenizerBase, kind: str, context: int, count: int, seed: int) -> list[torch.Tensor]:
    """`count` windows [1, context] of the shipped documents of a kind ("train" or "heldout"), in a seeded order.

    Every window lies within one document; a window is used twice only after all were used once.
    """
    found = []
    for path in sorted((ASSETS / "documents").glob(f"{kind}_*.txt")):
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
        found += [ids[:, i : i + context] for i in range(0, ids.shape[1] - context + 1, context)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[order[i % len(found)]] for i in range(count)]


@torch.no_grad()
def perplexity(model: nn.Module, texts: list[torch.Tensor], tick: Callable[[], None]) -> float:
    """Held-out perplexity in `eval()`, where a transformed model runs its original code with every token."""
    model.eval()
    losses = []
    for ids in texts:
        losses.append(model(input_ids=ids, labels=ids).loss.item())
        tick()
    model.train()
    return math.exp(statistics.fmean(losses))


def fine_tune(
    model: nn.Module,
    texts: list[torch.Tensor],
    heldout: list[torch.Tensor],
    rate: float,
    before: float | None,
    tick: Callable[[], None],
) -> Run:
    """Count one step, train on every text once, and evaluate."""
    before = perplexity(model, heldout, tick) if before is None else before
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

    def backward(ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    # The first step is counted, and so not timed; it also makes torch load what it needs before the clock runs.
    first: list[float] = []
    kept, operations = counts(lambda: first.append(backward(texts[0]).item()), model)
    optimizer.step()
    tick()
    run = Run(kept, operations, before, losses=first, seconds=[0.0])
    durations = []
    for ids in texts[1:]:
        start = time.perf_counter()
        loss = backward(ids)
        optimizer.step()
        durations.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        run.seconds.append(sum(durations))
        tick()
    run.step_seconds = statistics.median(durations)
    run.perplexity_after = perplexity(model, heldout, tick)
    return run


def run_demo(settings: DemoSettings, progress: Callable[[str, int], Callable[[], None]]) -> Outcome:
    """All runs from the same adapters on the same texts in the same order.

    Args:
        progress: (what, number of parts) -> a function to call after each part.
    """
    model, tokenizer = load(settings.seed)
    config: Any = model.config
    longest: int = config.max_position_embeddings
    if not 64 <= settings.context <= longest:
        raise ConfigError(f"context={settings.context!r}: the demo needs a context of 64 to {longest} tokens")
    texts = windows(tokenizer, "train", settings.context, settings.steps, settings.seed)
    heldout = windows(tokenizer, "heldout", settings.context, settings.windows, settings.seed)

    tick = progress(PLAIN, settings.steps + 2 * len(heldout))
    plain = fine_tune(model, texts, heldout, settings.rate, None, tick)
    runs, reports, layer, fit_seconds = {PLAIN: plain}, {}, None, 0.0
    for name in settings.plans.split(","):
        plan, what = plan_of(name, settings.predicted), DEMO_PLANS[name]
        model, _ = load(settings.seed)
        predictors = None
        if plan.predicts:
            tick = progress("predictors", 1)
            start = time.perf_counter()
            predictors = lemo_fx.fit(model, [ids[0] for ids in texts[:FITTED]], plan, recipe=RECIPE, progress=False)
            fit_seconds = time.perf_counter() - start
            tick()
        lemo_fx.transform(model, plan, predictors=predictors)
        tick = progress(what, settings.steps + len(heldout))
        runs[what] = fine_tune(model, texts, heldout, settings.rate, plain.perplexity_before, tick)
        # What the predictors choose in a text that they were not trained on, beside what the true scores would.
        recall = {"input_ids": heldout[0]} if predictors is not None else None
        reports[what] = lemo_fx.report(model, recall_on=recall)
        layer = layer or rewritten_layer(model)
    assert layer is not None
    return Outcome(settings, runs, reports, fit_seconds, layer)


ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step_seconds": ("step time", lambda s: f"{s:.2f} s"),
    "flops": ("FLOPs per step", lambda n: f"{n / 1e9:.0f} G"),
    "saved_bytes": ("bytes saved for the backward", lambda n: f"{n / 2**20:.0f} MiB"),
    "perplexity_before": ("held-out perplexity before", lambda p: f"{p:.3f}"),
    "perplexity_after": ("held-out perplexity after", lambda p: f"{p:.3f}"),
}
"""The table: attribute of `Run` -> (its words, how it is written)."""


def ratios(run: Run, plain: Run) -> dict[str, float]:
    """Every row of the table as a share of the plain run's."""
    return {name: getattr(run, name) / getattr(plain, name) for name in ROWS}


def in_words(name: str, ratio: float) -> str:
    """A ratio to the plain run as people say it."""
    if ratio == 1:
        return "same"
    if name.startswith("perplexity"):
        return f"{ratio - 1:+.1%}, {'worse' if ratio > 1 else 'better'}"
    return f"{1 / ratio:.2f}x less" if ratio < 1 else f"{ratio:.2f}x more"


def plot(outcome: Outcome) -> Figure:
    """Loss of all runs by step and by time, and what a step costs."""
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    by_step, by_time, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    plain = outcome.runs[PLAIN]
    names = list(ROWS)[:3]
    width = 0.84 / len(outcome.runs)
    highest = 1.0
    for number, (title, run) in enumerate(outcome.runs.items()):
        style = {"color": draw.COLOURS[number % len(draw.COLOURS)], "label": title}
        # Presets have nearly the plain run's losses: dashes let all be seen.
        line = "o-" if title in (PLAIN, DEMO_PLANS[LEMO]) else "o--"
        by_step.plot(range(1, len(run.losses) + 1), run.losses, line, ms=3.5, **style)
        by_time.plot(run.seconds, run.losses, line, ms=3.5, **style)
        share = ratios(run, plain)
        places = [place + (number - (len(outcome.runs) - 1) / 2) * width for place in range(len(names))]
        bars.bar(places, [share[name] for name in names], width * 0.96, **style)
        for place, name in zip(places, names, strict=True):
            highest = max(highest, share[name])
            # Upright, a label is no wider than its bar, so that neighbours of one height do not touch.
            label = ROWS[name][1](getattr(run, name))
            bars.text(place, share[name] + 0.02, label, ha="center", va="bottom", fontsize=8, rotation="vertical")
    by_step.set(xlabel="step", ylabel="nats per token", title="training loss by step")
    by_step.locator_params(axis="x", integer=True)
    by_time.set(xlabel="seconds of training", title="training loss by time")
    bars.set_xticks(range(len(names)), ["step time", "FLOPs", "bytes saved"])
    bars.set(title="one step", ylabel=f"share of {PLAIN}", ylim=(0, highest * 1.25))
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axes in (by_step, by_time, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


NEXT = """Next, with your own model and data (no GPU is needed for the first):
  lemo-fx estimate MODEL --context 32768 --gpu 24GB,80GB   will it fit, and is it worth while?
  lemo-fx compare MODEL DATA                                what does it cost in quality, on your data?
  lemo-fx train MODEL DATA                                  an adapter and a report"""


def verdict(outcome: Outcome) -> str:
    """What the figures mean, in a line or two."""
    plain = outcome.runs[PLAIN]
    said = []
    for name, run in outcome.runs.items():
        if run is not plain:
            faster = plain.step_seconds / run.step_seconds
            worse = run.perplexity_after / plain.perplexity_after - 1
            said.append(f"{name}: steps {faster:.1f} times as fast as LoRA's, perplexity {worse:+.1%}")
    return (
        "; ".join(said) + f". {outcome.settings.steps} steps show what a step costs, and hardly what training loses: "
        "on a model this small, at this length, a plan is not worth while. It is for billions of parameters and tens "
        "of thousands of tokens."
    )


def write(outcome: Outcome, out: Path, command: str) -> list[Path]:
    """demo.json, demo.png, graph.png and graph.svg; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    figures = out / "demo.json"
    write_json(figures, {**outcome.to_dict(), "environment": environment(command)})
    picture = outcome.layer.picture()
    paths = [draw.save(picture, out / f"graph.{suffix}") for suffix in ("png", "svg")]
    return [figures, draw.save(plot(outcome), out / "demo.png"), *paths]
