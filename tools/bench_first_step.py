"""Where the first step's time goes: what is compiled, and what a second process finds in torch's caches on disk.

    python tools/bench_first_step.py benchmarks/bench/config-llama3-8b.json --plan balanced --out first-step.json
    python tools/bench_first_step.py benchmarks/bench/config-llama3-8b.json --plan balanced --out first-step.json

The second call is the second process: it adds its run to the file. Random weights, a few layers: all layers but the
first and the last share a compiled graph, so that more of them cost their own time alone. TORCHINDUCTOR_CACHE_DIR says
where the caches are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_model import wait
from torch._dynamo.utils import compilation_time_metrics, counters

import lemo_fx
from lemo_fx.cli.load import from_config, read_config
from lemo_fx.cli.machine import environment
from lemo_fx.cli.trainer import adapted
from lemo_fx.config import LemoConfig
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.measure import device_name

LONGEST = 25
"""Phases of the compiler that are written down, the longest first; they hold one another."""


def step(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward, and of the whole step without an optimizer."""
    began = time.perf_counter()
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    wait(ids.device)
    forward = time.perf_counter() - began
    loss.backward()
    wait(ids.device)
    model.zero_grad()
    return round(forward, 2), round(time.perf_counter() - began, 2)


def main(
    config: Annotated[Path, typer.Argument(help="config.json of the shapes")],
    out: Annotated[Path, typer.Option(help="JSON to which the run is added")],
    plan: Annotated[str, typer.Option(help="a preset; dense is LoRA with the loss in segments")] = "balanced",
    layers: Annotated[int, typer.Option(help="decoder layers")] = 6,
    tokens: Annotated[int, typer.Option(help="of the one sequence")] = 32768,
    rank: Annotated[int, typer.Option(help="of adapters on every linear layer")] = 8,
) -> None:
    """Make three steps and add what they took, and what was compiled, to a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = read_config(config)
    shapes.num_hidden_layers = layers
    torch.manual_seed(0)
    with device:
        model = adapted(from_config(config, shapes, dtype=torch.bfloat16), rank, "all-linear").train()
    began = time.perf_counter()
    lemo_fx.transform(model, LemoConfig.preset(plan))
    transform = time.perf_counter() - began
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _, layer in decoder_layers(model):
        layer.compile()
    ids = torch.randint(0, shapes.vocab_size, (1, tokens), device=device)
    steps = [step(model, ids) for _ in range(3)]
    phases = sorted(((sum(took), len(took), name) for name, took in compilation_time_metrics.items()), reverse=True)
    run = {
        "plan": plan,
        "layers": layers,
        "tokens": tokens,
        "transform_seconds": round(transform, 2),
        "steps": [{"forward_seconds": forward, "seconds": whole} for forward, whole in steps],
        "graphs": counters["stats"]["unique_graphs"],
        "counts": {kind: dict(counters[kind]) for kind in ("inductor", "aot_autograd")},
        "phases": {name: {"calls": calls, "seconds": round(took, 2)} for took, calls, name in phases[:LONGEST]},
    }
    found = json.loads(out.read_text()) if out.exists() else {"runs": []}
    found["environment"] = environment(
        f"python tools/bench_first_step.py {config} --plan {plan} --layers {layers} --tokens {tokens} --out {out}"
    ) | {"device": device_name(device)}
    found["runs"].append(run)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{plan}: first step {steps[0][1]} s, then {steps[-1][1]} s; {run['graphs']} graphs")


if __name__ == "__main__":
    typer.run(main)
