"""Time and memory of one LoRA training step, side by side in one run: what people run today, and lemo_fx.

Weights are random: time and memory do not depend on them, accuracy is another tool's business. A correctness gate comes
first: every plan that is timed must compute what an independent reference computes, compiled, checkpointed and in the
precision in which it is timed, and `exact` in float32 too, or no figure is printed.

    python tools/bench_model.py --shape llama3-8b --tokens 8192,32768 --out benchmarks/model
    python tools/bench_model.py --shape opt-1.3b --tokens 4096,16384,131072 --cap 30 --variants lora-checkpointed,...

A variant or length that fails or does not fit is written down as such, and the run goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import linecache
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import masked_reference
import plans
import rivals
import torch
import transformers
import typer
from forwards import forwards
from peft import LoraConfig, get_peft_model
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lemo_fx
from lemo_fx import LemoConfig, Predictors
from lemo_fx.cli import machine
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.kernels.float8_linear.op import Float8Linear, float8_linear
from lemo_fx.kernels.private import uncompile
from lemo_fx.measure import device_name

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


MODES: dict[str, dict[str, Any]] = {
    "checkpointed": {"checkpointed": True},
    "eager": {"compiled": False},
    "compiled": {},
    "graphs": {"mode": "reduce-overhead"},
    "lean": {"lean": True},
    "liger": {"liger": True, "compiled": False},
}
"""How a step runs, as words anywhere in the name of a variant."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the step.

    Attributes:
        config: what lemo_fx does; None runs the model as it is.
        compiled: torch.compile per decoder layer; checkpointed: the model's activation checkpointing.
        attention: transformers' name of the attention implementation.
        liger: with Liger's kernels; they cannot be taken out of a process again, so these variants come last.
        mode: of torch.compile; "reduce-overhead" replays CUDA graphs.
        lean: the compiler recomputes norms and casts where by default it keeps them (`aggressive_recomputation`).
    """

    name: str
    config: LemoConfig | None
    compiled: bool = True
    checkpointed: bool = False
    attention: str = "sdpa"
    liger: bool = False
    mode: str = "default"
    lean: bool = False

    @classmethod
    def named(cls, name: str) -> Variant:
        """A plan of `plans.py`, where `skip` goes by predictors of their real size, and words of `MODES`.

        `lora-eager` alone and Liger run the model as it is, with full logits; `longlora` is LoRA with LongLoRA's
        attention.

        Raises:
            ValueError: there is no such plan.
        """
        words = [word for word in MODES if re.search(rf"-{word}(?=-|$)", name)]
        plan = re.sub(rf"-({'|'.join(MODES)})(?=-|$)", "", name)
        settings: dict[str, Any] = {key: value for word in words for key, value in MODES[word].items()}
        if plan == "longlora":
            plan, settings["attention"] = "lora", "shifted_sparse"
        config = None if name == "lora-eager" or "liger" in words else plans.named(plan, "predicted")
        if config is not None and (config.offload or config.recompute != "all"):
            # Neither does anything without checkpointing.
            settings["checkpointed"] = True
        return cls(name, config, **settings)


ALL_ATTENTION_FUNCTIONS.register("shifted_sparse", rivals.shifted_attention)

PICKED = (
    "lora-eager",
    "lora-compiled",
    "longlora-compiled",
    "skip-0.5-shared-elementwise-both-float8",
    "lora-checkpointed",
    "step-0.4375-slope-0.5-checkpointed",
    "step-0.5-slope-0.6-both-float8-checkpointed",
    "step-0.375-slope-0.6-both-float8-checkpointed",
)
"""What people run, LeMo's own rule at its best at 8K tokens, and the presets."""


def build(
    shape: str, device: torch.device, adapters: str, layers: int | None = None, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """The model in bf16 with random weights and LoRA r=8 on the attention projections.

    Args:
        dtype: None is bfloat16 on a GPU, else float32.
        adapters: "float32", as PEFT makes them; "autocast", the same under autocast to bf16, as the Trainer computes
            with `bf16=True`; "bfloat16".
    """
    config = SHAPES[shape]()
    if layers:
        config.num_hidden_layers = layers
    config.use_cache = False
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[config.model_type], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=adapters != "bfloat16").train()
    if adapters == "autocast":
        model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)
    return model


GATED_LAYERS, GATED_TOKENS = 4, 1000
EXACT = "exact-0.5-compiled-checkpointed"
BOUNDS = {
    "float32": {"loss": 1e-5, "values": 1e-4, "gradient": 1e-3},
    "bfloat16": {"loss": 2e-3, "values": 5e-2, "gradient": 1e-1},
    "float8": {"loss": 5e-3, "values": 2e-1, "gradient": 3e-1},
}
"""Largest relative errors by precision: of the loss; of a token's hidden state; of a parameter's gradient.

In float8 of all tokens and of all gradients together: a last bit of bfloat16 moves an input to the next of float8's
values, and random weights make much of that for single tokens, without elimination too. At 8B shapes these bounds see
layers that are not rounded where the reference's are; that the plan is right is seen without float8, and the matmuls in
tests/kernels.
"""


