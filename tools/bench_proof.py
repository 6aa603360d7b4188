"""How long `transform` takes on a model of random weights, and how much of it the proof is.

`python tools/bench_proof.py benchmarks/bench/config-llama3-8b.json --out proof.json`
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_model import wait
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import lemo_fx
from lemo_fx.cli.machine import environment
from lemo_fx.cli.trainer import adapted
from lemo_fx.config import PRESETS
from lemo_fx.measure import device_name
from lemo_fx.planning import proof, proof_of_head


def main(
    config: Annotated[Path, typer.Argument(help="The config.json of a model.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    rank: Annotated[int, typer.Option(help="Of the LoRA adapters.")] = 8,
) -> None:
    """Transform with each preset, each layer's proof made anew, then once more with all proofs known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    set_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=dtype)
    model = adapted(model, rank, "all-linear").train()
    lemo_fx.transform(model)  # The first use of the device and of its libraries.
    seconds: dict[str, dict[str, float]] = {}
    for name, plan in PRESETS.items():
        proof._known.clear()
        proof_of_head._known.clear()
        seconds[name] = {}
        for kind in ("proven anew", "proven before"):
            lemo_fx.revert(model)
            wait(device)
            start = time.perf_counter()
            lemo_fx.transform(model, plan)
            wait(device)
            seconds[name][kind] = round(time.perf_counter() - start, 3)
    result: dict[str, Any] = {
        "device": device_name(device),
        "seconds": seconds,
        "environment": environment(" ".join(["python", *sys.argv])),
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
