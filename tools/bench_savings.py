"""Bytes saved for the backward and FLOPs of one step, original against rewritten: exact counts, no clock, no GPU.

An 8-layer Llama with LoRA, 2,048 tokens, no dense layer, random scores (so that choosing costs nothing).

    python tools/bench_savings.py --out benchmarks/savings.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from bench_model import environment

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.measure import counts

PLANS = {
    "skip, keep 0.5": (Elimination(keep=0.5, score="random"), 1.9, 1.9),
    "exact, keep 0.25": (Elimination(keep=0.25, eliminated="exact", score="random"), 2.2, 1.3),
}
"""Elimination at both sites, and the least times fewer bytes and FLOPs that are expected of it."""


def main(
    tokens: int = 2048,
    hidden: int = 256,
    vocabulary: int = 2048,
    out: Annotated[Path | None, typer.Option(help="file for the JSON")] = None,
) -> None:
    """Count, print a table, and fail if a ratio is below what is expected."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        use_cache=False,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).train()
    ids = torch.randint(0, vocabulary, (1, tokens))

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    plain_bytes, plain_flops = counts(step, model)
    runs = {"original": {"saved_bytes": plain_bytes, "flops": plain_flops}}
    table = Table("", "bytes saved", "times fewer", "FLOPs", "times fewer", title=f"one step at {tokens} tokens")
    table.add_row("original", f"{plain_bytes / 1e6:.0f} MB", "", f"{plain_flops / 1e9:.0f} G", "")
    short = []
    for name, (site, fewer_bytes, fewer_flops) in PLANS.items():
        lemo_fx.transform(model, LemoConfig(attention=site, mlp=site, dense_layers=()))
        kept, operations = counts(step, model)
        ratios = (plain_bytes / kept, plain_flops / operations)
        runs[name] = {"saved_bytes": kept, "flops": operations, "bytes_ratio": ratios[0], "flops_ratio": ratios[1]}
        table.add_row(
            name, f"{kept / 1e6:.0f} MB", f"{ratios[0]:.2f}x (goal {fewer_bytes}x)",
            f"{operations / 1e9:.0f} G", f"{ratios[1]:.2f}x (goal {fewer_flops}x)",
        )  # fmt: skip
        if ratios[0] < fewer_bytes or ratios[1] < fewer_flops:
            short.append(name)
    Console().print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": environment(torch.device("cpu")), "runs": runs}, indent=1) + "\n")
    if short:
        sys.exit(f"below the goal: {', '.join(short)}")


if __name__ == "__main__":
    typer.run(main)
