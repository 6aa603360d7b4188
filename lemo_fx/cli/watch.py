"""What a training run shows while it runs, and notes for its page: callbacks of the Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

import lemo_fx
from lemo_fx.cli.page import gigabytes
from lemo_fx.measure import reset_peak


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


class Bars(ProgressCallback):
    """Transformers' bars, for a terminal, with the last losses beside them in the place of a line a log."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Losses beside the bar."""
        words = {"loss": "loss", "eval_loss": "held-out loss"}
        self.losses |= {words[name]: f"{logs[name]:.3f}" for name in words if name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.losses)


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
        elif "loss" in logs and (time.monotonic() - self.last >= self.SECONDS or state.global_step == state.max_steps):
            self.last = time.monotonic()
            done = state.global_step - self.first
            left = (time.monotonic() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
            memory = logs.get("lemo/peak_memory_gib")
            peak = "" if memory is None else f", peak memory {gigabytes(memory)}"
            rest = f", {left / 60:.0f} min left" if left >= 60 else ""
            self.say(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}{peak}{rest}")
