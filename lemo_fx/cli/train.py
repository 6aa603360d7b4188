"""`lemo-fx train`: fine-tune a local model on local data with LoRA under a plan, from files to an adapter and a page.

Underneath is the transformers Trainer, one window of text at a time on one device, so that nothing is ever padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, TrainerState

import lemo_fx
from lemo_fx.api import suspended
from lemo_fx.callback import LemoCallback
from lemo_fx.cli import data, page
from lemo_fx.cli.data import Document, Row, Window
from lemo_fx.cli.demo import environment
from lemo_fx.config import LemoConfig, check_seed
from lemo_fx.draw import captured, draw
from lemo_fx.errors import ConfigError, InputError, LemoError, UnsupportedModelError
from lemo_fx.files import check_folder, write_text
from lemo_fx.graph.anatomy import causal_model, decoder_layers, has_rope, longest_context
from lemo_fx.graph.capture import modes_kept
from lemo_fx.measure import device_name, reset_peak
from lemo_fx.predictors import RECORD, Predictors

SETTINGS, SUMMARY, PAGE = "settings.json", "summary.json", "report.html"
STATE = "trainer_state.json"
LOGS = 500
"""Steps of a run that are logged, about; more would make every checkpoint carry a long history."""
FIT_WINDOWS = 64
"""Windows of the training data that predictors are fitted on."""


@dataclass(frozen=True)
class Settings:
    """How a run trains, besides the plan.

    Attributes:
        context: tokens of a window at most.
        steps: optimizer steps; None: as many as `epochs` take. batch: windows of a step, one at a time on the device.
        rate: peak learning rate, after a warm-up over 3 % of the steps; it falls to nothing along a cosine.
        rank, targets: of the LoRA adapters (alpha is twice the rank): "all-linear", or names of modules.
        pack: several short documents share a window where the model keeps them apart, see `keeps_documents_apart`.
        assistant_only: of chats, learn only what the assistant says.
        checkpointing: activation checkpointing.
        compile: torch.compile of every decoder layer by itself; None: on a GPU.
        attention: attention implementation; None is transformers' choice.
        eval_share: of the tokens, held out where no held-out data is given; eval_windows: held-out windows at most.
        eval_every, save_every: optimizer steps between held-out losses, and between checkpoints; None: a tenth of all.
    """

    context: int = 4096
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 1
    rate: float = 2e-4
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    pack: bool = True
    assistant_only: bool = False
    checkpointing: bool = True
    compile: bool | None = None
    attention: str | None = None
    eval_share: float = 0.1
    eval_windows: int = 32
    eval_every: int | None = None
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch", "rate", "rank", "eval_windows", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r} must be a number greater than 0")
        if not 0 < self.eval_share < 1:
            raise ConfigError(f"eval_share={self.eval_share!r} must lie between 0 and 1")
        check_seed(self.seed)


def read_config(path: Path) -> Any:
    """The transformers config of a causal language model: of a folder, or a config.json.

    Raises:
        InputError: there is none.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give a local model folder or a config.json")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} does not describe a model: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{path}: a {config.model_type} model is no causal language model")
    return config


def load_model(path: Path, dtype: torch.dtype | None = None, attention: str | None = None) -> Any:
    """A causal language model with all of its weights from a local folder of safetensors.

    Raises:
        InputError: there is none, or not whole; says what is missing.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model: give a local folder with config.json, safetensors and tokenizer")
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{path} holds no *.safetensors: there are no weights to start from (no other format is read)")
    read_config(path)
    given: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    given |= {} if attention is None else {"attn_implementation": attention}
    given |= {} if dtype is None else {"dtype": dtype}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = load(path, output_loading_info=True, **given)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"{path} cannot be loaded as a transformers causal language model: {error}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{path} holds no tokenizer that transformers can load: {error}") from error


def bar() -> Progress:
    """The progress bars of a run."""
    note = TextColumn("{task.fields[note]}", style="dim")
    return Progress(
        TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), note, transient=True,
    )  # fmt: skip


def tokenised(rows: Sequence[Row], model_path: Path, model: nn.Module, assistant_only: bool = False) -> list[Document]:
    """The rows as a model's tokenizer reads them, with a progress bar.

    Raises:
        InputError: a row cannot be tokenised, or all are empty.
    """
    needed = any(row.kind != "input_ids" for row in rows)
    tokenizer = load_tokenizer(model_path) if needed else None
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    with bar() as progress:
        task = progress.add_task("reading", total=len(rows), note="")
        documents = data.tokenise(
            rows, tokenizer, vocabulary, assistant_only=assistant_only, tick=lambda n: progress.advance(task, n)
        )
    if not documents:
        raise InputError(f"{rows[0].where}: every text is empty")
    return documents


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether position_ids that start again keep packed documents from seeing each other: shown by running it.

    The logits of a second document must not change with the first one, by more than a hundredth of what they change
    by where the positions go on. transformers makes such masks for eager, sdpa and flex attention, and flash attention
    reads the positions itself; a model that drops position_ids on the way fails here.
    """
    length = 16
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(0)).to(device)
    going_on = torch.arange(2 * length, device=device)[None]
    starting_again = torch.arange(length, device=device).repeat(2)[None]

    def change(positions: torch.Tensor) -> float:
        rows = [torch.cat([first, ids[2]])[None] for first in ids[:2]]
        one, other = (model(input_ids=row, position_ids=positions, use_cache=False).logits[0, length:] for row in rows)
        return float((one.float() - other.float()).abs().max())

    with modes_kept(model):
        model.eval()
        try:
            return change(starting_again) <= change(going_on) / 100
        except TypeError:
            return False


