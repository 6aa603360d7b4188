"""One sequence over several GPUs, a part on each: a plain loop. Also runs on CPUs.

torchrun --nproc-per-node 2 examples/sequence.py --tokens 4096
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def main(
    model_folder: Path = SHIPPED / "model",
    texts: Path = SHIPPED / "documents",
    out: Path = Path("runs/sequence"),
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

    lemo_fx.transform(model, sequence_group=dist.group.WORLD)

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "\n\n".join(path.read_text() for path in sorted(texts.glob("*.txt")))
    samples = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].split(tokens)[:-1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(steps):
        ids = samples[step % len(samples)][None].to(device)  # the same on every rank
        loss = model(input_ids=ids, labels=ids).loss  # of the whole sequence
        loss.backward()
        for parameter in trained:  # as DDP or FSDP2 would
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)

    if dist.get_rank() == 0:
        print(lemo_fx.report(model))
        model.save_pretrained(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
