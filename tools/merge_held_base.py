"""What an adapter that was trained on a base held in float8 loses where it is merged into the base as it was loaded.

One line of JSON: the mean loss of held-out text under the base, held in float8 and as loaded, each without the adapter
and with it, and with it merged. An adapter that is trained on the base as loaded, by the same plan and on the same
tokens, stands beside it.

    python tools/merge_held_base.py base results.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_model import environment
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx
from lemo_fx import LemoConfig

DOCUMENTS = resources.files("lemo_fx") / "demo_assets" / "documents"


def windows(base: str, kind: str, length: int, count: int) -> torch.Tensor:
    """Token ids [count, length] from evenly spread places of the bundled documents of a kind."""
    texts = sorted(DOCUMENTS.iterdir(), key=lambda path: path.name)
    text = "\n\n".join(path.read_text() for path in texts if path.name.startswith(kind))
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.stack([ids[start : start + length] for start in starts[order]])


def loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean loss a token."""
    model.eval()
    with torch.no_grad():
        return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in rows) / len(rows)


def loaded(base: str, device: torch.device) -> torch.nn.Module:
    """The base in bfloat16; on the CPU the same numbers in float32, which is faster there."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
    return model.float() if device.type == "cpu" else model


def trained(base: str, plan: LemoConfig, rows: torch.Tensor, rate: float) -> torch.nn.Module:
    """A transformed model with an adapter on every linear layer, the same for every plan, after one step a row."""
    torch.manual_seed(0)
    model = loaded(base, rows.device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    lemo_fx.transform(model, plan)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    for number, row in enumerate(rows):
        print(f"step {number}, {time.strftime('%X')}", file=sys.stderr)
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def measure(base: str, plan: LemoConfig, rows: torch.Tensor, heldout: torch.Tensor, rate: float) -> dict[str, float]:
    """Losses of held-out text under one base, by what it is computed with."""
    model = trained(base, plan, rows, rate)
    found = {"with_adapter": loss(model, heldout)}
    with model.disable_adapter():
        found["without"] = loss(model, heldout)
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    plain = get_peft_model(loaded(base, rows.device), model.peft_config["default"])
    plain.load_state_dict(adapter, strict=False)
    found["on_the_base_as_loaded"] = loss(plain, heldout)
    dtype = plain.dtype
    # As it is saved.
    merged = plain.merge_and_unload().bfloat16().to(dtype)
    found["merged"] = loss(merged, heldout)
    return found


def main(
    base: str,
    out: Path,
    preset: Annotated[str, typer.Option(help="Plan to train by.")] = "balanced",
    length: int = 1024,
    steps: int = 40,
    heldout: Annotated[int, typer.Option(help="Windows of held-out text.")] = 16,
    rate: float = 2e-4,
    device: str = "cpu",
) -> None:
    """Train on both bases, merge, and append what is found to a file."""
    rows, other = (windows(base, kind, length, n).to(device) for kind, n in (("train", steps), ("heldout", heldout)))
    start = time.time()
    losses = {
        held: measure(base, LemoConfig.preset(preset, base=held), rows, other, rate)  # type: ignore[arg-type]
        for held in ("float8", "model")
    }
    row = {"preset": preset, "length": length, "steps": steps, "heldout": heldout, "rate": rate, "losses": losses}
    row |= {"seconds": round(time.time() - start), "environment": environment(torch.device(device), "trained")}
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    typer.run(main)