class Windows(torch.utils.data.Dataset):
    """Windows as the Trainer takes them: [N] input_ids and labels, and position_ids where documents share one."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = self.windows[index]
        labels = [torch.from_numpy(piece.labels).long() for piece in pieces]
        for label in labels:
            # What a document begins with cannot be told from the end of the one before it.
            label[0] = data.IGNORED
        row = {
            "input_ids": torch.cat([torch.from_numpy(piece.ids).long() for piece in pieces]),
            "labels": torch.cat(labels),
        }
        if len(pieces) > 1:
            row["position_ids"] = torch.cat([torch.arange(len(piece)) for piece in pieces])
        return row


def one_window(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator: [1, N]."""
    return {name: value[None] for name, value in rows[0].items()}


class WindowTrainer(Trainer):
    """A Trainer whose evaluations, too, compute the loss in segments, without the logits of a whole window."""

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The head alone thinks that it is in training; the layers run their original code with every token."""
        head = causal_model(model)
        assert head is not None
        head.training = True
        try:
            with uncompiled(model):
                return super().prediction_step(model, *args, **kwargs)
        finally:
            head.training = False


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Decoder layers run as they are: compiling what few steps run, for every mode and length, takes longer."""
    compiled = [(layer, layer._compiled_call_impl) for _, layer in decoder_layers(model)]
    for layer, _ in compiled:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in compiled:
            layer._compiled_call_impl = call


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
                kept[site.site.split("_")[0]][self.layers.index(site.module)] = site.kept_share
        seconds = time.perf_counter() - self.start
        state.log_history[-1].update({"lemo_fx/kept": kept, "lemo_fx/seconds": seconds})


class Bars(TrainerCallback):
    """Shows the run's progress."""

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


