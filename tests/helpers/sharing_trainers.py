"""Trainers whose ranks share sequences; tests/ecosystem/test_sharing_trainers.py runs them on several CPU ranks.

python tests/helpers/sharing_trainers.py FOLDER FUNCTION   (RANK, WORLD_SIZE and so on set as torchrun does)
"""

import datetime
import sys
import time
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
import trl
from shared import config, make, raises
from tiny import TOLERANCE, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from training import Rows, arguments, word_tokenizer

import lemo_fx
from lemo_fx import LemoConfig


def padded_at_the_end(rows):
    """Rows of tokens as a batch [B, 64]."""
    pad = torch.nn.functional.pad
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.stack([pad(r["input_ids"], (0, 64 - n)) for r, n in zip(rows, lengths, strict=True)]),
        "labels": torch.stack([pad(r["labels"], (0, 64 - n), value=-100) for r, n in zip(rows, lengths, strict=True)]),
        "attention_mask": torch.stack([(torch.arange(64) < n).long() for n in lengths]),
    }


def rows():
    """Of tokens, every second one shorter."""
    data = Rows(ragged=True)
    return [data[index] for index in range(len(data))]


def documents():
    """Of prompts and answers, of other lengths each."""
    rows = []
    for number, row in enumerate(map(Rows().__getitem__, range(16))):
        length = 20 + 6 * (number % 5)
        ids = row["input_ids"][:length].tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return datasets.Dataset.from_list(rows)


class Stream(torch.utils.data.IterableDataset):
    """Rows, of which nobody knows how many there are."""

    def __iter__(self):
        """Over all of them."""
        return iter(rows())


class SharingSFTTrainer(lemo_fx.SequenceParallelTrainer, trl.SFTTrainer):
    """As docs/sequence-parallelism.md has it."""


PADDED = {"max_length": 64, "pad_to_multiple_of": 16}
ACCUMULATED = {"gradient_accumulation_steps": 2}
TRAINERS = {
    "padded": (rows, ACCUMULATED),
    "a mean per rank": (rows, {"average_tokens_across_devices": False}),
    "by length": (rows, {"train_sampling_strategy": "group_by_length"}),
    "streamed": (Stream, {}),
    "SFT, padded": (documents, PADDED | ACCUMULATED),
    "SFT, packed": (documents, PADDED | {"packing": True}),
    "SFT, dft": (documents, PADDED | {"loss_type": "dft"}),
}
"""Data and settings of a run each."""


def trained(name, folder, group=None, settings_of_model=None, resume=None, **more):
    """The logs and weights of a run of the Trainer: by one process, or by a group's ranks."""
    make_data, settings = TRAINERS[name]
    model, data = make(checkpointing=True), make_data()
    lemo_fx.transform(model, settings_of_model or config(0.5, sequence_parts=2), sequence_group=group)
    trainer = trainer_of(name, model, folder, data, settings | {"optim": "sgd", "learning_rate": 0.1} | more)
    trainer.train(resume_from_checkpoint=resume)
    logged = {"loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens"}
    history = trainer.state.log_history
    found = {n: torch.tensor([e[n] for e in history if n in e], dtype=torch.float32) for n in logged}
    found["samples a step"] = torch.tensor(trainer.get_total_train_batch_size(trainer.args))
    found["evaluated"] = torch.tensor(trainer.evaluate()["eval_loss"])
    return found | {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def trainer_of(name, model, folder, data, settings):
    """Six steps, see `training.arguments`."""
    if not name.startswith("SFT"):
        given, more = arguments(folder, **settings), {"data_collator": padded_at_the_end}
        return lemo_fx.SequenceParallelTrainer(model, given, train_dataset=data, eval_dataset=rows(), **more)
    usual = {"max_steps": 6, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "logging_steps": 1}
    usual |= {"report_to": [], "use_cpu": True, "seed": 1, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    given, more = trl.SFTConfig(str(folder), **usual, **settings), {"processing_class": word_tokenizer()}
    return SharingSFTTrainer(model, given, train_dataset=data, eval_dataset=data, **more)


def the_trainers():
    """transformers' Trainer and TRL's, which wrap the model in DDP; one of them interrupted and resumed."""
    folder = Path(sys.argv[1])
    for name in TRAINERS:
        began = time.perf_counter()
        torch.save(trained(name, folder / "several", dist.group.WORLD), folder / f"{name}{dist.get_rank()}.pt")
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    saves = {"save_strategy": "steps", "save_steps": 3, "group": dist.group.WORLD}
    whole = trained("by length", folder / "resumed", **saves)
    resumed = trained("by length", folder / "resumed", resume=str(folder / "resumed" / "checkpoint-3"), **saves)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, **TOLERANCE["same"])
    what_is_refused(folder)


def what_is_refused(folder):
    """Trainers that give every rank other batches, losses that need logits, and context parallelism."""
    model = lemo_fx.transform(make(), config(), sequence_group=dist.group.WORLD)
    given = {"per_device_train_batch_size": 1}
    plain = transformers.Trainer(model, arguments(folder, **given), train_dataset=Rows())
    raises("lemo_fx.SequenceParallelTrainer", plain.train)
    settings = {"label_smoothing_factor": 0.1} | given
    raises("call it with labels", trainer_of("padded", model, folder, rows(), settings).train)
    settings = {"train_sampling_strategy": "batch_rebalance"} | given
    raises("'batch_rebalance'", trainer_of("padded", model, folder, rows(), settings).train)
    inputs = batch(1, 64)
    buffers = [inputs["input_ids"], inputs["labels"]]
    with context_parallel(init_device_mesh("cpu", (2,)), buffers=buffers, buffer_seq_dims=[1, 1]):
        raises("context_parallel is active", model, **inputs)


def samples_and_parts():
    """Two groups of two ranks, a sample each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("samples", "parts"))
    settings = {"settings_of_model": LemoConfig(None, None, block_size=8), "per_device_train_batch_size": 1}
    found = trained("padded", Path(sys.argv[1]) / "several", mesh["parts"].get_group(), **settings)
    torch.save(found, Path(sys.argv[1]) / f"mesh{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    globals()[sys.argv[2]]()
    dist.destroy_process_group()
