"""Time and memory of one LoRA training step, side by side in one run: what people run today, and lemo_fx.

Weights are random: time and memory do not depend on them, accuracy is another tool's business. A correctness gate comes
first: with keep=1.0 the rewritten model must compute the original's loss and gradients, or no figure is printed.

    python tools/bench_model.py --shape llama3-8b --tokens 8192,32768 --out benchmarks/model
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import lemo_fx
from lemo_fx import Elimination, LemoConfig, Predictors
from lemo_fx.sites import decoder_layers

SHAPES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama3-8b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama2-7b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=1 << 20,
    ),
    "opt-350m": lambda: _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-2.7b": lambda: _opt(2560, 32, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "tiny": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=1 << 20,
    ),
}  # fmt: skip
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "opt": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def _opt(hidden: int, layers: int, heads: int, **more) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=50272,
        max_position_embeddings=1 << 18, dropout=0.0, **{"word_embed_proj_dim": hidden, **more},
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the step.

    Attributes:
        config: what lemo_fx does; None runs the model as it is.
        compiled: torch.compile per decoder layer; checkpointed: the model's activation checkpointing.
    """

    name: str
    config: LemoConfig | None
    compiled: bool = True
    checkpointed: bool = False


SEGMENTS_ONLY = LemoConfig(attention=None, mlp=None)


def sparse(
    keep: float, treatment: str = "skip", score: str = "predicted", shared: bool = False, recompute: str = "all"
) -> LemoConfig:
    """Both sites at one keep in every layer but the first and the last."""
    attention = Elimination(keep=keep, eliminated=treatment, score=score)
    mlp = Elimination(keep=keep, eliminated=treatment, score="shared" if shared else score)
    return LemoConfig(attention=attention, mlp=mlp, recompute=recompute)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("lora-eager", None, compiled=False),
        Variant("lora-compiled", SEGMENTS_ONLY),
        Variant("lora-eager-checkpointed", SEGMENTS_ONLY, compiled=False, checkpointed=True),
        Variant("lora-checkpointed", SEGMENTS_ONLY, checkpointed=True),
        Variant("skip-0.5", sparse(0.5)),
        Variant("skip-0.5-random", sparse(0.5, score="random")),
        Variant("skip-0.5-eager", sparse(0.5), compiled=False),
        Variant("skip-0.5-checkpointed", sparse(0.5), checkpointed=True),
        Variant("skip-0.5-shared", sparse(0.5, shared=True)),
        Variant("skip-0.5-shared-checkpointed", sparse(0.5, shared=True), checkpointed=True),
        Variant(
            "skip-0.5-shared-checkpointed-attention-kept",
            sparse(0.5, shared=True, recompute="projections"),
            checkpointed=True,
        ),
        Variant("exact-0.25", sparse(0.25, "exact", "random")),
        Variant("exact-0.25-checkpointed", sparse(0.25, "exact", "random"), checkpointed=True),
        Variant("exact-0.125", sparse(0.125, "exact", "random")),
        Variant("exact-0.125-checkpointed", sparse(0.125, "exact", "random"), checkpointed=True),
    )
}


def build(shape: str, device: torch.device, adapters: str, layers: int | None = None) -> torch.nn.Module:
    """The model in bf16 with random weights and LoRA r=8 on the attention projections."""
    config = SHAPES[shape]()
    if layers:
        config.num_hidden_layers = layers
    config.use_cache = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[config.model_type], task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=adapters == "float32").train()


def gate(shape: str, device: torch.device, adapters: str) -> dict[str, float]:
    """Loss and gradients of the rewritten model at keep=1.0 against the original, on a model cut to four layers.

    Raises:
        SystemExit: they differ by more than the rounding of the dtype.
    """
    model = build(shape, device, adapters, layers=4)
    ids = torch.randint(0, model.config.vocab_size, (1, 1000), device=device)
    results = []
    for config in (None, sparse(1.0, score="measured"), sparse(1.0, "exact", score="measured")):
        if config is not None:
            lemo_fx.transform(model, dataclasses.replace(config, dense_layers=()))
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.item(), gradient))
    (loss, gradient), *others = results
    errors = {
        "loss": max(abs(other - loss) / loss for other, _ in others),
        "gradient": max(float((g - gradient).norm() / gradient.norm()) for _, g in others),
    }
    bound = {"loss": 1e-3, "gradient": 3e-2} if device.type == "cuda" else {"loss": 1e-6, "gradient": 1e-4}
    if any(not errors[name] <= bound[name] for name in bound):
        sys.exit(f"correctness gate failed: relative errors {errors}, allowed {bound}")
    return errors


