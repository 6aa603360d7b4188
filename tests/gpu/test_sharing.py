"""Two GPUs that share sequences under accelerate's `sp_size`: steps are those of one process.

python -m pytest -m gpu tests/gpu/test_sharing.py   (two GPUs, DeepSpeed)
The test starts this file by torchrun.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not find_spec("deepspeed"), reason="needs DeepSpeed"),
]


@pytest.mark.parametrize("case", CASES)
def test_two_gpus_train_as_one_process(case, tmp_path):
    """ZeRO stage 2, padded batches: losses of six steps, and in float32 every weight after them."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        case,
        str(tmp_path),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-4000:]
    expected = trained(case, tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for found in ranks:
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=CASES[case][2], atol=0)
        assert found["losses"][0] > 1.02 * found["losses"][-1]  # Nothing is compared where nothing is learned.
        for name, value in expected.items() if case == "float32" else ():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


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
        from accelerate import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        given["parallelism_config"] = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler)
        given["bf16"] = dtype == torch.bfloat16
        auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
        given["deepspeed"] = dict.fromkeys(auto, "auto") | {
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        # With and without lemo_fx, transformers adds up the losses' gradients of all ranks, and DeepSpeed those too.
        given["learning_rate"] /= 2
    arguments = transformers.TrainingArguments(**given)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 256}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": TOKENS}
    if not shared:
        arguments._n_gpu = 1  # Else the Trainer shares the batch out to all GPUs.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(dtype)
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
