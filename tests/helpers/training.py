"""What every test of a training library needs: rows, arguments, one run of the Trainer, and its losses."""

import tokenizers
import torch
import transformers
from tiny import VOCABULARY

import lemo_fx
from lemo_fx import Elimination, LemoConfig


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of random tokens; every second one shorter, so that batches are padded."""

    def __init__(self, ragged: bool = False) -> None:
        self.ragged = ragged

    def __len__(self):
        return 16

    def __getitem__(self, index):
        length = 64 - 16 * (index % 2) if self.ragged else 64
        ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def word_tokenizer(**settings):
    """A word per id of the tiny models' vocabulary."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    named = {"pad_token": "w0", "eos_token": "w2", "unk_token": "w1"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named, **settings)


def plan(keep=0.5, **settings):
    """Every layer sparse, in blocks of 8."""
    site = Elimination(keep=keep, **settings)
    return LemoConfig(attention=site, mlp=site, block_size=8, dense_layers=())


def arguments(folder, **settings):
    """Six steps on the CPU, two rows at a time, a log at each."""
    given = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return transformers.TrainingArguments(**(given | settings))


def run(model, folder, config=None, resume=None, callbacks=(), data=None, collator=None, **settings):
    """Train a model, transformed by `config` unless that is None; returns the Trainer."""
    if config is not None:
        lemo_fx.transform(model, config)
    data = data or Rows()
    given = arguments(folder, **settings)
    trainer = transformers.Trainer(model, given, collator, train_dataset=data, eval_dataset=data)
    for callback in callbacks:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer, name="loss"):
    """{step: loss} of a finished run; "eval_loss" for the evaluations."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
