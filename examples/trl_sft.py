"""Supervised fine-tuning on long documents with TRL. Without arguments: the shipped model and documents, on the CPU.

python examples/trl_sft.py --model-folder MODEL --texts FOLDER --tokens 32768
"""

from pathlib import Path

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def main(
    model_folder: Path = SHIPPED / "model",
    texts: Path = SHIPPED / "documents",
    out: Path = Path("runs/trl_sft"),
    tokens: int = 2048,
    steps: int = 10,
) -> None:
    """Fine-tune on the text files of a folder; the adapter in OUT loads without lemo_fx."""
    documents = Dataset.from_dict({"text": [path.read_text() for path in sorted(texts.glob("*.txt"))]})
    model = lemo_fx.transform(AutoModelForCausalLM.from_pretrained(model_folder))  # adapters may come later

    arguments = SFTConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        max_length=tokens,
        packing=True,
        packing_strategy="wrapped",  # cuts documents into windows; the default strategy would drop what is too long
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=documents,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    print(lemo_fx.report(trainer.model))
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
