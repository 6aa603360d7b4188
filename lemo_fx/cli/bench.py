"""`lemo-fx bench`: time and memory of training steps on this machine, plainly and under plans, side by side.

Whole steps of the transformers Trainer are timed: its batches, its autocast, clipping, the optimizer and a log for each
step. Token ids are random, since neither time nor memory depends on them where a plan keeps a fixed share; nothing here
speaks of quality. Plans that compute every token's forward ("exact") must show LoRA's first loss where the
model has no dropout, whose random draws are others.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import lemo_fx
from lemo_fx.cli.load import from_config, has_weights, load_model, read_config
from lemo_fx.cli.machine import check_alone, check_attention, compiles
from lemo_fx.cli.options import BenchSettings, modules_of
from lemo_fx.cli.prepare import check_context
from lemo_fx.cli.trainer import CHECKPOINTING, adapted, checkpointing, one_device
from lemo_fx.config import PRESETS, LemoConfig
from lemo_fx.errors import InputError, LemoError
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.probe import in_a_line
from lemo_fx.kernels.private import uncompile
from lemo_fx.measure import device_name, peak_memory, reset_peak
from lemo_fx.predictors import Predictors

UNTOUCHED, LORA = "as it is", "LoRA"

Plans = Mapping[str, LemoConfig | None]

PLANS: Plans = {
    UNTOUCHED: None,
    LORA: PRESETS["dense"],
    **{name: plan for name, plan in PRESETS.items() if name != "dense"},
}
"""The script as people have it: neither compiled, nor the loss in segments; LoRA with both; the presets, with both."""


@dataclass(frozen=True)
class Run:
    """One plan at one length.

    Attributes:
        step_seconds: median of the timed steps; slowest_seconds: the longest; first_seconds: the first step, compiling.
        first_loss: of the first step; that of random token ids, and of random weights where the model has such.
        peak_bytes: most that tensors took after the first step (on the CPU: that the process had resident).
        reserved_bytes: most that the allocator held for them; None on the CPU.
        kept_share: of the tokens, mean over the rewritten sites.
        failed: why there is nothing of all this.
    """

    plan: str
    context: int
    step_seconds: float | None = None
    slowest_seconds: float | None = None
    first_seconds: float | None = None
    first_loss: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    kept_share: float | None = None
    failed: str | None = None


@dataclass
class Outcome:
    """All runs, in order, and what is needed to make them again."""

    model: str
    model_type: str
    random_weights: bool
    dropout: bool
    parameters: dict[str, int]
    device: str
    settings: BenchSettings
    plans: Plans
    runs: list[Run]

    def beside(self, run: Run) -> Run | None:
        """LoRA at the same length, where it ran."""
        return next((r for r in self.runs if (r.plan, r.context) == (LORA, run.context) and not r.failed), None)

    def to_dict(self) -> dict[str, Any]:
        """All figures, in plain types."""
        settings = dataclasses.asdict(self.settings) | {"targets": modules_of(self.settings.targets)}
        del settings["context"]
        return {
            "model": self.model,
            "model_type": self.model_type,
            "weights": "random" if self.random_weights else "the model's",
            "parameters": self.parameters,
            "device": self.device,
            "settings": {"contexts": self.settings.contexts, **settings},
            "plans": {name: plan and dataclasses.asdict(plan) for name, plan in self.plans.items()},
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


class Clock(TrainerCallback):
    """Seconds and loss of every step, batches and logs included; memory counts from the end of the first one."""

    def __init__(self, device: torch.device, tick: Callable[[], None]) -> None:
        self.device, self.tick = device, tick
        self.steps: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step starts."""
        self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has waited for the device here, to read the loss."""
        if "loss" not in kwargs["logs"]:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.losses.append(kwargs["logs"]["loss"])
        if len(self.steps) == 1:
            _forget_memory(self.device)
        self.tick()
        self.last = time.perf_counter()


def bench(
    model_path: Path,
    plans: Plans,
    settings: BenchSettings,
    predictors_path: Path | None = None,
    progress: Callable[[str, int], Callable[[], None]] = lambda what, parts: lambda: None,
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Make the steps of every plan at every length, with the same adapters on the same token ids.

    Args:
        model_path: a folder with weights; or a config.json, or a folder without weights, for random ones.
        plans: name -> plan; None leaves the model and its script as they are.
        predictors_path: what `lemo-fx fit` made; else predictors are untrained ones of their real size.
        progress: (what, number of steps) -> a function to call after each step.
        ended: called after each run with all that is known so far.

    Raises:
        LemoError: bad input, or a plan that does not fit the model. What a plan's steps raise, too little memory
            included, is noted in its run instead.
    """
    check_alone()
    check_attention(settings.attention)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config = read_config(model_path)
    for context in settings.contexts:
        for plan in filter(None, plans.values()):
            check_context(model_config, plan, context)
    model, random_weights = load(model_path, model_config, device, settings)
    if not decoder_layers(model):
        raise InputError(
            f"{model_path}: a {model_config.model_type} model has no decoder layers with causal attention, which plans "
            "are for"
        )
    transformers.set_seed(0)
    model = adapted(model, settings.rank, modules_of(settings.targets)).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    given = None if predictors_path is None else Predictors.load(predictors_path)
    benched = Bench(model, settings, given)
    for plan in filter(None, plans.values()):
        # What does not fit the model is said before anything is timed.
        benched.put(plan)
    # PEFT counts a weight of 4 bits as one, not as half a byte.
    trained, every = model.get_nb_trainable_parameters()
    parameters = {"all": every, "trained": trained}
    named = (str(model_path), model_config.model_type, random_weights, has_dropout(model_config))
    outcome = Outcome(*named, parameters, device_name(device), settings, plans, [])
    for context in settings.contexts:
        for name, given_plan in plans.items():
            tick = progress(f"{name}, {context:,}", settings.steps + 1)
            model.load_state_dict(start, strict=False)
            outcome.runs.append(benched.attempt(name, given_plan, context, tick))
            ended(outcome)
    return outcome


