"""Preference training (DPO) with TRL. Without arguments: pairs made of the shipped documents, on the CPU.

python examples/trl_dpo.py --model-folder MODEL --pairs FILE.jsonl --tokens 16384
"""

from pathlib import Path

import torch
import typer
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def pairs_of(documents: Path) -> Dataset:
    """A document's own continuation is preferred to that of another one."""
    texts = [path.read_text() for path in sorted(documents.glob("*.txt"))]
    ends = [text.index("\n", 600) for text in texts]
    goes_on = [text[end : end + 400] for text, end in zip(texts, ends, strict=True)]
    prompts = [text[:end] for text, end in zip(texts, ends, strict=True)]
    return Dataset.from_dict({"prompt": prompts, "chosen": goes_on, "rejected": goes_on[1:] + goes_on[:1]})


def main(
    model_folder: Path = SHIPPED / "model",
    pairs: Path | None = None,
    out: Path = Path("runs/trl_dpo"),
    tokens: int = 2048,
    steps: int = 10,
) -> None:
    """Train on a .jsonl file with `prompt`, `chosen` and `rejected`; the adapter in OUT loads without lemo_fx."""
    data = pairs_of(SHIPPED / "documents") if pairs is None else load_dataset("json", data_files=str(pairs))["train"]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    # "exact", the default: every token's forward is the original's, and so are the log-probabilities that are compared,
    # those of the reference (the same model with its adapter off) included.
    lemo_fx.transform(model)
    arguments = DPOConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        max_length=tokens,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(model_folder)
    )
    trainer.train()
    print(lemo_fx.report(model))
    model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
