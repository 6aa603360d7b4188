"""Long-context LoRA on several GPUs: a plain loop with FSDP2. Also runs on CPUs.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx
from lemo_fx import Elimination, LemoConfig

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def main(
    model_folder: Path = SHIPPED / "model",
    texts: Path = SHIPPED / "documents",
    out: Path = Path("runs/fsdp2"),
    tokens: int = 2048,
    steps: int = 10,
) -> None:
    """Fine-tune on the text files of a folder; the adapter in OUT loads on one device, without lemo_fx."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")

    model = AutoModelForCausalLM.from_pretrained(model_folder).to(device)
    torch.manual_seed(0)  # every rank makes the same adapters
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    # The one line, before sharding: planning looks at whole weights.
    exact = Elimination(keep=0.25, eliminated="exact", score="random")
    lemo_fx.transform(model, LemoConfig(attention=exact, mlp=exact))

    # Whole decoder layers are the units: ranks keep different blocks, so a branch runs differently on each.
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "\n\n".join(path.read_text() for path in sorted(texts.glob("*.txt")))
    samples = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].split(tokens)[:-1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        ids = samples[(step * dist.get_world_size() + dist.get_rank()) % len(samples)][None].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)

    # Every rank takes part in gathering, one writes.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print(lemo_fx.report(model))
        model.save_pretrained(out, state_dict=state)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