def train(
    model_path: Path,
    data_path: Path,
    out: Path,
    plan: LemoConfig,
    settings: Settings,
    *,
    heldout_path: Path | None = None,
    predictors_path: Path | None = None,
    resume: bool = False,
    command: str = "",
    say: Any = print,
) -> dict[str, Any]:
    """Fine-tune, and write OUT/adapter (a plain PEFT adapter), OUT/summary.json and OUT/report.html.

    Where the plan asks for predictors or stand-ins and none are given, they are fitted first, into OUT/predictors.

    Args:
        resume: go on from the last checkpoint under OUT that was written whole, if there is one.
        command: for the record.
        say: takes a line about what is done.

    Returns:
        What summary.json holds.

    Raises:
        LemoError: bad input, a plan that does not fit the model, too little memory; the message says what to do.
    """
    _check_place(out, resume)
    check_attention(settings.attention)
    rows = data.read_rows(data_path)
    heldout_rows = None if heldout_path is None else data.read_rows(heldout_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    model = load_model(model_path, torch.bfloat16 if bf16 else torch.float32, settings.attention)
    check_context(model.config, plan, settings.context)
    documents = tokenised(rows, model_path, model, settings.assistant_only)
    most = settings.eval_windows * settings.context
    if heldout_rows is None:
        documents, heldout = data.hold_out(documents, settings.eval_share, most, settings.seed)
    else:
        heldout = tokenised(heldout_rows, model_path, model, settings.assistant_only)
    _agree_with_earlier(out, _recorded(model_path, documents, heldout, plan, settings, predictors_path))

    with _in_words(out):
        model.to(device)
        pack = settings.pack and keeps_documents_apart(model)
        if settings.pack and not pack:
            say(f"{type(model).__name__} does not keep packed documents apart: one document a window")
        windows = data.windows(documents, settings.context, pack)
        heldout_windows = data.windows(heldout, settings.context, pack)[: settings.eval_windows]
        if not windows or not heldout_windows:
            raise InputError(f"{data_path} holds too little text to train on and to hold some out: give more")
        say(_described(documents, windows, heldout_windows, settings.context))
        predictors = _predictors(model, windows, plan, predictors_path, out, say)
        trainer = _trainer(model, windows, heldout_windows, plan, predictors, settings, out, bf16)
        picture = _graph_picture(trainer.model)
        checkpoint = _last_checkpoint(out) if resume else None
        trainer.args.eval_on_start = checkpoint is None
        if resume:
            say(f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {out}: from the start")
        with bar() as progress:
            trainer.add_callback(Bars(progress, trainer.args.max_steps))
            _run(trainer, checkpoint)
        last = page.entries(trainer.state.log_history, "eval_loss")[-1]["eval_loss"]
        if not math.isfinite(last):
            raise LemoError(f"the held-out loss is {last} in the end, so no adapter is saved: try a lower --rate")
        adapted: Any = trainer.model
        adapted.save_pretrained(out / "adapter")
        summary = summarise(trainer, model_path, windows, heldout_windows, settings, command)
        (out / PAGE).write_text(page.html(summary, page.pictures(summary, picture)), encoding="utf-8")
        _write(out / SUMMARY, summary)
    return summary


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


def _check_place(out: Path, resume: bool) -> None:
    check_alone()
    check_folder(out)
    if (out / SETTINGS).exists() and not resume:
        raise InputError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")


def check_context(model_config: Any, plan: LemoConfig, context: int) -> None:
    """Raise InputError or ConfigError where a model does not read as many tokens, or a plan has nothing to choose."""
    longest = longest_context(model_config)
    if longest is not None and context > longest:
        more = (
            ", or set rope scaling in the model's config.json"
            if has_rope(model_config)
            else ": its positions are learned"
        )
        raise InputError(
            f"context={context}: this {model_config.model_type} model reads up to {longest} tokens: choose --context "
            f"{longest} or less{more}"
        )
    if context < 4 * plan.block_size:
        raise ConfigError(f"context={context} is under four blocks of {plan.block_size} tokens: nothing to choose from")


def _recorded(
    model_path: Path,
    documents: Sequence[Document],
    heldout: Sequence[Document],
    plan: LemoConfig,
    settings: Settings,
    predictors_path: Path | None,
) -> dict[str, Any]:
    """What must be the same in a run that is resumed."""
    digest = hashlib.sha256()
    for document in (*documents, *heldout):
        digest.update(document.ids.tobytes() + b"|" + document.labels.tobytes() + b"|")
    found = {
        "model": str(model_path.resolve()),
        "data": digest.hexdigest()[:16],
        "predictors": str(predictors_path.resolve()) if predictors_path else None,
        "plan": dataclasses.asdict(plan),
        "settings": dataclasses.asdict(settings),
    }
    return json.loads(json.dumps(found))


def _agree_with_earlier(out: Path, recorded: dict[str, Any]) -> None:
    """Write what a run was started with, or raise InputError where OUT has a run that was started otherwise."""
    path = out / SETTINGS
    if not path.exists():
        try:
            out.mkdir(parents=True, exist_ok=True)
            _write(path, recorded)
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error}") from error
        return
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; choose another --out") from error
    different = sorted(_different(earlier, recorded))
    if different:
        raise InputError(f"{out} holds a run with other settings ({', '.join(different)}): resume it with its own")


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


def _described(
    documents: Sequence[Document], windows: Sequence[Window], heldout: Sequence[Window], context: int
) -> str:
    tokens = sum(map(len, documents))
    full = sum(len(piece) for window in windows for piece in window) / (len(windows) * context)
    together = max(map(len, windows))
    packed = f", up to {together} documents together" if together > 1 else ""
    return (
        f"to train on: documents {len(documents):,}, tokens {tokens:,}, windows of up to {context:,} {len(windows):,} "
        f"({full:.0%} full{packed}); windows held out: {len(heldout)}"
    )


def _needs_fit(plan: LemoConfig) -> bool:
    return plan.predicts or any(site.eliminated == "stand_in" for site in plan.eliminations)


def _predictors(
    model: nn.Module, windows: Sequence[Window], plan: LemoConfig, given: Path | None, out: Path, say: Any
) -> Predictors | None:
    if given is not None:
        return Predictors.load(given)
    if not _needs_fit(plan):
        return None
    folder = out / "predictors"
    if (folder / RECORD).exists():
        return Predictors.load(folder)
    say(f"fitting predictors on {min(FIT_WINDOWS, len(windows))} windows")
    longest = [max(window, key=len).ids.tolist() for window in windows[:FIT_WINDOWS]]
    return lemo_fx.fit(model, longest, plan, folder=folder)


def adapted(model: Any, rank: int, targets: str | tuple[str, ...]) -> Any:
    """The model with LoRA adapters, without a cache, which training has no use for.

    Raises:
        ConfigError: it has no such targets.
    """
    model.config.use_cache = False
    named = targets if isinstance(targets, str) else list(targets)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=named, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"targets={named!r} do not fit {type(model).__name__}: {error}") from error


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """On a machine with several GPUs the Trainer would else wrap the model in DataParallel."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _trainer(
    model: Any,
    windows: Sequence[Window],
    heldout: Sequence[Window],
    plan: LemoConfig,
    predictors: Predictors | None,
    settings: Settings,
    out: Path,
    bf16: bool,
) -> Trainer:
    transformers.set_seed(settings.seed)
    model = adapted(model, settings.rank, settings.targets)
    lemo_fx.transform(model, plan, predictors=predictors)
    layers = decoder_layers(model)
    if compiles(settings.compile):
        # Not the whole model: transformers would then build a mask of length x length.
        for _, layer in layers:
            layer.compile()

    steps = settings.steps or math.ceil(settings.epochs * math.ceil(len(windows) / settings.batch))
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
        gradient_accumulation_steps=settings.batch,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * steps),
        gradient_checkpointing=settings.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
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
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer = WindowTrainer(
        model=model,
        args=one_device(arguments),
        data_collator=one_window,
        train_dataset=Windows(windows),
        eval_dataset=Windows(heldout),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LemoCallback(trainer, recall_every=eval_every if predictors is not None else None))
    trainer.add_callback(Timeline([name for name, _ in layers]))
    return trainer


def _run(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end, and evaluate there."""
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


