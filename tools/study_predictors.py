"""Train pattern predictors on the small model and measure them: recall, sizes, cost, balance, pictures.

python tools/study_predictors.py profile --corpus corpus --work runs/predictors      # true scores, once (slow part)
python tools/study_predictors.py train --work runs/predictors                        # predictors, tables, pictures
"""

from __future__ import annotations

import argparse
import lzma
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_fx import LemoConfig

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "lemo_fx/demo_assets/model"
LENGTH = 4096
START = 0
"""Token that begins every document in the small model's training."""
KEEP = 0.4


def texts(path: Path, characters: int = -1) -> list[str]:
    with lzma.open(path, "rt") as file:
        return file.read(characters).split("\n\f\n")


def sequences(tokenizer, documents: list[str], count: int, per_document: int, seed: int = 0) -> torch.Tensor:
    """Up to `count` sequences of LENGTH tokens, each within one document and at most `per_document` from each."""
    random.Random(seed).shuffle(documents)
    found: list[list[int]] = []
    for text in documents:
        ids = [START, *tokenizer(text[:80_000], add_special_tokens=False, verbose=False)["input_ids"]]
        starts = list(range(0, len(ids) - LENGTH + 1, LENGTH))[:per_document]
        found += [ids[start : start + LENGTH] for start in starts]
        if len(found) >= count:
            break
    return torch.tensor(found[:count])


def profile(args: argparse.Namespace) -> None:
    from rich.progress import Progress

    from lemo_fx.fit import _key, _profile, _solve
    from lemo_fx.transform import decoder_layers

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = {
        "heldout": sequences(tokenizer, texts(args.corpus / "heldout.txt.xz"), args.heldout, 2),
        "train": sequences(tokenizer, texts(args.corpus / "train.txt.xz", args.characters), args.sequences, 1),
    }
    config = LemoConfig(dense_layers=())
    for name, ids in data.items():
        work = args.work / name
        work.mkdir(parents=True)
        torch.save(ids, args.work / f"{name}.pt")
        print(name, tuple(ids.shape), flush=True)
        batches = list(ids[:, None])
        with Progress(disable=True) as bar:
            probes = _profile(model, batches, decoder_layers(model), config, work, bar)
        _solve(probes, work, _key(model, batches, config, 32, 1e-3), 32, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("profile", "train"))
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"))
    parser.add_argument("--sequences", type=int, default=300)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--characters", type=int, default=-1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"profile": profile}[args.stage](args)


if __name__ == "__main__":
    main()
