"""The longest sequence that trains on one GPU: a LoRA training step per length, growing until memory or time runs out.

Before each probe its time is estimated from its FLOPs and the rate of the probe before; what would not fit the budget
is not begun. Where the budget allows a second step, that one is timed; else the first, which also compiles. Weights are
random: memory does not depend on them.

    python tools/find_longest.py --tokens 131072,262144,524288 --seconds 300 --variants skip-0.125-shared-offload
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))
import plans
from bench_model import Variant, attempt, build, environment, gate

FIRST_RATE = 500e12
"""FLOP/s assumed for the first probe."""
COMPILING = 30.0
"""Seconds of the first step that are not computing."""


def step_flops(config, variant: Variant, tokens: int) -> float:
    """FLOPs of a checkpointed LoRA step: 3 units per matrix (forward, recompute, input gradient), 4.5 for attention."""
    width = config.hidden_size
    head_dim = width // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", config.num_attention_heads) * head_dim
    gated = hasattr(config, "intermediate_size")
    inner = config.intermediate_size if gated else config.ffn_dim
    matrices = 2 * (2 * width * width + 2 * width * keys + (3 if gated else 2) * width * inner)
    attention = 2 * tokens * tokens * width  # causal half of 4 S^2 H
    dense = 3 * matrices * tokens + 4.5 * attention
    head = 2 * 2 * width * config.vocab_size * tokens
    site = variant.config.attention if variant.config is not None else None
    if site is None:
        return config.num_hidden_layers * dense + head
    kept = 3 * matrices * tokens * site.keep + 4.5 * attention * site.keep**2
    if site.eliminated == "exact":
        kept += matrices * tokens + attention
    return 2 * dense + (config.num_hidden_layers - 2) * kept + head


def main(
    shape: str = "llama3-8b",
    tokens: Annotated[str, typer.Option(help="lengths to try, ascending")] = "131072,262144,524288",
    variants: Annotated[str, typer.Option(help="as in bench_model")] = "lora-checkpointed,skip-0.125-shared-offload",
    seconds: Annotated[
        float, typer.Option(help="budget of each variant; no probe that would exceed it is begun")
    ] = 200,
    adapters: str = "float32",
    out: Path = Path("benchmarks/longest"),
) -> None:
    """Try each variant at growing lengths; the result is written after every probe."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = plans.each(variants, Variant.named)
    out.mkdir(parents=True, exist_ok=True)
    gated = gate(shape, device, adapters, chosen)
    result = {"environment": environment(device), "shape": shape, "gate": gated, "probes": []}
    if device.type == "cuda":
        result["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    model = build(shape, device, adapters)

    def note(probe: dict) -> None:
        result["probes"].append(probe)
        print(json.dumps(probe), flush=True)
        (out / f"{shape}.json").write_text(json.dumps(result, indent=1))

    for variant in chosen:
        began, rate = time.perf_counter(), FIRST_RATE
        for length in map(int, tokens.split(",")):
            flops = step_flops(model.config, variant, length)
            left = seconds - (time.perf_counter() - began)
            wanted = flops / rate + COMPILING
            plan = {"tflop": round(flops / 1e12), "estimated_s": round(wanted, 1)}
            if wanted > left:
                note({"variant": variant.name, "tokens": length, **plan, "skipped": f"{left:.0f} s are left"})
                break
            second = wanted + flops / rate <= left
            run = attempt(model, variant, length, 1, device, None, 1e9, int(second))
            note({**run, **plan, "includes_compiling": not second})
            if "step_ms" not in run:
                break
            rate = flops / (run["step_ms"] / 1e3)


if __name__ == "__main__":
    typer.run(main)
