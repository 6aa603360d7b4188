"""TRL's SFTTrainer, which replaces the model's forward on the instance: its own chunked loss, packing, masks."""

import pytest
import torch
from tiny import TOLERANCE, VOCABULARY, Recorder, tiny, with_lora
from training import losses, plan, word_tokenizer

import lemo_fx

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}w3 {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} w4{% endgeneration %}{% else %}{{ m['content'] }} w5{% endif %} {% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(chat_template=TEMPLATE)


def words(count, seed):
    ids = torch.randint(6, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids)


def texts():
    return datasets.Dataset.from_list([{"text": words(40 + 8 * (i % 3), i)} for i in range(16)])


def chats():
    """A long question and a short answer."""
    turns = [(("user", words(50, i)), ("assistant", words(5, 99 + i))) for i in range(16)]
    return datasets.Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns])


def run(model, tokenizer, folder, data, config=None, late=False, **settings):
    if config is not None and not late:
        lemo_fx.transform(model, config)
    given = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
    given |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    given |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = trl.SFTTrainer(model, trl.SFTConfig(**(given | settings)), train_dataset=data, processing_class=tokenizer)
    if config is not None and late:
        lemo_fx.transform(trainer.model, config)
    trainer.train()
    return trainer


CASES = {
    "chunked": (texts, {}),
    "label_smoothing": (texts, {"label_smoothing_factor": 0.1}),
    "dft": (texts, {"loss_type": "dft"}),
    "accumulated": (texts, {"gradient_accumulation_steps": 2}),
    "packed": (texts, {"packing": True, "max_length": 64}),
    "wrapped": (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 64}),
    "assistant_only": (chats, {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses(case, tokenizer, tmp_path):
    make, settings = CASES[case]
    late = case in ("packed", "dft")
    original = run(with_lora(tiny("llama")), tokenizer, tmp_path, make(), **settings)
    complete = run(
        with_lora(tiny("llama")), tokenizer, tmp_path, make(), plan(keep=1.0, score="random"), late, **settings
    )
    assert losses(complete) == pytest.approx(losses(original), rel=TOLERANCE["compiled"]["rtol"])
    half = run(with_lora(tiny("llama")), tokenizer, tmp_path, make(), plan(), late, **settings)
    shares = {site.kept_share for site in lemo_fx.report(half.model).sites}
    assert all(0.4 < share < 0.65 for share in shares)
    assert losses(half) != losses(complete)
    assert list(losses(half)) == [1, 2, 3]
    # TRL's forward stays on the model and goes on working without us.
    model, ids = half.model.eval(), torch.arange(40)[None] + 5
    before = model(input_ids=ids).logits
    assert torch.equal(lemo_fx.revert(model)(input_ids=ids).logits, before)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_few_labelled_tokens_survive(lora, late, tokenizer, tmp_path):
    model = with_lora(tiny("llama")) if lora else tiny("llama")
    trainer = run(
        model, tokenizer, tmp_path, chats(), plan(score="random"), late, assistant_only_loss=True, max_steps=1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with Recorder(trainer.model) as seen:
        trainer.compute_loss(trainer.model, batch)
    assert len(seen.tokens) == 4
    for tokens in seen.tokens.values():
        for row, labels in zip(tokens[0], batch["labels"], strict=True):
            assert set((labels != -100).nonzero().flatten().tolist()) <= set(row.tolist())
