"""`lemo-fx train`: fine-tune a model on data with LoRA under a plan, from files to an adapter and a page.

Underneath is the transformers Trainer, one window of text at a time on each device, so that nothing is ever padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from rich.text import Text
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import SchedulerType

import lemo_fx
from lemo_fx import __version__
from lemo_fx.api import suspended
from lemo_fx.callback import LemoCallback
from lemo_fx.cli import page, prepare
from lemo_fx.cli.data import Window
from lemo_fx.cli.demo import environment
from lemo_fx.cli.estimate import advice
from lemo_fx.cli.load import built, check_weights, folder_of, load_model, load_tokenizer, read_config
from lemo_fx.cli.options import Job, PlanOptions, Settings, Stopped, as_file, modules_of
from lemo_fx.cli.prepare import Documents, Prepared, Say, Windows, check_context, keeps_documents_apart, one_window
from lemo_fx.cli.watch import Bars, Lines, Timeline, bar
from lemo_fx.config import LemoConfig
from lemo_fx.draw import captured, draw
from lemo_fx.errors import ConfigError, InputError, LemoError, UnsupportedModelError
from lemo_fx.files import check_folder, write_text
from lemo_fx.graph.anatomy import causal_model, decoder_layers
from lemo_fx.kernels.private import compiled_call, set_compiled_call
from lemo_fx.measure import device_name
from lemo_fx.predictors import RECORD, Predictors

SETTINGS, SUMMARY, PAGE = "settings.json", "summary.json", "report.html"
RUN_FILE = "run.yaml"
STATE = "trainer_state.json"
LOGS = 500
"""Steps of a run that are logged, about; more would make every checkpoint carry a long history."""
FIT_WINDOWS = 64
"""Windows of the training data that predictors are fitted on."""


class WindowTrainer(Trainer):
    """A Trainer whose evaluations, too, compute the loss in segments, without the logits of a whole window."""

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The head alone thinks that it is in training; the layers run their original code with every token.

        Not the Trainer's own, which weighs windows of several processes by their tokens, and of one by nothing.
        """
        head = causal_model(model)
        assert head is not None
        head.training = True
        try:
            with torch.no_grad(), self.compute_loss_context_manager(), uncompiled(model):
                return model(**self._prepare_inputs(inputs)).loss.detach(), None, None
        finally:
            head.training = False


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Decoder layers run as they are: compiling what few steps run, for every mode and length, takes longer."""
    compiled = [(layer, compiled_call(layer)) for _, layer in decoder_layers(model)]
    for layer, _ in compiled:
        set_compiled_call(layer, None)
    try:
        yield
    finally:
        for layer, call in compiled:
            set_compiled_call(layer, call)


@dataclass(frozen=True)
class Run:
    """A job, its plan and its settings.

    Attributes:
        command: as it was typed, for the record.
        cut: windows to train on are cut into so many; held-out ones stay whole.
    """

    job: Job
    options: PlanOptions
    settings: Settings
    command: str = ""
    cut: int = 1

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.job.out

    @property
    def written(self) -> list[Path]:
        """What it leaves."""
        merged = [self.out / "merged"] if self.job.merge else []
        return [self.out / "adapter", *merged, self.out / PAGE, self.out / SUMMARY, self.out / RUN_FILE]


def train(run: Run, say: Say = lambda line: None) -> dict[str, Any] | None:
    """Fine-tune, and write OUT/adapter, OUT/report.html, OUT/summary.json and OUT/run.yaml.

    Under a launcher (torchrun) each process trains on windows of its own; the first one writes.

    Args:
        say: called with lines to show.

    Returns:
        The summary, see `summarise`; None in processes but the first.

    Raises:
        LemoError: bad input, a plan that does not fit the model, too little memory; the message says what to do.
        Stopped: the user interrupted the training.
    """
    plan = run.options.config()
    say = say if _first() else lambda line: None
    _check_job(run)
    settings = dataclasses.replace(run.settings, batch=_batch(run.settings.batch))
    folder = folder_of(run.job.model)
    check_weights(folder)
    config = read_config(folder)
    documents = prepare.documents_of(run.job, settings, folder, config, say)
    check_context(config, plan, documents.context)
    with _in_words(run.out):
        model = _loaded(run, folder)
        prepared = prepare.windows_of(documents, settings, keeps_documents_apart(model), say)
        if run.cut > 1:
            prepared = prepare.cut(prepared, run.cut)
        say(str(prepared))
        if plan.eliminations:
            for line in advice(model.num_parameters(), documents.context, prepared.is_running_text):
                say(f"note: {line}")
        settings = dataclasses.replace(settings, context=documents.context, steps=_steps(settings, prepared))
        run = dataclasses.replace(run, settings=settings)
        recorded = _recorded(run, folder, documents, plan)
        if _first():
            _check_earlier(run, recorded, say)
        trainer = _trainer(run, model, prepared, _predictors(run, model, prepared.train, plan, say), plan)
        if _first():
            # Only now: a folder with a run in it wants --resume, and what does not even start is no run.
            _write_started(run, recorded)
        picture = _graph_picture(trainer.model, plan)
        checkpoint = _last_checkpoint(run.out) if run.job.resume else None
        trainer.args.eval_on_start = checkpoint is None
        if run.job.resume:
            say(f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {run.out}: from the start")
        with bar() as progress:
            if _first():
                shown = Bars(progress, trainer.args.max_steps) if sys.stdout.isatty() else Lines(say)
                trainer.add_callback(shown)
            _run(trainer, checkpoint, run.out)
        last = page.entries(trainer.state.log_history, "eval_loss")[-1]["eval_loss"]
        if not math.isfinite(last):
            raise LemoError(f"the held-out loss is {last} in the end, so no adapter is saved: try a lower --rate")
        if not _first():
            return None
        summary = summarise(run, trainer, prepared)
        _save(run, trainer, summary)
        other = None if run.job.compare_with is None else read_summary(run.job.compare_with)
        (run.out / PAGE).write_text(page.html(summary, page.pictures(summary, picture, other), other), encoding="utf-8")
        _write(run.out / SUMMARY, summary)
        _merge_and_push(run, folder, say)
    return summary


def preview(run: Run, say: Say) -> Text:
    """The first step's windows, decoded, with what is learnt marked; no weights are loaded.

    Raises:
        LemoError: bad input.
    """
    folder = folder_of(run.job.model)
    config = read_config(folder)
    documents = prepare.documents_of(run.job, run.settings, folder, config, say)
    check_context(config, run.options.config(), documents.context)
    apart = run.settings.pack and keeps_documents_apart(built(config))
    prepared = prepare.windows_of(documents, run.settings, apart, say)
    say(str(prepared))
    return prepare.preview(prepared, run.settings, folder)


def _first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _batch(asked: int | None) -> int:
    """Windows of a step over all processes."""
    processes = _processes()
    batch = asked or processes
    if batch % processes:
        raise InputError(f"--batch {batch} cannot be shared by {processes} processes: give a multiple of {processes}")
    return batch


def _steps(settings: Settings, prepared: Prepared) -> int:
    assert settings.batch is not None
    return settings.steps or math.ceil(settings.epochs * math.ceil(len(prepared.train) / settings.batch))


def _loaded(run: Run, folder: Path) -> Any:
    """The model on its device, in bfloat16 where that is a GPU that has it."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
    model = load_model(folder, dtype, run.settings.attention, run.settings.load_in)
    return model if run.settings.load_in else model.to("cuda" if gpu else "cpu")