def measure(
    model: torch.nn.Module, variant: Variant, tokens: int, steps: int, device: torch.device, profile: Path | None = None
) -> dict:
    """Median times in ms and peak memory in GB (1e9 bytes) of training steps."""
    lemo_fx.revert(model)
    base = model.get_base_model()
    if variant.config is not None:
        # Of their real size and random weights: they cost what trained ones cost.
        predictors = Predictors.random(base, variant.config) if _predicts(variant.config) else None
        lemo_fx.transform(model, variant.config, predictors=predictors)
    if variant.checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    torch._dynamo.reset()
    for _, layer in decoder_layers(base):
        layer._compiled_call_impl = None
        if variant.compiled:
            layer.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    for step in range(steps + 2):
        if step == 1:
            _reset_peak(device)
        marks = [_mark(device)]
        loss = model(input_ids=ids, labels=ids).loss
        marks.append(_mark(device))
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(_mark(device))
        _wait(device)
        if step >= 2:
            times.append((_between(*marks[:2]), _between(*marks[1:])))
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    result = {
        "variant": variant.name,
        "tokens": tokens,
        "forward_ms": round(forward, 1),
        "backward_ms": round(backward, 1),
        "step_ms": round(statistics.median(f + b for f, b in times), 1),
        "loss": loss.item(),
        "compile_and_run_s": round(time.perf_counter() - began, 1),
    }
    if device.type == "cuda":
        result["after_forward_gb"] = round(held / 1e9, 2)
        result["peak_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        result["weights_gb"] = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 2)
    if profile is not None:
        (profile / f"{variant.name}-{tokens}.kernels.txt").write_text(_kernels(model, ids))
    del loss, optimizer
    return result


def _predicts(config: LemoConfig) -> bool:
    return any(site is not None and site.score == "predicted" for site in (config.attention, config.mlp))


def _kernels(model: torch.nn.Module, ids: torch.Tensor) -> str:
    """The kernels of one step by device time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ids.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        model(input_ids=ids, labels=ids).loss.backward()
        _wait(ids.device)
    model.zero_grad()
    order = "self_cuda_time_total" if ids.is_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)


def _mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to repeat the run."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "lemo_fx": lemo_fx.__version__,
        "weights": "random",
    }


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "llama3-8b",
    tokens: Annotated[str, typer.Option(help="sequence lengths, comma-separated")] = "8192,32768",
    variants: Annotated[str, typer.Option(help=f"comma-separated, from {', '.join(VARIANTS)}")] = ",".join(VARIANTS),
    adapters: Annotated[
        str, typer.Option(help="dtype of the adapters: float32 (PEFT's default) or bfloat16")
    ] = "float32",
    steps: Annotated[int, typer.Option(help="timed steps after two warm-up steps")] = 5,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/model"),
    profile: Annotated[bool, typer.Option(help="also write each variant's kernels by device time")] = False,
    seconds: Annotated[float, typer.Option(help="start no further variant after this long")] = 1e9,
) -> None:
    """Measure one training step of each variant at each length; results are written after every variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": environment(device),
        "shape": shape,
        "adapters": adapters,
        "gate": gate(shape, device, adapters),
        "runs": [],
    }
    print("correctness gate:", result["gate"], flush=True)
    model = build(shape, device, adapters)
    torch._dynamo.config.cache_size_limit = 64
    for length in map(int, tokens.split(",")):
        for name in variants.split(","):
            if time.perf_counter() - began > seconds:
                result["runs"].append({"variant": name, "tokens": length, "skipped": "out of time"})
                continue
            try:
                run = measure(model, VARIANTS[name], length, steps, device, out if profile else None)
            except torch.OutOfMemoryError as error:
                run = {"variant": name, "tokens": length, "out_of_memory": str(error).splitlines()[0]}
                model.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
            result["runs"].append(run)
            print(json.dumps(run), flush=True)
            (out / f"{shape}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