def summarise(
    trainer: Trainer,
    model_path: Path,
    windows: Sequence[Window],
    heldout: Sequence[Window],
    settings: Settings,
    command: str,
) -> dict[str, Any]:
    """All of a run's figures in plain types."""
    state, model = trainer.state, trainer.model
    assert model is not None
    logged, evaluated = page.entries(state.log_history, "loss"), page.entries(state.log_history, "eval_loss")
    device = next(model.parameters()).device
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": str(model_path),
        "heldout_loss": {"before": evaluated[0]["eval_loss"], "after": evaluated[-1]["eval_loss"]},
        "steps": state.global_step,
        "median_step_seconds": statistics.median(e["lemo_fx/seconds"] for e in logged),
        "peak_memory_gib": max(e["lemo/peak_memory_gib"] for e in logged),
        "parameters": {"all": size, "trained": trained},
        "data": {
            "windows": len(windows),
            "tokens": sum(len(piece) for window in windows for piece in window),
            "documents_together": max(map(len, windows)),
            "heldout_windows": len(heldout),
        },
        "settings": dataclasses.asdict(settings),
        "report": lemo_fx.report(model).to_dict(),
        "history": state.log_history,
        "environment": {**environment(command), "device": device_name(device)},
    }


def _graph_picture(model: Any) -> Any:
    """The middle rewritten decoder layer before and after."""
    graphs = lemo_fx.graphs(model)
    layers = [name for name, _ in decoder_layers(model) if name in graphs]
    if not layers:
        raise UnsupportedModelError("the plan leaves every decoder layer dense: lower keep, or name fewer dense_layers")
    name = layers[len(layers) // 2]
    with suspended(model):
        layer = model.get_submodule(name)
        before, kind = captured(layer), type(layer).__name__
    return draw({"before": before, "after": graphs[name]}, kind)
