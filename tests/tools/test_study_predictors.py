"""tools/study_predictors.py on a base model of its own, from the corpus to the tables."""

import json
import lzma
import sys

import pytest
import study_predictors
import torch
from tiny import tiny
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of four layers whose tokenizer begins documents with a token of its own, and a corpus."""
    folder = tmp_path_factory.mktemp("study")
    tokenizer = AutoTokenizer.from_pretrained(study_predictors.MODEL)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.save_pretrained(folder / "base")
    tiny("llama", layers=4, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "base")
    documents = study_predictors.MODEL.parent / "documents"
    for name in ("train", "heldout"):
        texts = [path.read_text() for path in sorted(documents.glob(f"{name}_*.txt"))]
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress("\n\f\n".join(texts).encode()))
    return folder


def run(monkeypatch, folder, stage, *options):
    """A stage's JSON."""
    places = {"model": "base", "corpus": "", "work": "work", "out": "out", "docs": "docs"}
    given = [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]
    monkeypatch.setattr(sys, "argv", ["study_predictors.py", stage, *given, "--seeds", "2", *options])
    study_predictors.main()
    name = folder / "out" / f"{stage}.json"
    return json.loads(name.read_text()) if name.exists() else None


@pytest.mark.slow
def test_every_stage(folder, monkeypatch):
    run(monkeypatch, folder, "profile", "--sequences", "5", "--heldout", "4")
    ids = torch.load(folder / "work" / "train.pt")
    begin = AutoTokenizer.from_pretrained(folder / "base").bos_token_id
    assert ids.shape == (5, 512)
    assert begin != 0
    assert (ids[:, 0] == begin).all()

    run(monkeypatch, folder, "train", "--compare", "1.attention")
    recall = json.loads((folder / "out" / "recall.json").read_text())
    assert set(recall["losses"]["1.attention"]) == {"regression", "log", "kl"}
    assert len(recall["sites"]) == 8
    assert (recall["tokens_per_sequence"], recall["train_sequences"]) == (512, 5)
    for name, site in recall["sites"].items():
        assert 0.5 <= site["recall"][0] <= 1  # the first and the last block are two of the four that stay
        assert site["parameters"][1] < site["parameters"][0], name
    for kind, found in recall["summary"].items():
        least = min(site["recall"][0] for name, site in recall["sites"].items() if name.endswith(kind))
        assert found["least_layer"][1] == least
    assert 0 < recall["flops"]["share"] < 0.5
    assert {"date", "command", "device", "torch"} <= set(recall["environment"])
    assert {path.name for path in (folder / "docs").iterdir()} == {"tables.md", "loss_curves.png", "prediction.png"}


def test_a_profile_of_another_model_is_refused(folder, monkeypatch, tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps({"model": "another"}))
    with pytest.raises(SystemExit, match="another model"):
        run(monkeypatch, folder, "train", "--work", str(tmp_path))


def test_cost(folder, monkeypatch):
    found = run(monkeypatch, folder, "cost", "--shape", "tiny", "--tokens", "512", "--backend", "eager")
    assert found["sparse_layers"] == 2
    # Three matrices of each network read every token, or every block, of 64 hidden channels.
    for kind, width, networks in (("attention", 4, 2), ("mlp", 4, 1)):
        assert found["per_site"][kind]["flops"] >= 2 * 512 * networks * (64 * width + width * width)
        assert found["per_step"]["eager_ms"] >= found["per_site"][kind]["eager_ms"] > 0
        assert found["per_site"][kind]["compiled_ms"] > 0
