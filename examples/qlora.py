"""Long-context QLoRA, the base in 4 bits. Without arguments: the shipped model and documents, on the CPU.

python examples/qlora.py --model-folder MODEL --texts FOLDER --tokens 32768
"""

from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import lemo_fx

SHIPPED = Path(lemo_fx.__file__).parent / "demo_assets"


def main(
    model_folder: Path = SHIPPED / "model",
    texts: Path = SHIPPED / "documents",
    out: Path = Path("runs/qlora"),
    tokens: int = 2048,
    steps: int = 10,
) -> None:
    """Fine-tune on the text files of a folder; the adapter in OUT loads without lemo_fx, on a base of any precision."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "\n\n".join(path.read_text() for path in sorted(texts.glob("*.txt")))
    windows = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].split(tokens)[:-1]

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=quantised, dtype=dtype, device_map={"": 0 if gpu else "cpu"}
    )
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    lemo_fx.transform(model)  # the one line: quantised linear layers stay as they are, inside the rewritten ones

    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        bf16=gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not gpu,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in windows]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    print(lemo_fx.report(model))
    model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