def check_alone() -> None:
    """Raise InputError where a launcher started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("lemo-fx uses one device: for several, transform the model in a Trainer script")


def check_attention(attention: str | None) -> None:
    """Raise InputError where torch has no backward of an attention implementation on this machine."""
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError("--attention flex_attention trains on a GPU only, and here is none: choose sdpa or eager")


def compiles(asked: bool | None) -> bool:
    """Whether decoder layers are compiled: as asked, else where there is a GPU."""
    return torch.cuda.is_available() if asked is None else asked


def _check_job(run: Run) -> None:
    """Raise InputError where a run must not start, before anything is read."""
    job, settings = run.job, run.settings
    check_folder(job.out)
    if _first() and (job.out / SETTINGS).exists() and not job.resume:
        raise InputError(f"{job.out} holds a run already: add --resume to go on with it, or choose another --out")
    check_attention(settings.attention)
    schedulers = [kind.value for kind in SchedulerType]
    if settings.scheduler not in schedulers:
        raise InputError(f"--scheduler {settings.scheduler} is not one of {', '.join(schedulers)}")
    for name in job.reporters:
        if name not in ("wandb", "tensorboard"):
            raise InputError(f"--report-to {name} is not one of wandb, tensorboard")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--report-to {name} needs a package that is not installed: pip install {name}")
    if job.compare_with is not None:
        read_summary(job.compare_with)
    if job.push is not None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", job.push):
            raise InputError(f"--push {job.push} is no name on the Hub: give owner/name")
        if get_token() is None:
            raise InputError("--push needs to be logged in: run `hf auth login`, or set HF_TOKEN")


def _recorded(run: Run, folder: Path, documents: Documents, plan: LemoConfig) -> dict[str, Any]:
    """What must be the same in a run that is resumed; but its steps may be more."""
    digest = hashlib.sha256()
    for document in (*documents.train, *documents.heldout):
        digest.update(document.ids.tobytes() + b"|" + document.labels.tobytes() + b"|")
    predictors = run.job.predictors
    found = {
        "model": str(folder.resolve()) if Path(run.job.model).exists() else run.job.model,
        "data": digest.hexdigest()[:16],
        "predictors": str(predictors.resolve()) if predictors else None,
        "plan": dataclasses.asdict(plan),
        "settings": dataclasses.asdict(run.settings),
    }
    return json.loads(json.dumps(found))


LONGER = {"settings.steps", "settings.epochs"}
"""What may differ in a run that is resumed."""


def _check_earlier(run: Run, recorded: dict[str, Any], say: Say) -> None:
    """Raise InputError where OUT has a run that was started otherwise."""
    path = run.out / SETTINGS
    if path.exists():
        try:
            earlier = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}; choose another --out") from error
        different = sorted({*_different(earlier, recorded)} - LONGER)
        if different:
            raise InputError(
                f"{run.out} holds a run with other settings ({', '.join(different)}): resume it with its own"
            )
        before, now = earlier["settings"]["steps"], recorded["settings"]["steps"]
        if now < before:
            raise InputError(f"{run.out} holds a run of {before} steps: resume it with as many, or more")
        if now > before:
            say(f"{now} steps instead of {before}: from here the learning rate is that of the longer run")


def _write_started(run: Run, recorded: dict[str, Any]) -> None:
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        _write(run.out / SETTINGS, recorded)
        write_text(run.out / RUN_FILE, _run_file(run))
    except OSError as error:
        raise InputError(f"{run.out} cannot be written: {error}") from error


def _run_file(run: Run) -> str:
    done = dataclasses.replace(run.job, resume=False, preview=False)
    return f"# lemo-fx train --config {run.out / RUN_FILE} --out ANOTHER\n" + as_file(done, run.options, run.settings)


def _different(one: Any, other: Any, name: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {*one, *other}:
            yield from _different(one.get(key), other.get(key), f"{name}.{key}".removeprefix("."))
    elif one != other:
        yield name


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


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


def _needs_fit(plan: LemoConfig) -> bool:
    return plan.predicts or any(site.eliminated == "stand_in" for site in plan.eliminations)


def _predictors(run: Run, model: nn.Module, windows: Sequence[Window], plan: LemoConfig, say: Say) -> Predictors | None:
    if run.job.predictors is not None:
        return Predictors.load(run.job.predictors)
    if not _needs_fit(plan):
        return None
    folder = run.out / "predictors"
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if (folder / RECORD).exists():
            return Predictors.load(folder)
        say(f"fitting predictors on {min(FIT_WINDOWS, len(windows))} windows")
        longest = [max(window, key=len).ids.tolist() for window in windows[:FIT_WINDOWS]]
        return lemo_fx.fit(model, longest, plan, folder=folder)


def adapted(
    model: Any, rank: int, targets: str | tuple[str, ...], alpha: int | None = None, dropout: float = 0.0
) -> Any:
    """The model with LoRA adapters, without a cache, which training has no use for.

    Args:
        alpha: twice the rank unless given.

    Raises:
        ConfigError: it has no such targets.
    """
    model.config.use_cache = False
    named = targets if isinstance(targets, str) else list(targets)
    lora = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout, target_modules=named, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"targets={named!r} do not fit {type(model).__name__}: {error}") from error


CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""What transformers calls it: the first name since 5.24, and the second no more from 6 on."""


