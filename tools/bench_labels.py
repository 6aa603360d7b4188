"""What the head and the loss of a step cost where few tokens have labels: one GPU, the models of tools/bench_model.py.

    python tools/bench_labels.py --out benchmarks/model/llama3-8b-32k-few-labels.json

Whole steps without an optimizer, on the host's clock; the labels are those of a sequence's last tokens.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_model import Variant, build, environment, prepare, wait

STEPS, WARM_UP = 6, 2


def main(
    out: Annotated[Path, typer.Option(help="file for the figures")],
    shape: Annotated[str, typer.Option(help="as of bench_model.py")] = "llama3-8b",
    tokens: Annotated[int, typer.Option(help="of a sequence")] = 32768,
    shares: Annotated[str, typer.Option(help="of the tokens that have labels, comma-separated")] = "1.0,0.5,0.05",
    variants: Annotated[
        str, typer.Option(help="as of bench_model.py")
    ] = "step-0.5-slope-0.6-both-float8-checkpointed,lora-checkpointed",
) -> None:
    """Time steps of each variant at each share of labels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs: list[dict[str, Any]] = []
    for name in variants.split(","):
        model = build(shape, device, "float32")
        prepare(model, Variant.named(name))
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
        for share in map(float, shares.split(",")):
            labels = ids.clone()
            labels[:, : int(tokens * (1 - share))] = -100
            times = [_step(model, ids, labels) for _ in range(STEPS)]
            row = {"variant": name, "tokens": tokens, "labelled": share}
            row |= {"step_ms": round(statistics.median(times[WARM_UP:]), 1), "steps_ms": times}
            if device.type == "cuda":
                row["peak_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            runs.append(row)
            print(json.dumps(row), flush=True)
            found = {"environment": environment(device), "shape": shape, "adapters": "float32", "runs": runs}
            out.write_text(json.dumps(found, indent=1) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _step(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Milliseconds of one forward and backward."""
    wait(ids.device)
    began = time.perf_counter()
    model(input_ids=ids, labels=labels).loss.backward()
    model.zero_grad()
    wait(ids.device)
    return round(1e3 * (time.perf_counter() - began), 1)


if __name__ == "__main__":
    typer.run(main)
