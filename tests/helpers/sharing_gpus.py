"""The Trainer under accelerate's `sp_size` on two GPUs; tests/gpu/test_sharing.py runs it on both, and on one alone.

python tests/helpers/sharing_gpus.py CASE FOLDER   (RANK, WORLD_SIZE and so on set as torchrun does)
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from sp_size import cut_in_two

import lemo_fx
from lemo_fx import Elimination, LemoConfig

TOKENS = 2048
FLOAT8 = {"forward": "float8", "backward": "float8"}
CASES = {
    "float32": (torch.float32, {}, 1e-4),
    "bfloat16": (torch.bfloat16, {}, 1e-2),
    "float8": (torch.bfloat16, FLOAT8, 2e-2),
}
"""Dtype of the model, settings of the plan, and how far losses may differ, relatively."""


class Rows(torch.utils.data.Dataset):
    """Counting, so that there is something to learn; every second row ends early."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(TOKENS) * (index % 3 + 1) + index) % 256
        counted = torch.arange(TOKENS) < TOKENS - 300 * (index % 2)
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(~counted, -100),
            "attention_mask": counted.long(),
            "position_ids": torch.arange(TOKENS),
        }


def trained(case, folder, shared=False):
    """Losses and weights of six steps: by one process, or by two under `sp_size`."""
    dtype, settings, _ = CASES[case]
    given = {"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.05}
    given |= {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": []}
    given |= {"disable_tqdm": True, "seed": 1, "gradient_checkpointing": True, "optim": "sgd", "max_grad_norm": 0}
    given["train_sampling_strategy"] = "sequential"
    if shared:
        given |= cut_in_two(2, dtype == torch.bfloat16)
        # With and without lemo_fx, transformers adds up the losses' gradients of all ranks, and DeepSpeed those too.
        given["learning_rate"] /= 2
    arguments = transformers.TrainingArguments(**given)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 256}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": TOKENS}
    if not shared:
        arguments._n_gpu = 1  # Else the Trainer shares the batch out to all GPUs.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(dtype)
    # A step's choice is a hash of its embeddings' bits, which two GPUs train to other last bits than one.
    model.get_input_embeddings().requires_grad_(False)
    site = Elimination(0.5, eliminated="exact", score="step")
    plan = LemoConfig(site, site, sequence_parts=2, **settings)
    lemo_fx.transform(model, plan, sequence_group=dist.group.WORLD if shared else None)
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    return {"losses": torch.tensor(losses)} | weights


if __name__ == "__main__":
    torch.save(
        trained(sys.argv[1], Path(sys.argv[2]) / "several", shared=True), Path(sys.argv[2]) / f"{dist.get_rank()}.pt"
    )
