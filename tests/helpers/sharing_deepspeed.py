"""Trainers under accelerate's `sp_size`; tests/ecosystem/test_sharing_trainers.py runs them on two CPU ranks.

python tests/helpers/sharing_deepspeed.py FOLDER   (RANK, WORLD_SIZE, DS_ACCELERATOR=cpu and so on set)
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import trl
from sharing_trainers import PADDED, config, documents, make, padded_at_the_end
from sp_size import cut_in_two
from training import word_tokenizer

import lemo_fx

CASES = {
    "Trainer": (transformers.Trainer, {}, 2),
    "SFT": (trl.SFTTrainer, PADDED | {"pad_to_multiple_of": 64}, 0),
}
"""Trainer, settings of it, and stage of ZeRO."""


def with_positions(rows):
    """Rows of tokens as a batch [B, 64], and their positions."""
    padded = padded_at_the_end([{name: torch.tensor(value) for name, value in row.items()} for row in rows])
    return padded | {"position_ids": torch.arange(64).expand(len(rows), -1)}


def trained(name, folder, shared=False):
    """Losses and weights of a run: by one process, or by two under `sp_size`."""
    kind, settings, stage = CASES[name]
    given = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 1, "learning_rate": 0.1}
    given |= {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": []}
    given |= {"disable_tqdm": True, "seed": 1, "bf16": False, "gradient_checkpointing": True, "optim": "sgd"}
    given |= {"max_grad_norm": 0, "train_sampling_strategy": "sequential"}
    if shared:
        given |= cut_in_two(stage)
        # With and without lemo_fx, transformers adds up the losses' gradients of all ranks, and DeepSpeed those too.
        given["learning_rate"] /= 2
    else:
        given["use_cpu"] = True
    if kind is trl.SFTTrainer:
        arguments, more = trl.SFTConfig(**given, **settings), {"processing_class": word_tokenizer()}
    else:
        arguments, more = transformers.TrainingArguments(**given, **settings), {"data_collator": with_positions}
    if shared:
        # accelerate takes a process with DeepSpeed and no GPU for one that is alone.
        state = arguments.distributed_state
        state.num_processes, state.process_index, state.local_process_index = 2, dist.get_rank(), dist.get_rank()
    model = lemo_fx.transform(
        make(), config(0.5, sequence_parts=2), sequence_group=dist.group.WORLD if shared else None
    )
    data = documents()
    trainer = kind(model, arguments, train_dataset=data, eval_dataset=data, **more)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses)} | weights


if __name__ == "__main__":
    import deepspeed

    # Nothing is compiled for the CPU.
    deepspeed.ops.__compatible_ops__.clear()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.save(trained(sys.argv[2], folder / "several", shared=True), folder / f"{sys.argv[2]}{os.environ['RANK']}.pt")
