"""Long-context LoRA in a plain loop, compiled layer by layer, with activation checkpointing.

python examples/loop.py --model-folder MODEL --texts FOLDER --tokens 32768
Without arguments: the model and documents that ship with lemo_fx, on the CPU.
"""

from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def main(
    model_folder: Path = SHIPPED / "model",
    texts: Path = SHIPPED / "documents",
    out: Path = Path("runs/loop"),
    tokens: int = 2048,
    steps: int = 10,
    backend: str = "inductor",
) -> None:
    """Fine-tune on the text files of a folder; the adapter in OUT loads without lemo_fx."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder).to(device)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    model.gradient_checkpointing_enable()
    lemo_fx.transform(model)  # before compiling: what is compiled is the rewritten layer

    # Layers, not the whole model: in a whole-model compile transformers builds a tokens x tokens mask.
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "\n\n".join(path.read_text() for path in sorted(texts.glob("*.txt")))
    windows = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].split(tokens)[:-1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(steps):
        ids = windows[step % len(windows)][None].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)

    print(lemo_fx.report(model))
    model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
