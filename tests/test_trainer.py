"""Hugging Face Trainer: checkpointed activations, accumulated gradients, evaluation in the loop, and resuming."""

import pytest
import torch
import transformers
from tiny import tiny, with_lora

import lemo_fx
from lemo_fx import Elimination, LemoConfig


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, 97, (64,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder, score, treatment, resume=False, steps=6, sparse=True, lora=True):
    model = tiny("llama")
    model = with_lora(model, dropout=0.1) if lora else model
    if sparse:
        site = Elimination(keep=0.5, score=score, eliminated=treatment)
        lemo_fx.transform(model, LemoConfig(attention=site, mlp=site, block_size=8, dense_layers=()))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    history = trainer.state.log_history
    return (
        {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
        {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("score", "treatment"), [("measured", "skip"), ("random", "skip"), ("measured", "exact")])
def test_resumed_training_equals_uninterrupted_training(tmp_path, score, treatment):
    losses, evaluations, weights = train(tmp_path, score, treatment)
    assert len(losses) == 6
    assert len(evaluations) == 3
    for folder in tmp_path.glob("checkpoint-*"):
        if folder.name != "checkpoint-3":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    again, evaluations_again, weights_again = train(tmp_path, score, treatment, resume=True)
    assert again == losses
    assert evaluations_again == evaluations
    for name, weight in weights.items():
        assert torch.equal(weights_again[name], weight), name


def test_keeping_everything_trains_as_the_original_does(tmp_path, monkeypatch):
    dense = train(tmp_path / "dense", "random", "skip", steps=2, sparse=False, lora=False)
    monkeypatch.setattr(Elimination, "at_layer", lambda self, name, *_: 1.0 if name == "keep" else None)
    sparse = train(tmp_path / "sparse", "random", "skip", steps=2, lora=False)
    for one, other in zip(dense[:2], sparse[:2], strict=True):
        assert one.keys() == other.keys()
        for number, loss in one.items():
            assert abs(loss - other[number]) < 1e-4
