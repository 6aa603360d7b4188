"""Long-context LoRA with the Trainer. Without arguments: the model and documents that ship with lemo_fx, on the CPU.

python examples/trainer.py --model-folder MODEL --texts FOLDER --tokens 32768
"""

from pathlib import Path

import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def main(
    model_folder: Path = SHIPPED / "model",
    texts: Path = SHIPPED / "documents",
    out: Path = Path("runs/trainer"),
    tokens: int = 2048,
    steps: int = 10,
) -> None:
    """Fine-tune on the text files of a folder; the adapter in OUT loads without lemo_fx."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "\n\n".join(path.read_text() for path in sorted(texts.glob("*.txt")))
    windows = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].split(tokens)[:-1]

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    lemo_fx.transform(model)  # the one line

    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    data = [{"input_ids": ids, "labels": ids} for ids in windows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.add_callback(lemo_fx.LemoCallback(trainer))  # kept share and peak memory in every log
    trainer.train()
    print(lemo_fx.report(model))
    model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