def gate(shape: str, device: torch.device, adapters: str, variants: Sequence[Variant]) -> dict[str, dict[str, float]]:
    """Relative errors by variant: of plans as they are timed, and of `exact` at 0.5 in float32 and as models are timed.

    On a model cut to four layers. The loss is compared with the original's where the plan is `exact`, else with the
    reference's (`masked_reference`), hidden states and gradients with the reference's. Plans in float8 are compared
    without it, and then with it: where a plan is all in float8, so are the reference's frozen layers.

    Raises:
        SystemExit: one is larger than rounding explains.
    """
    exact = Variant.named(EXACT)
    half = device.type == "cuda" or adapters == "autocast"
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = build(shape, device, "float32", GATED_LAYERS, torch.float32)
    found = {f"{EXACT} in float32": _gated(model, exact, "float32", device)}
    torch.set_float32_matmul_precision(products)
    model = build(shape, device, adapters, GATED_LAYERS)
    for variant in dict.fromkeys((exact, *variants)):
        # No reference runs Liger's kernels or fitted maps.
        if variant.config is None or variant.liger or "stand_in" in variant.name:
            continue
        rounded = "float8" in (variant.config.forward, variant.config.backward)
        precision = "float8" if rounded else "bfloat16" if half else "float32"
        if rounded:
            unrounded = dataclasses.replace(variant.config, forward="model", backward="model", base="model")
            words = f"{variant.name}, without float8"
            precise = "bfloat16" if half else "float32"
            found[words] = _gated(model, dataclasses.replace(variant, name=words, config=unrounded), precise, device)
        found[variant.name] = _gated(model, variant, precision, device)
    return found


def _gated(model: torch.nn.Module, variant: Variant, precision: str, device: torch.device) -> dict[str, float]:
    plain = Variant("reference", None, compiled=False)
    ids = torch.randint(0, model.config.vocab_size, (1, GATED_TOKENS), device=device)
    with torch.no_grad():
        # As they begin, adapters do nothing, and half of their gradients are 0.
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    prepare(model, plain)
    original = _step(model, ids)
    prepare(model, variant)
    found = _step(model, ids)
    kept = masked_reference.kept_by(model)
    prepare(model, plain)
    rounded = variant.config is not None and variant.config.float8_everywhere
    with masked_reference.masked(model, kept), _in_float8(model) if rounded else nullcontext():
        expected = _step(model, ids)
    sites = [treatment for sites in kept.values() for treatment, _ in sites.values()]
    loss = original[0] if set(sites) <= {"exact"} else expected[0]
    errors = {"loss": abs(found[0] - loss) / loss}
    if precision == "float8":
        every = [torch.cat([step[2][name].flatten() for name in expected[2]]) for step in (found, expected)]
        errors["values"] = float((found[1] - expected[1]).norm() / expected[1].norm())
        errors["gradient"] = float((every[0] - every[1]).norm() / every[1].norm())
    else:
        largest = max(float(g.norm()) for g in expected[2].values())
        errors["values"] = float(((found[1] - expected[1]).norm(dim=-1) / expected[1].norm(dim=-1)).max())
        errors["gradient"] = max(
            float((found[2][name] - g).norm() / (g.norm() + 1e-2 * largest)) for name, g in expected[2].items()
        )
    bound = BOUNDS[precision]
    if any(not errors[name] <= bound[name] for name in bound):
        sys.exit(f"correctness gate failed for {variant.name}: relative errors {errors}, allowed {bound}")
    return errors


def _in_float8(model: torch.nn.Module) -> AbstractContextManager[None]:
    """The frozen linear layers of the decoder layers multiply in float8, forward and gradient."""
    return forwards(
        {
            module: functools.partial(_float8_product, module)
            for _, layer in decoder_layers(model)
            for module in layer.modules()
            if type(module) is torch.nn.Linear and not module.weight.requires_grad
        }
    )


def _float8_product(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., N]."""
    weight = linear.weight.detach()
    out = Float8Linear.apply(x, weight) if torch.is_grad_enabled() else float8_linear(x, weight)
    return out if linear.bias is None else out + linear.bias


def _step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, last hidden states [1, S, H] and gradients by parameter of one step."""
    hidden: list[torch.Tensor] = []
    hook = model.get_base_model().get_decoder().register_forward_hook(lambda _, __, out: hidden.append(out[0].detach()))
    try:
        loss = model(input_ids=ids, labels=ids).loss
    finally:
        hook.remove()
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), hidden[0].float(), gradients


