"""What a training run shows while it runs, and notes for its page: callbacks of the Trainer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

import lemo_fx
from lemo_fx.cli.page import gigabytes
from lemo_fx.measure import reset_peak


def bar() -> Progress:
    """The progress bars of a run."""
    note = TextColumn("{task.fields[note]}", style="dim")
    return Progress(
        TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), note, transient=True, disable=not sys.stdout.isatty(),
    )  # fmt: skip


class Timeline(TrainerCallback):
    """Adds to every entry of the history, which checkpoints carry, what the page draws; reporters do not get it.

    "lemo_fx/kept": share of the tokens that each decoder layer's sites kept in the last step, by site and layer;
    "lemo_fx/seconds": of the last step. The peak of `LemoCallback` becomes that of the last step.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the memory's peak."""
        reset_peak(next(kwargs["model"].parameters()).device)
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has waited for the device here, to read the loss."""
        if "loss" not in kwargs["logs"]:
            return
        kept: dict[str, list[float]] = {kind: [1.0] * len(self.layers) for kind in ("attention", "mlp")}
        for site in lemo_fx.report(kwargs["model"]).sites:
            if site.kept_share is not None:
                kept[site.kind][self.layers.index(site.module)] = site.kept_share
        seconds = time.perf_counter() - self.start
        state.log_history[-1].update({"lemo_fx/kept": kept, "lemo_fx/seconds": seconds})


class Bars(TrainerCallback):
    """Shows the run's progress in a terminal."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress = progress
        self.task = progress.add_task("training", total=steps, note="")
        self.evaluation: Any = None
        self.loss = self.heldout = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps of an earlier process count."""
        self.progress.update(self.task, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.progress.update(self.task, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One held-out window further."""
        if self.evaluation is None:
            self.evaluation = self.progress.add_task("held-out loss", total=len(kwargs["eval_dataloader"]), note="")
        self.progress.advance(self.evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The held-out bar goes."""
        self.progress.remove_task(self.evaluation)
        self.evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Losses beside the bar."""
        logs = kwargs["logs"]
        self.loss = f"loss {logs['loss']:.3f}" if "loss" in logs else self.loss
        self.heldout = f"held-out {logs['eval_loss']:.3f}" if "eval_loss" in logs else self.heldout
        self.progress.update(self.task, note=f"{self.loss}  {self.heldout}")


class Lines(TrainerCallback):
    """Prints a line for a log, at most one in so many seconds, where there is no terminal for bars."""

    SECONDS = 10.0

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.last = -float("inf")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock that tells how long the rest takes."""
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Losses, and how long the rest takes."""
        logs = kwargs["logs"]
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}/{state.max_steps}: held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and self._due(state):
            done = state.global_step - self.first
            left = (time.monotonic() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
            memory = logs.get("lemo/peak_memory_gib")
            peak = "" if memory is None else f", peak memory {gigabytes(memory)}"
            rest = f", {left / 60:.0f} min left" if left >= 60 else ""
            self.say(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}{peak}{rest}")

    def _due(self, state: Any) -> bool:
        due = time.monotonic() - self.last >= self.SECONDS or state.global_step == state.max_steps
        if due:
            self.last = time.monotonic()
        return due