def has_dropout(config: Any) -> bool:
    """Whether a model of this config draws random numbers in its training forward."""
    given = config.get_text_config().to_dict().items()
    return any(
        "drop" in name and not name.startswith(("classifier", "summary")) and isinstance(value, float) and value > 0
        for name, value in given
    )


def load(path: Path, config: Any, device: torch.device, settings: BenchSettings) -> tuple[Any, bool]:
    """(model on the device, in bfloat16 where that is a GPU that has it; whether its weights are random)."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if bf16 else torch.float32
    attention, load_in = settings.attention, settings.load_in
    random = not has_weights(path)
    try:
        if random:
            with device:
                model = from_config(path, config, dtype=dtype, attn_implementation=attention)
            if load_in is None:
                return model, True
            with tempfile.TemporaryDirectory() as folder:
                # Weights are quantised while they are loaded.
                model.save_pretrained(folder)
                del model
                return load_model(Path(folder), dtype, attention, load_in), True
        model = load_model(path, dtype, attention, load_in)
        return (model if load_in else model.to(device)), False
    except torch.OutOfMemoryError as error:
        raise InputError(f"{path}: the model alone does not fit: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Bench:
    """A model with adapters that makes the steps of plan after plan.

    Attributes:
        predictors: for plans that predict; without any, untrained ones of their real size.
    """

    model: Any
    settings: BenchSettings
    predictors: Predictors | None

    def put(self, plan: LemoConfig | None) -> None:
        """The model under this plan, and no other."""
        lemo_fx.revert(self.model)
        if plan is not None:
            untrained = plan.predicts and self.predictors is None
            predictors = Predictors.random(self.model, plan) if untrained else self.predictors
            lemo_fx.transform(self.model, plan, predictors=predictors)

    def attempt(self, name: str, plan: LemoConfig | None, context: int, tick: Callable[[], None]) -> Run:
        """`run`, or in its place that it did not fit, or why the plan's steps are refused."""
        try:
            return self.run(name, plan, context, tick)
        except torch.OutOfMemoryError as error:
            failed = f"out of memory: {str(error).splitlines()[0]}"
        except LemoError as error:
            failed = f"refused: {' '.join(str(error).split())}"
        except Exception as error:  # A compiler's or another library's: the other plans' figures are worth having.
            failed = in_a_line(error)
        # Outside the handler: what went wrong holds the tensors of the step.
        self.model.zero_grad()
        return Run(name, context, failed=failed)

    def run(self, name: str, plan: LemoConfig | None, context: int, tick: Callable[[], None]) -> Run:
        """One plan at one length; `tick` is called after each step."""
        model, settings, device = self.model, self.settings, self.model.device
        self.put(plan)
        torch.compiler.reset()
        for _, layer in decoder_layers(model):
            uncompile(layer)
            if plan is not None and compiles(settings.compile):
                layer.compile()
        vocabulary = model.get_input_embeddings().num_embeddings
        count = (settings.steps + 1) * settings.batch
        ids = torch.randint(vocabulary, (count, context), generator=torch.Generator().manual_seed(0))
        clock = Clock(device, tick)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=settings.steps + 1,
                per_device_train_batch_size=settings.batch,
                bf16=next(model.parameters()).dtype == torch.bfloat16,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=device.type == "cuda",
                **checkpointing(settings.checkpointing),
            )
            rows: Any = [{"input_ids": row, "labels": row} for row in ids]
            trainer = Trainer(model=model, args=one_device(arguments), train_dataset=rows, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            _forget_memory(device)
            try:
                trainer.train()
            finally:
                # accelerate puts autocast around a model that it has not prepared yet, and no other.
                for attribute in ("forward", "_original_forward", "_is_accelerate_prepared"):
                    vars(model).pop(attribute, None)
                getattr(model, f"{CHECKPOINTING}_disable")()
        shares = [] if plan is None else [site.kept_share for site in lemo_fx.report(model).sites]
        kept = [share for share in shares if share is not None]
        first, *timed = clock.steps
        return Run(
            name,
            context,
            step_seconds=statistics.median(timed),
            slowest_seconds=max(timed),
            first_seconds=first,
            first_loss=clock.losses[0],
            peak_bytes=peak_memory(device),
            reserved_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
            kept_share=statistics.fmean(kept) if kept else None,
        )


def _forget_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