def prepare(model: torch.nn.Module, variant: Variant, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Put a model into a variant's state, whatever state it was in.

    Args:
        group: ranks that share each sequence.
    """
    lemo_fx.revert(model)
    base = model.get_base_model()
    base.config._attn_implementation = variant.attention
    if variant.config is not None:
        # Of their real size and random weights: they cost what trained ones cost.
        predictors = Predictors.random(base, variant.config) if variant.config.predicts else None
        lemo_fx.transform(model, variant.config, predictors=predictors, sequence_group=group)
    if variant.checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    torch.compiler.reset()
    torch._functorch.config.aggressive_recomputation = variant.lean
    for _, layer in decoder_layers(base):
        uncompile(layer)
        if variant.compiled:
            layer.compile(mode=variant.mode)


def measure(
    model: torch.nn.Module,
    variant: Variant,
    tokens: int,
    steps: int,
    device: torch.device,
    profile: Path | None = None,
    cap: float = 1e9,
    warm_up: int = 2,
) -> dict:
    """Median times in ms and peak memory in GB (1e9 bytes) of steps; fewer than asked after `cap` s of timing."""
    prepare(model, variant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    times: list[tuple[float, float]] = []
    began = timed_from = time.perf_counter()
    for step in range(steps + warm_up):
        if step <= 1:
            _reset_peak(device)
        if variant.mode != "default":
            torch.compiler.cudagraph_mark_step_begin()
        marks = [mark(device)]
        loss = model(input_ids=ids, labels=ids).loss
        marks.append(mark(device))
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(mark(device))
        wait(device)
        if step == 0:
            compiled = time.perf_counter() - began
        if step < warm_up:
            timed_from = time.perf_counter()
        else:
            times.append((between(*marks[:2]), between(*marks[1:])))
        if times and time.perf_counter() - timed_from > cap:
            break
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    result = {
        "variant": variant.name,
        "tokens": tokens,
        "forward_ms": round(forward, 1),
        "backward_ms": round(backward, 1),
        "step_ms": round(statistics.median(f + b for f, b in times), 1),
        "slowest_step_ms": round(max(f + b for f, b in times), 1),
        "timed_steps": len(times),
        "loss": loss.item(),
        "first_step_s": round(compiled, 1),
        "compile_and_run_s": round(time.perf_counter() - began, 1),
    }
    if device.type == "cuda":
        result["after_forward_gb"] = round(held / 1e9, 2)
        result["peak_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        result["weights_gb"] = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 2)
    if profile is not None:
        text = _kernels(model, ids) + (_alive_at_peak(model, ids) if ids.is_cuda else "")
        (profile / f"{variant.name}-{tokens}.profile.txt").write_text(text)
    del loss, optimizer
    return result


def _kernels(model: torch.nn.Module, ids: torch.Tensor, rows: int = 30) -> str:
    """The kernels of one forward and of one backward by device time, and how long the device had none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind = DeviceType.CPU
    if ids.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        kind = DeviceType.CUDA
    lines: list[str] = []

    def phase(name: str, run: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        with torch.profiler.profile(activities=activities) as profiler:
            result = run()
            wait(ids.device)
        spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == kind)
        busy, until = 0.0, float("-inf")
        for start, end in spans:
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        entries = [e for e in profiler.key_averages() if e.device_type == kind]
        time_of = {e.key: e.self_device_time_total if ids.is_cuda else e.self_cpu_time_total for e in entries}
        launches = sum(e.count for e in entries)
        wall = until - spans[0][0] if spans else 0.0
        lines.append(f"{name}: {wall / 1e3:.1f} ms from first to last, busy {busy / 1e3:.1f} ms, {launches} launches")
        for entry in sorted(entries, key=lambda e: -time_of[e.key])[:rows]:
            lines.append(f"{time_of[entry.key] / 1e3:9.2f} ms {entry.count:6d} x  {entry.key[:110]}")
        return result

    loss = phase("forward", lambda: model(input_ids=ids, labels=ids).loss)
    assert loss is not None
    phase("backward", lambda: loss.backward())
    model.zero_grad()
    return "\n".join([*lines, ""])


def _alive_at_peak(model: torch.nn.Module, ids: torch.Tensor, rows: int = 40) -> str:
    """What a step allocated and still held when its memory peaked, by the source line that asked for it."""
    wait(ids.device)
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)
    try:
        model(input_ids=ids, labels=ids).loss.backward()
        wait(ids.device)
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
    except Exception as error:
        # With torch 2.11 recording can fail in compiled code; the step's own figures must not be lost with it.
        model.zero_grad()
        return f"what is alive at the peak was not recorded: {type(error).__name__}: {error}\n"
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    model.zero_grad()
    held: dict[int, dict] = {}
    now, peak, at_peak = 0, 0, []
    for event in trace:
        if event["action"] == "alloc":
            held[event["addr"]] = event
            now += event["size"]
        elif event["action"] == "free_completed" and event["addr"] in held:
            now -= held.pop(event["addr"])["size"]
        if now > 1.001 * peak:
            peak, at_peak = now, list(held.values())
    places: dict[str, tuple[int, int]] = {}
    for event in at_peak:
        place = _place(event["frames"])
        size, count = places.get(place, (0, 0))
        places[place] = (size + event["size"], count + 1)
    lines = [f"alive at the peak, {peak / 1e9:.2f} GB above what was held before the step:"]
    for place, (size, count) in sorted(places.items(), key=lambda item: -item[1][0])[:rows]:
        lines.append(f"{size / 1e9:9.3f} GB {count:5d} x  {place}")
    return "\n".join([*lines, ""])


