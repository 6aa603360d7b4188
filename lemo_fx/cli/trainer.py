"""The transformers Trainer of a run: adapters, the plan, one window at a time on each device."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import lemo_fx
from lemo_fx.callback import LemoCallback
from lemo_fx.cli.machine import compiles, processes
from lemo_fx.cli.options import modules_of
from lemo_fx.cli.prepare import Prepared, Windows, one_window
from lemo_fx.cli.run import Run
from lemo_fx.cli.watch import Timeline
from lemo_fx.config import LemoConfig
from lemo_fx.errors import ConfigError
from lemo_fx.graph.anatomy import causal_model, decoder_layers
from lemo_fx.graph.capture import restored, uncompiled
from lemo_fx.predictors import Predictors

LOGS = 500
"""Steps of a run that are logged, about; more would make every checkpoint carry a long history."""


class WindowTrainer(Trainer):
    """A Trainer whose evaluations, too, compute the loss in segments, without the logits of a whole window."""

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The head alone thinks that it is in training; the layers run their original code with every token.

        Uncompiled, since to compile what few steps run, for every mode and length, takes longer. Not the Trainer's own,
        which weighs windows of several processes by their tokens, and of one by nothing.
        """
        head = causal_model(model)
        assert head is not None
        with restored([head], "training"), torch.no_grad(), self.compute_loss_context_manager(), uncompiled():
            head.training = True
            return model(**self._prepare_inputs(inputs)).loss.detach(), None, None


def adapted(
    model: Any, rank: int, targets: str | tuple[str, ...], alpha: int | None = None, dropout: float = 0.0
) -> Any:
    """The model with LoRA adapters, without a cache, which training has no use for."""
    model.config.use_cache = False
    named = targets if isinstance(targets, str) else list(targets)
    if not named:
        raise ConfigError("targets: name modules, with commas, or all-linear")
    modules = dict(model.named_modules())
    for name in named if isinstance(named, list) else []:
        # PEFT asks for one of them to be found, and leaves out the others without a word.
        if not any(place == name or place.endswith(f".{name}") for place in modules):
            linear = [place.rpartition(".")[2] for place, module in modules.items() if isinstance(module, nn.Linear)]
            raise ConfigError(
                f"targets={named!r} do not fit {type(model).__name__}: no module is named {name!r}; its linear ones "
                f"are {', '.join(dict.fromkeys(linear))}"
            )
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


def trainer_of(run: Run, model: Any, prepared: Prepared, predictors: Predictors | None, plan: LemoConfig) -> Trainer:
    """The Trainer of a run on its windows; the model gets its adapters and its plan."""
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
        gradient_accumulation_steps=settings.batch // processes(),
        learning_rate=settings.rate,
        lr_scheduler_type=settings.scheduler,
        # The first step of a warm-up has rate 0: where its share is less than a step, there is none.
        warmup_steps=int(settings.warmup * steps if settings.warmup < 1 else settings.warmup),
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