def checkpointing(on: bool) -> dict[str, Any]:
    """The arguments of TrainingArguments that switch activation checkpointing."""
    return {CHECKPOINTING: on, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """On a machine with several GPUs the Trainer would else wrap the model in DataParallel."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _trainer(run: Run, model: Any, prepared: Prepared, predictors: Predictors | None, plan: LemoConfig) -> Trainer:
    settings, out = run.settings, run.out
    assert settings.batch is not None
    assert settings.steps is not None
    transformers.set_seed(settings.seed)
    bf16 = next(model.parameters()).device.type == "cuda" and torch.cuda.is_bf16_supported()
    model = adapted(model, settings.rank, modules_of(settings.targets), settings.alpha, settings.dropout)
    lemo_fx.transform(model, plan, predictors=predictors)
    layers = decoder_layers(model)
    if compiles(settings.compile):
        # Not the whole model: transformers would then build a mask of length x length.
        for _, layer in layers:
            layer.compile()

    steps = settings.steps
    log_every = math.ceil(steps / LOGS)
    # A checkpoint between two logs would make a resumed run's next log cover fewer steps.
    eval_every, save_every = (
        math.ceil((every or math.ceil(steps / 10)) / log_every) * log_every
        for every in (settings.eval_every, settings.save_every)
    )
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.batch // _processes(),
        learning_rate=settings.rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup * steps if settings.warmup < 1 else settings.warmup),
        bf16=bf16,
        logging_steps=log_every,
        eval_strategy="steps",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=run.job.reporters,
        run_name=out.name,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings.seed,
        **checkpointing(settings.checkpointing),
    )
    trainer = WindowTrainer(
        model=model,
        args=one_device(arguments),
        data_collator=one_window,
        train_dataset=Windows(prepared.train),
        eval_dataset=Windows(prepared.heldout),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LemoCallback(trainer, recall_every=eval_every if predictors is not None else None))
    trainer.add_callback(Timeline([name for name, _ in layers]))
    return trainer


def _run(trainer: Trainer, checkpoint: Path | None, out: Path) -> None:
    """Train to the end, and evaluate there.

    Raises:
        Stopped: the user interrupted it.
    """
    try:
        _train(trainer, checkpoint)
    except KeyboardInterrupt as stop:
        last = _last_checkpoint(out)
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


def _last_checkpoint(out: Path) -> Path | None:
    """The latest checkpoint that was written whole: the Trainer writes its state last."""
    found = []
    for path in (out / "checkpoints").glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append((json.loads((path / STATE).read_text())["global_step"], path))
    return max(found)[1] if found else None


def summarise(run: Run, trainer: Trainer, prepared: Prepared) -> dict[str, Any]:
    """All of a run's figures in plain types."""
    state = trainer.state
    model: Any = trainer.model
    logged, evaluated = page.entries(state.log_history, "loss"), page.entries(state.log_history, "eval_loss")
    device = next(model.parameters()).device
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": run.job.model,
        "heldout_loss": {"before": evaluated[0]["eval_loss"], "after": evaluated[-1]["eval_loss"]},
        "steps": state.global_step,
        "median_step_seconds": statistics.median(e["lemo_fx/seconds"] for e in logged),
        "peak_memory_gib": max(e["lemo/peak_memory_gib"] for e in logged),
        # Not numel of each: bitsandbytes packs two weights in one number.
        "parameters": {"all": model.num_parameters(), "trained": trained},
        "data": {
            "data": run.job.data,
            "windows": len(prepared.train),
            "tokens": sum(len(piece) for window in prepared.train for piece in window),
            "documents_together": max(map(len, prepared.train)),
            "heldout_windows": len(prepared.heldout),
        },
        "processes": _processes(),
        "settings": dataclasses.asdict(run.settings),
        "report": lemo_fx.report(model).to_dict(),
        "history": state.log_history,
        "environment": {**environment(run.command), "device": device_name(device)},
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        InputError: there is none in the folder.
    """
    path = folder if folder.is_file() else folder / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        page.figures_of(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no summary of a finished run of lemo-fx train: {error}") from error
    return found


CARD = """---
{data}
---

# {name}

A LoRA adapter for `{model}`, trained with lemo_fx {version}; it loads with PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "THIS FOLDER OR ITS NAME")
```

{table}

Held-out loss is that of the model's original code with every token. The plan and every setting: {settings}.
"""


def _save(run: Run, trainer: Trainer, summary: dict[str, Any]) -> None:
    """The adapter, with a card."""
    adapted: Any = trainer.model
    # Where the adapter is to look for its model: not a place in a cache. PEFT would ask the Hub for the size of the
    # vocabulary, too, which has not changed.
    adapted.peft_config["default"].base_model_name_or_path = run.job.model
    adapted.save_pretrained(run.out / "adapter", save_embedding_layers=False)
    on_hub = not Path(run.job.model).exists()
    card = ModelCardData(
        base_model=run.job.model if on_hub else None, library_name="peft", tags=["lora", "lemo_fx", "text-generation"]
    )
    rows = "".join(f"| {name} | {value} |\n" for name, value in page.figures_of(summary).items())
    settings = ", ".join(f"{name} {value}" for name, value in summary["settings"].items() if value is not None)
    text = CARD.format(
        data=card.to_yaml(), name=run.out.name, model=run.job.model, version=__version__,
        table=f"| | |\n|---|---|\n{rows}", settings=f"plan {page.in_words(summary['report']['config'])}; {settings}",
    )  # fmt: skip
    ModelCard(text).save(run.out / "adapter" / "README.md")


def _merge_and_push(run: Run, folder: Path, say: Say) -> None:
    """What was asked for beside the adapter."""
    adapter = run.out / "adapter"
    if run.job.merge:
        say("merging the adapter into the model")
        # Read again: the trained one may be quantised, and lies on the device.
        merged: Any = PeftModel.from_pretrained(load_model(folder), adapter)
        merged.merge_and_unload().save_pretrained(run.out / "merged")
        if (folder / "tokenizer_config.json").exists():
            load_tokenizer(folder).save_pretrained(run.out / "merged")
    if run.job.push:
        api = HfApi()
        try:
            api.create_repo(run.job.push, private=True, exist_ok=True)
            api.upload_folder(repo_id=run.job.push, folder_path=adapter, commit_message="Upload the adapter")
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LemoError(
                f"the run is done, but {run.job.push} was not uploaded: {first}; try `hf upload {run.job.push} "
                f"{adapter}`"
            ) from error
        say(f"uploaded to https://huggingface.co/{run.job.push}")


def _graph_picture(model: Any, plan: LemoConfig) -> Any:
    """The middle rewritten decoder layer before and after; None where the plan eliminates nothing."""
    graphs = lemo_fx.graphs(model)
    layers = [name for name, _ in decoder_layers(model) if name in graphs]
    if not plan.eliminations:
        return None
    if not layers:
        raise UnsupportedModelError("the plan leaves every decoder layer dense: lower keep, or name fewer dense_layers")
    name = layers[len(layers) // 2]
    with suspended(model):
        layer = model.get_submodule(name)
        before, kind = captured(layer), type(layer).__name__
    return draw({"before": before, "after": graphs[name]}, kind)
