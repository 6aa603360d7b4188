"""`lemo-fx train`: fine-tune a model on data with LoRA under a plan, from files to an adapter and a page.

Underneath is the transformers Trainer, one window of text at a time on each device, so that nothing is ever padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import load_peft_weights, set_peft_model_state_dict
from rich.text import Text
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerState

import lemo_fx
from lemo_fx.cli import page, prepare
from lemo_fx.cli.commands import Stopped
from lemo_fx.cli.data import Window
from lemo_fx.cli.estimate_page import advice
from lemo_fx.cli.load import built, check_weights, folder_of, load_model, read_config
from lemo_fx.cli.machine import is_first, processes
from lemo_fx.cli.prepare import Say, check_context, keeps_documents_apart
from lemo_fx.cli.results import graph_picture, merge_and_push, save_adapter, summarise
from lemo_fx.cli.run import (
    PAGE,
    STATE,
    SUMMARY,
    Run,
    check_earlier,
    check_job,
    last_checkpoint,
    read_summary,
    recorded_of,
    write_started,
)
from lemo_fx.cli.trainer import trainer_of
from lemo_fx.cli.watch import Bars, Lines
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError, LemoError
from lemo_fx.files import write_json
from lemo_fx.predictors import RECORD, Predictors

FIT_WINDOWS = 64
"""Windows of the training data that predictors are fitted on."""
FEW_STEPS = 20
"""Under so many a learning rate has hardly risen and fallen."""


def train(run: Run, say: Say = lambda line: None, of_data: Say | None = None) -> dict[str, Any] | None:
    """Fine-tune, and write OUT/adapter, OUT/report.html, OUT/summary.json and OUT/run.yaml.

    Under a launcher (torchrun) each process trains on windows of its own; the first one writes.

    Args:
        say: called with lines to show.
        of_data: called in its place with those on the data and the plan, before the first step.

    Returns:
        The summary, see `summarise`; None in processes but the first.

    Raises:
        LemoError: bad input, a plan that does not fit the model, too little memory; the message says what to do.
        Stopped: the user interrupted the training.
    """
    plan = run.options.config()
    say = say if is_first() else lambda line: None
    of_data = (of_data or say) if is_first() else say
    check_job(run)
    batch = _batch(run.settings.batch)
    settings = dataclasses.replace(run.settings, batch=batch)
    folder = folder_of(run.job.model)
    check_weights(folder)
    config = read_config(folder)
    documents = prepare.documents_of(run.job, settings, folder, config, of_data)
    check_context(config, plan, documents.context)
    with _in_words(run.out):
        model = _loaded(run, folder)
        prepared = prepare.windows_of(documents, settings, keeps_documents_apart(model), of_data)
        if run.cut > 1:
            prepared = prepare.cut(prepared, run.cut)
        of_data(str(prepared))
        if plan.eliminations:
            for line in advice(model.num_parameters(), documents.context, prepared.is_running_text):
                of_data(f"note: {line}")
        steps = settings.steps or math.ceil(settings.epochs * math.ceil(len(prepared.train) / batch))
        if settings.steps is None and steps < FEW_STEPS:
            of_data(f"note: {steps} steps are few to learn from: more --epochs, or a shorter --context, make more.")
        settings = dataclasses.replace(settings, context=documents.context, steps=steps)
        run = dataclasses.replace(run, settings=settings)
        recorded = recorded_of(run, folder, documents, plan)
        if is_first():
            check_earlier(run, recorded, say)
        trainer = trainer_of(run, model, prepared, _predictors(run, model, prepared.train, plan, say), plan)
        if is_first():
            # Only now: a folder with a run in it wants --resume, and what does not even start is no run.
            write_started(run, recorded)
        picture = graph_picture(trainer.model, plan)
        checkpoint = last_checkpoint(run.out) if run.job.resume else None
        trainer.args.eval_on_start = checkpoint is None
        if run.job.resume:
            say(f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {run.out}: from the start")
        if is_first():
            trainer.add_callback(Bars() if sys.stdout.isatty() else Lines(say))
        _run(trainer, checkpoint, run.out)
        last = page.entries(trainer.state.log_history, "eval_loss")[-1]["eval_loss"]
        if not math.isfinite(last):
            raise LemoError(f"the held-out loss is {last} in the end, so no adapter is saved: try a lower --rate")
        if not is_first():
            return None
        summary = summarise(run, trainer, prepared)
        save_adapter(run, trainer, summary)
        other = None if run.job.compare_with is None else read_summary(run.job.compare_with)
        (run.out / PAGE).write_text(page.html(summary, page.pictures(summary, picture, other), other), encoding="utf-8")
        write_json(run.out / SUMMARY, summary)
        merge_and_push(run, folder, say)
    return summary


def preview(run: Run, say: Say) -> Text:
    """The first step's windows, decoded, with what is learnt marked; no weights are loaded."""
    folder = folder_of(run.job.model)
    config = read_config(folder)
    documents = prepare.documents_of(run.job, run.settings, folder, config, say)
    check_context(config, run.options.config(), documents.context)
    apart = run.settings.pack and keeps_documents_apart(built(folder, config))
    prepared = prepare.windows_of(documents, run.settings, apart, say)
    say(str(prepared))
    return prepare.preview(prepared, run.settings, folder)


def _batch(asked: int | None) -> int:
    """Windows of a step over all processes."""
    several = processes()
    batch = asked or several
    if batch % several:
        raise InputError(f"--batch {batch} cannot be shared by {several} processes: give a multiple of {several}")
    return batch


def _loaded(run: Run, folder: Path) -> Any:
    """The model on its device, in bfloat16 where that is a GPU that has it."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
    model = load_model(folder, dtype, run.settings.attention, run.settings.load_in)
    return model if run.settings.load_in else model.to("cuda" if gpu else "cpu")


@contextlib.contextmanager
def _in_words(out: Path) -> Iterator[None]:
    """What a machine lacks, as an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise LemoError(f"{first} Lower --context, --keep or --rank, or leave --checkpointing on") from error
    except (OSError, SafetensorError) as error:
        raise LemoError(f"{error}: mend that, and go on with --resume (the run is in {out})") from error


def _predictors(run: Run, model: nn.Module, windows: Sequence[Window], plan: LemoConfig, say: Say) -> Predictors | None:
    if run.job.predictors is not None:
        return Predictors.load(run.job.predictors)
    if not (plan.predicts or any(site.eliminated == "stand_in" for site in plan.eliminations)):
        return None
    folder = run.out / "predictors"
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if (folder / RECORD).exists():
            return Predictors.load(folder)
        say(f"fitting predictors on {min(FIT_WINDOWS, len(windows))} windows")
        longest = [max(window, key=len).ids.tolist() for window in windows[:FIT_WINDOWS]]
        return lemo_fx.fit(model, longest, plan, folder=folder)


def _run(trainer: Trainer, checkpoint: Path | None, out: Path) -> None:
    """Train to the end, and evaluate there.

    Raises:
        Stopped: the user interrupted it.
    """
    try:
        _train(trainer, checkpoint)
    except KeyboardInterrupt as stop:
        last = last_checkpoint(out)
        begin = f"its last checkpoint, {last.name}," if last else "the start (there is no checkpoint yet: --save-every)"
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps}: the same command with --resume "
            f"goes on from {begin} in {out}"
        ) from stop


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    state = TrainerState.load_from_json(str(checkpoint / STATE)) if checkpoint else None
    if checkpoint is not None and state is not None and state.global_step >= trainer.args.max_steps:
        # The Trainer would train for another step.
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint)))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if page.entries(trainer.state.log_history, "eval_loss")[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
