"""Each kernel against its naive form, and against the copy bandwidth or matrix rate measured in the same run.

The naive form of elimination and restoration is what the LeMo paper compares with: a boolean mask to select, a padded
copy, and a separate residual add. Bytes are the fewest that must move: each input read once, each output written once.
Each is measured against a plain copy of as many bytes, and against the bandwidth of copying 2 GB.

    python tools/bench_kernels.py --out benchmarks/kernels
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent))
from bench_model import environment

from lemo_fx.kernels.block_scores.op import block_scores
from lemo_fx.kernels.eliminate.op import eliminate, scatter_rows
from lemo_fx.kernels.restore.op import restore
from lemo_fx.kernels.segmented_cross_entropy.op import segmented_cross_entropy


def milliseconds(run: Callable[[], object], captured: bool = True) -> float:
    """Median of do_bench, in ms; `captured` in a CUDA graph, the host's time counts for nothing."""
    if captured:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return float(do_bench(run, warmup=20, rep=100, return_mode="median"))


def ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s (read + written) and bf16 matrix rate in TFLOP/s, on random data."""
    big = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    copy = milliseconds(big.clone)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {"copy_gb_s": round(2 * big.nbytes / copy / 1e6, 1), "bf16_tflop_s": round(2 * 8192**3 / product / 1e9, 1)}


def naive_eliminate(stream: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Select with a boolean mask."""
    return stream[kept].view(stream.shape[0], -1, stream.shape[2])


def naive_restore(stream: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Pad the branch's output back to full length, then add the residual."""
    padded = torch.zeros_like(stream)
    padded[kept] = rows.flatten(0, 1)
    return stream + padded


def naive_scores(query: torch.Tensor, key: torch.Tensor, scaling: float, block: int) -> torch.Tensor:
    """The whole S x S matrix, head by head."""
    length = query.shape[2]
    total = torch.zeros(length, length, device=query.device)
    group = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        total += (query[0, head] @ key[0, head // group].T).float().mul_(scaling).relu_()
    total.div_(query.shape[1]).tril_()
    return total.unflatten(0, (-1, block)).unflatten(2, (-1, block)).amax((1, 3)).sum(0)


def main(
    tokens: Annotated[str, typer.Option(help="sequence lengths, comma-separated")] = "4096,8192,16384,32768,65536",
    width: int = 4096,
    keep: float = 0.5,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/kernels"),
) -> None:
    """Measure on the first CUDA device, bf16, batch 1, blocks of 64."""
    result = {"environment": environment(torch.device("cuda")), "ceilings": ceilings(), "runs": []}
    print(result["ceilings"], flush=True)

    def row(name: str, length: int, ours: float, naive: float | None, gigabytes: float | None, **more) -> None:
        run = {"kernel": name, "tokens": length, "ms": round(ours, 4), **more}
        if naive is not None:
            run |= {"naive_ms": round(naive, 4), "times_faster": round(naive / ours, 2)}
        if gigabytes is not None:
            rate = gigabytes / ours * 1e3
            copy = milliseconds(torch.empty(int(gigabytes / 2 * 1e9), device="cuda", dtype=torch.uint8).clone)
            run |= {
                "gb_s": round(rate, 1),
                "share_of_copy": round(rate / result["ceilings"]["copy_gb_s"], 3),
                "same_size_copy_ms": round(copy, 4),
                "share_of_same_size_copy": round(copy / ours, 3),
            }
        result["runs"].append(run)
        print(json.dumps(run), flush=True)

    for length in map(int, tokens.split(",")):
        stream = torch.randn(1, length, width, device="cuda", dtype=torch.bfloat16)
        blocks = torch.randperm(length // 64, device="cuda")[: int(keep * length // 64)].sort().values
        chosen = (blocks[:, None] * 64 + torch.arange(64, device="cuda")).flatten()[None]
        kept = torch.zeros(1, length, dtype=torch.bool, device="cuda").scatter_(1, chosen, True)
        rows = torch.randn(1, chosen.shape[1], width, device="cuda", dtype=torch.bfloat16)
        small, full = rows.nbytes / 1e9, stream.nbytes / 1e9
        row(
            "eliminate", length, milliseconds(lambda s=stream, c=chosen: eliminate(s, c)),
            milliseconds(lambda s=stream, k=kept: naive_eliminate(s, k), False), 2 * small,
        )  # fmt: skip
        row(
            "restore", length, milliseconds(lambda s=stream, r=rows, c=chosen: restore(s, r, c)),
            milliseconds(lambda s=stream, r=rows, k=kept: naive_restore(s, r, k), False), 2 * full + small,
        )  # fmt: skip
        row(
            "eliminate and restore", length,
            milliseconds(lambda s=stream, c=chosen: restore(s, eliminate(s, c), c)),
            milliseconds(lambda s=stream, k=kept: naive_restore(s, naive_eliminate(s, k), k), False),
            2 * full + 3 * small,
        )  # fmt: skip
        row(
            "scatter_rows (backward)", length,
            milliseconds(lambda r=rows, c=chosen, n=length: scatter_rows(r, c, n)), None, full + small,
        )  # fmt: skip
        query = torch.randn(1, length, 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        key = torch.randn(1, length, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        naive = milliseconds(lambda q=query, k=key: naive_scores(q, k, 128**-0.5, 64)) if length <= 16384 else None
        ours = milliseconds(lambda q=query, k=key: block_scores(q, k, None, None, 128**-0.5, 64))
        rate = length**2 / 2 * 32 * 128 * 2 / ours / 1e9
        share = round(rate / result["ceilings"]["bf16_tflop_s"], 3)
        row("block_scores", length, ours, naive, None, tflop_s=round(rate, 1), share_of_matrix_rate=share)
    hidden = torch.randn(8192, width, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(128256, width, device="cuda", dtype=torch.bfloat16) / 64
    labels = torch.randint(0, 128256, (8192,), device="cuda")

    def naive_loss() -> None:
        h = hidden.detach().requires_grad_()
        torch.nn.functional.cross_entropy((h @ head.T).float(), labels, reduction="sum").backward()

    ours = milliseconds(
        lambda: segmented_cross_entropy(hidden, head, None, labels, None, -100, 512, True, False, False)
    )
    rate = 4 * 8192 * width * 128256 / ours / 1e9
    share = round(rate / result["ceilings"]["bf16_tflop_s"], 3)
    row(
        "segmented_cross_entropy", 8192, ours, milliseconds(naive_loss, False), None,
        tflop_s=round(rate, 1), share_of_matrix_rate=share,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
