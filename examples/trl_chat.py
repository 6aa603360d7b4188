"""Chats with TRL, learning only what the assistant says. Without arguments: chats made of the shipped documents.

python examples/trl_chat.py --model-folder MODEL --chats FILE.jsonl --tokens 32768
"""

from pathlib import Path

import torch
import typer
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"
# What stands between the marks of generation is learnt; for many models' templates TRL brings one that has them.
TEMPLATE = SHIPPED / "chat_template.jinja"


def chats_of(documents: Path) -> Dataset:
    """A chat a document: the user gives its beginning, the assistant goes on."""
    texts = [path.read_text() for path in sorted(documents.glob("*.txt"))]
    said = [("Go on: " + text[:600], text[600:1200]) for text in texts]
    chats = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    return Dataset.from_dict({"messages": chats})


def main(
    model_folder: Path = SHIPPED / "model",
    chats: Path | None = None,
    out: Path = Path("runs/trl_chat"),
    tokens: int = 2048,
    steps: int = 10,
) -> None:
    """Fine-tune on a .jsonl file with `messages`; the adapter in OUT loads without lemo_fx."""
    data = chats_of(SHIPPED / "documents") if chats is None else load_dataset("json", data_files=str(chats))["train"]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE.read_text()

    # Few tokens carry a label, and blocks that hold one are always kept.
    model = lemo_fx.transform(AutoModelForCausalLM.from_pretrained(model_folder))
    arguments = SFTConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        max_length=tokens,
        assistant_only_loss=True,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    print(lemo_fx.report(trainer.model))
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