def _place(frames: list[dict]) -> str:
    """The innermost frame outside torch, or in compiled code, with its source line."""
    inner = [f for f in frames if f["filename"].endswith(".py")]
    frame = next((f for f in inner if "torchinductor" in f["filename"] or "/torch/" not in f["filename"]), None)
    if frame is None:
        return inner[0]["filename"] if inner else "?"
    line = linecache.getline(frame["filename"], frame["line"]).strip()
    return f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}: {line[:120]}"


def mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def environment(device: torch.device, weights: str = "random") -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    known = machine.environment(" ".join(["python", *sys.argv]))
    return {**known, "device": device_name(device), "weights": weights}


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "llama3-8b",
    tokens: Annotated[str, typer.Option(help="sequence lengths, comma-separated")] = "8192,32768",
    variants: Annotated[
        str, typer.Option(help=f"comma-separated: a plan and words of {', '.join(MODES)}; a plan is {plans.HELP}")
    ] = ",".join(PICKED),
    adapters: Annotated[
        str, typer.Option(help="adapters in float32 (PEFT's default), in float32 under autocast, or in bfloat16")
    ] = "float32",
    steps: Annotated[int, typer.Option(help="timed steps")] = 5,
    warm_up: Annotated[int, typer.Option(help="steps before them; the first compiles")] = 2,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/model"),
    profile: Annotated[
        str, typer.Option(help="variants whose kernels by device time, and what is alive at the peak, are written too")
    ] = "",
    tf32: Annotated[bool, typer.Option(help="float32 products (the adapters') in TF32, in every variant")] = False,
    seconds: Annotated[float, typer.Option(help="start no further variant after this long")] = 1e9,
    cap: Annotated[float, typer.Option(help="seconds of timed steps per variant, then no further one")] = 1e9,
) -> None:
    """Measure one training step of each variant at each length; results are written after every variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = plans.each(variants, Variant.named)
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    result = {
        "environment": environment(device),
        "shape": shape,
        "adapters": adapters,
        "tf32": tf32,
        "gate": gate(shape, device, adapters, chosen),
        "runs": [],
    }
    print("correctness gate:", result["gate"], flush=True)
    model = None
    torch.compiler.config.recompile_limit = 64
    runs = itertools.product(map(int, tokens.split(",")), chosen)
    # Liger changes the classes of the modelling file, not one model alone.
    for length, variant in sorted(runs, key=lambda run: run[1].liger):
        if time.perf_counter() - began > seconds:
            run = {"variant": variant.name, "tokens": length, "skipped": "out of time"}
        elif variant.liger and not importlib.util.find_spec("liger_kernel"):
            run = {"variant": variant.name, "tokens": length, "skipped": "liger-kernel is not installed"}
        else:
            if model is None or variant.liger:
                model = None
                _release(device)
                model = build(shape, device, adapters)
            run = attempt(
                model, variant, length, steps, device, out if variant.name in profile.split(",") else None, cap, warm_up
            )
            if variant.liger:
                model = None
        result["runs"].append(run)
        print(json.dumps(run), flush=True)
        (out / f"{shape}.json").write_text(json.dumps(result, indent=1))


def attempt(model: torch.nn.Module, variant: Variant, tokens: int, *rest) -> dict:
    """`measure`, or in its place what went wrong."""
    try:
        if variant.liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model.get_base_model())
        return measure(model, variant, tokens, *rest)
    except torch.OutOfMemoryError as error:
        failure = {"out_of_memory": str(error).splitlines()[0]}
    except Exception as error:
        failure = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    # Outside the handlers: what went wrong holds the tensors of the step.
    model.zero_grad()
    _release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"variant": variant.name, "tokens": tokens, **failure}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
