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
import trl
from shared import config, make
from training import Rows, arguments, word_tokenizer

import lemo_fx


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


class SharingSFTTrainer(lemo_fx.SequenceParallelTrainer, trl.SFTTrainer):
    """As docs/sequence-parallelism.md has it."""


PADDED = {"max_length": 64, "pad_to_multiple_of": 16}
ACCUMULATED = {"gradient_accumulation_steps": 2}
TRAINERS = {
    "padded": (rows, ACCUMULATED),
    "a mean per rank": (rows, {"average_tokens_across_devices": False}),
    "by length": (rows, {"train_sampling_strategy": "group_by_length"}),
    "SFT, padded": (documents, PADDED | ACCUMULATED),
    "SFT, packed": (documents, PADDED | {"packing": True}),
    "SFT, dft": (documents, PADDED | {"loss_type": "dft"}),
}
"""Data and settings of a run each."""


def trained(name, folder, group=None, resume=None):
    """The logs and weights of a run of the Trainer: by one process, or by a group's ranks."""
    make_data, settings = TRAINERS[name]
    settings = settings | {"optim": "sgd", "learning_rate": 0.1}
    model, data = make(checkpointing=True), make_data()
    lemo_fx.transform(model, config(0.5, sequence_parts=2), sequence_group=group)
    if name.startswith("SFT"):
        given = vars(arguments(folder))
        kept = ("max_steps", "per_device_train_batch_size", "lr_scheduler_type", "logging_steps")
        given = {n: given[n] for n in kept} | {"output_dir": str(folder), "report_to": [], "use_cpu": True, "seed": 1}
        given = trl.SFTConfig(**given, **settings, bf16=False, save_strategy="no", disable_tqdm=True)
        kind, more = SharingSFTTrainer, {"processing_class": word_tokenizer()}
    else:
        given = arguments(folder, **settings)
        kind, more = lemo_fx.SequenceParallelTrainer, {"data_collator": padded_at_the_end}
    trainer = kind(model, given, train_dataset=data, eval_dataset=data, **more)
    trainer.train(resume_from_checkpoint=resume)
    logged = {"loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens"}
    history = trainer.state.log_history
    found = {n: torch.tensor([e[n] for e in history if n in e], dtype=torch.float32) for n in logged}
    found["samples a step"] = torch.tensor(trainer.get_total_train_batch_size(given))
    found["evaluated"] = torch.tensor(trainer.evaluate()["eval_loss"])
    return found | {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def the_trainers():
    """transformers' Trainer and TRL's, which wrap the model in DDP."""
    folder = Path(sys.argv[1])
    for name in TRAINERS:
        began = time.perf_counter()
        torch.save(trained(name, folder / "several", dist.group.WORLD), folder / f"{name}{dist.get_rank()}.pt")
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    globals()[sys.argv[2]]()
    dist.destroy_process_group()
