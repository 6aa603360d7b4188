"""Causal attention forward in float8 by cuDNN (a Hopper GPU, `pip install nvidia-cudnn-frontend`): time and error.

    python tools/float8_attention.py --out benchmarks/kernels/float8-attention.json

Queries, keys and values are rounded with one scale each; probabilities and the output are in float8 too, since cuDNN
writes no other output on Hopper. What that costs: `study_accuracy.py run --plans plain-balanced-float8-attention`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemo_fx.cli.machine import environment

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in float8, its scale [])."""
    scale = x.abs().amax().float().clamp_min(1e-30) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, heads, S, D] (fewer heads of keys and values) -> the same shape, rounded where cuDNN rounds."""
    query, key, value = (x.float() * scale for x, scale in map(rounded, (query, key, value)))
    limit = value.abs().amax()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(future, -math.inf)
    shares = (scores - scores.amax(3, keepdim=True)).exp()
    sums = shares.sum(3, keepdim=True)
    shares = (shares * LARGEST).to(torch.float8_e4m3fn).float() / LARGEST
    out = shares @ value / sums
    return (out * (LARGEST / limit)).to(torch.float8_e4m3fn).float() * (limit / LARGEST)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, heads, S, D] (fewer heads of keys and values) -> the same shape, by cuDNN."""
    out, scale = kernel(*in_float8(query, key, value))
    return (out.float() * scale).to(query.dtype).transpose(1, 2)


def in_float8(*states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each [B, heads, S, D]: [B, S, heads, D] in float8 and its scale [], as cuDNN reads them."""
    return [rounded(x.transpose(1, 2).contiguous()) for x in states]


def kernel(
    query: tuple[torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
    value: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `in_float8` gives -> [B, S, heads, D] in float8 and its scale []."""
    import cudnn

    (q, scale_q), (k, scale_k), (v, scale_v) = query, key, value
    batch, length, heads, size = q.shape
    graph, names = _graph(batch, heads, k.shape[2], length, size)
    out = torch.empty(batch, length, heads, size, device=q.device, dtype=torch.float8_e4m3fn)
    one = torch.ones(1, 1, 1, 1, device=q.device)
    given = {
        "query": q, "key": k, "value": v, "out": out,
        "unscale_query": one * scale_q, "unscale_key": one * scale_k, "unscale_value": one * scale_v,
        "scale_shares": one * LARGEST, "unscale_shares": one / LARGEST,
        # An output is a mean of values, and no larger than the largest.
        "scale_out": one / scale_v,
        "sums": torch.empty(batch, heads, length, 1, device=q.device), "most_share": one.clone(),
        "most_out": one.clone(),
    }  # fmt: skip
    space = torch.empty(max(graph.get_workspace_size(), 1), device=q.device, dtype=torch.uint8)
    graph.execute({names[name]: tensor for name, tensor in given.items()}, space, handle=_handle(cudnn))
    return out, scale_v


@functools.cache
def _handle(cudnn: Any) -> Any:
    return cudnn.create_handle()


@functools.cache
def _graph(batch: int, heads: int, key_heads: int, length: int, size: int) -> tuple[Any, dict[str, Any]]:
    import cudnn

    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT,
        handle=_handle(cudnn),
    )  # fmt: skip

    def tokens(name: str, count: int) -> Any:
        stride = [length * count * size, size, count * size, 1]
        return graph.tensor(name=name, dim=[batch, count, length, size], stride=stride, data_type=kinds.FP8_E4M3)

    def number(name: str) -> Any:
        return graph.tensor(name=name, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.FLOAT)

    numbers = ("unscale_query", "unscale_key", "unscale_value", "unscale_shares", "scale_shares", "scale_out")
    names = {name: number(name) for name in numbers}
    names |= {"query": tokens("query", heads), "key": tokens("key", key_heads), "value": tokens("value", key_heads)}
    out, sums, most_share, most_out = graph.sdpa_fp8(
        q=names["query"], k=names["key"], v=names["value"],
        descale_q=names["unscale_query"], descale_k=names["unscale_key"], descale_v=names["unscale_value"],
        descale_s=names["unscale_shares"], scale_s=names["scale_shares"], scale_o=names["scale_out"],
        generate_stats=True, attn_scale=1 / math.sqrt(size), use_causal_mask=True, name="attention",
    )  # fmt: skip
    stride = [length * heads * size, size, heads * size, 1]
    out.set_output(True).set_dim([batch, heads, length, size]).set_stride(stride).set_data_type(kinds.FP8_E4M3)
    sums.set_output(True).set_data_type(kinds.FLOAT)
    sums.set_dim([batch, heads, length, 1]).set_stride([heads * length, length, 1, 1])
    for most in (most_share, most_out):
        most.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
    graph.build([cudnn.heur_mode.A])
    return graph, names | {"out": out, "sums": sums, "most_share": most_share, "most_out": most_out}


def row_of(tokens: int, error: float, milliseconds: Mapping[str, float]) -> dict[str, Any]:
    """A row of the result, with the heads of Llama-3-8B.

    Args:
        error: of the float8 kernel against the one in bf16, relative.
        milliseconds: of the kernels "bf16" and "float8", and of "rounding" what the latter reads.
    """
    flops = 2 * 32 * tokens**2 * 128
    speeds = {f"{name}_tflops": round(flops / milliseconds[name] / 1e9) for name in ("bf16", "float8")}
    return {"tokens": tokens, "error": round(error, 4), **speeds, "rounding_ms": round(milliseconds["rounding"], 3)}


def surroundings(command: str) -> dict[str, Any]:
    """Where and how the figures were made."""
    import cudnn

    version = torch.backends.cudnn.version() or 0
    return {
        **environment(command),
        "device": torch.cuda.get_device_name(),
        "cudnn": f"{version // 10000}.{version // 100 % 100}.{version % 100}",
        "cudnn_frontend": cudnn.__version__,
    }


def main(
    out: Annotated[Path, typer.Option(help="file for the JSON")],
    tokens: Annotated[str, typer.Option(help="comma-separated")] = "32768,131072",
) -> None:
    """Time both kernels on random numbers, with the heads of Llama-3-8B."""
    from triton.testing import do_bench

    rows = []
    for length in map(int, tokens.split(",")):
        query, key, value = (
            torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8)
        )

        def plain(query=query, key=key, value=value) -> torch.Tensor:
            with torch.no_grad(), sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        expected, found = plain().float(), attention(query, key, value).float()
        error = float((found - expected).norm() / expected.norm())
        rounding = functools.partial(in_float8, query, key, value)
        milliseconds = {
            name: do_bench(run, warmup=50, rep=300)
            for name, run in (
                ("bf16", plain),
                ("float8", functools.partial(kernel, *rounding())),
                ("rounding", rounding),
            )
        }
        rows.append(row_of(length, error, milliseconds))
        print(rows[-1], flush=True)
    command = f"python tools/float8_attention.py --out {out} --tokens {tokens}"
    out.write_text(json.dumps({"environment": surroundings(command), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
