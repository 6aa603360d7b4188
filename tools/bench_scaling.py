"""Strong scaling on the GPUs of one host (LeMo, Figure 21): one LoRA training step under DDP, under FSDP2, or with
every sequence shared by all GPUs.

Models and variants are those of tools/bench_model.py: random weights, adapters of rank 8, compiled per layer, loss in
segments. A correctness gate comes first: losses and gradients of the wrapped model must be those of one process that
runs the samples of all ranks one after another. On a CPU the same runs over gloo.

    for n in 1 2 4 8; do
        torchrun --nproc-per-node $n --max-restarts 3 --virtual-local-rank tools/bench_scaling.py --shape llama3-8b
    done
    python tools/plot_benchmarks.py benchmarks/scaling/llama3-8b-{1,2}.json

Without --samples each GPU has one sample per step; with it, the step's samples are shared out and accumulated. Under
`--wraps sequence` all GPUs share each sample, whose gradients DDP averages; --samples are then accumulated. What is
named first in --tokens, --variants and --wraps is measured first, so that --seconds leaves out the last of each.

A run that fails on every rank (too little memory) is written down as such, and the next one starts. If only some ranks
fail, the others wait for them: the command ends, and with --max-restarts torchrun starts it anew after that run. Where
every rank calls its GPU cuda:0 (--virtual-local-rank), all of them find what one has compiled.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

# Multicast over NVLink can put GPUs that are shared between machines out of service; read when NCCL starts.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import masked_reference
import plans
import torch
import torch.distributed as dist
import typer
from bench_model import BOUNDS, SHAPES, Variant, build, environment, prepare
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lemo_fx
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.capture import uncompiled
from lemo_fx.install import installed
from lemo_fx.kernels.private import uncompile

PICKED = (
    "lora-checkpointed",
    "step-0.4375-slope-0.5-checkpointed",
    "step-0.5-slope-0.6-both-float8-checkpointed",
    "step-0.375-slope-0.6-both-float8-checkpointed",
    "skip-0.5-shared-checkpointed",
)
"""LoRA, the presets careful, balanced and fast, and LeMo's own rule with one selection a layer."""

MOST_ALONE = 65536
"""Tokens of a shared sample up to which each process computes its loss by itself, too."""

ENDED = "the command ended during it"


def wrapped(model: torch.nn.Module, wrap: str, device: torch.device) -> torch.nn.Module:
    """The model under "none", "ddp", "fsdp2" (a unit per layer, then the root), or sharing sequences under either."""
    if wrap in ("ddp", "sequence"):
        # The only buffers are constants: rotary frequencies, predictors, sites.
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    if wrap.endswith("fsdp2"):
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for _, layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def compile_layers(model: torch.nn.Module) -> None:
    """torch.compile of each layer's forward: FSDP2's hooks, and in older transformers the checkpoint, stay outside."""
    for _, layer in decoder_layers(model):
        uncompile(layer)
        layer.forward = torch.compile(layer.forward)


def prefetch_layers(model: torch.nn.Module, ahead: int) -> None:
    """FSDP2 gathers the weights of the next layers before a layer's own work is launched, forward and backward."""
    layers = [layer for _, layer in decoder_layers(model)]
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(index - ahead, 0) : index][::-1])


@contextlib.contextmanager
def shallow(model: torch.nn.Module, count: int) -> Iterator[None]:
    """The model cut to `count` of its layers, the first and the last one among them."""
    decoder = next(m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList([*layers[: count - 1], layers[-1]])
    try:
        yield
    finally:
        decoder.layers = layers


def run_step(model: torch.nn.Module, samples: list[torch.Tensor]) -> torch.Tensor:
    """Forward and backward of this rank's samples, one at a time; gradients travel with the last. Mean loss []."""
    total = torch.zeros((), device=samples[0].device)
    for index, ids in enumerate(samples):
        last = index == len(samples) - 1
        waiting: contextlib.AbstractContextManager = contextlib.nullcontext()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            waiting = model.no_sync()
        with waiting:
            loss = model(**arguments(model, ids)).loss / len(samples)
            loss.backward()
        total += loss.detach().float()
    return total


def arguments(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a sample's call is made with: this rank's part of it where the ranks share it."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    batch = {"input_ids": ids, "labels": ids}
    return lemo_fx.shard_sequence(bare, batch) if sequence_group(bare) else batch


def sequence_group(model: torch.nn.Module) -> bool:
    """Whether the ranks share a model's sequences."""
    return any(getattr(record.settings, "group", None) is not None for _, _, record in installed(model))


def gate(shape: str, device: torch.device, adapters: str, wrap: str) -> dict[str, float]:
    """Relative errors of loss and gradients, on a model cut to four layers.

    Those of one process against a reference of its own (`masked_reference`), and the wrapped model's against those.

    Raises:
        ArithmeticError: they differ by more than the rounding of the dtype.
    """
    worst = {"loss": 0.0, "gradient": 0.0}
    independent = {"loss": 0.0, "gradient": 0.0}
    shared = wrap.startswith("sequence")
    names = ("lora", "skip-0.5", "step-0.25") if shared else (None, "skip-0.5", "exact-0.25")
    for name in names:
        config = None if name is None else plans.named(name, "step" if shared else "measured")
        if shared:
            config = replace(config, sequence_parts=dist.get_world_size())
        model = build(shape, device, adapters, layers=4)
        prepare(model, Variant("gate", config, compiled=False, checkpointed=True))
        samples = make_samples(model, 1024 if shared else 1000, 1, device, shared)
        loss = run_step(model, samples)
        gradient = _gradient(model)
        if config is not None and config.eliminations:
            expected = _reference(model, samples)
            independent["loss"] = max(independent["loss"], abs(float(expected[0] / loss - 1)))
            error = float((gradient - expected[1]).norm() / expected[1].norm())
            independent["gradient"] = max(independent["gradient"], error)
            prepare(model, Variant("gate", config, compiled=False, checkpointed=True))
        dist.all_reduce(loss)
        dist.all_reduce(gradient)
        model.zero_grad(set_to_none=True)
        if shared:
            prepare(model, Variant("gate", config, compiled=False, checkpointed=True), dist.group.WORLD)
        model = wrapped(model, wrap, device)
        found = run_step(model, samples)
        dist.all_reduce(found)
        count = dist.get_world_size()
        worst["loss"] = max(worst["loss"], abs(float((found - loss) / loss)))
        error = (_gradient(model) - gradient / count).norm() / (gradient / count).norm()
        worst["gradient"] = max(worst["gradient"], float(error))
    bound = {"loss": 1e-3, "gradient": 3e-2} if device.type == "cuda" else {"loss": 1e-6, "gradient": 1e-4}
    if any(not worst[name] <= bound[name] for name in bound):
        raise ArithmeticError(f"correctness gate failed under {wrap}: relative errors {worst}, allowed {bound}")
    bound = BOUNDS["bfloat16" if device.type == "cuda" else "float32"]
    if any(not independent[name] <= bound[name] for name in independent):
        raise ArithmeticError(f"a process alone differs from the reference by {independent}, allowed {bound}")
    return worst


def _reference(model: torch.nn.Module, samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the model without its transform, attention masked to the tokens that it has just kept."""
    kept = masked_reference.kept_by(model)
    model.zero_grad(set_to_none=True)
    prepare(model, Variant("reference", None, compiled=False))
    with masked_reference.masked(model, kept):
        found = run_step(model, samples)
    gradient = _gradient(model)
    model.zero_grad(set_to_none=True)
    return found, gradient


def _gradient(model: torch.nn.Module) -> torch.Tensor:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).float().flatten() for g in grads])


def make_samples(
    model: torch.nn.Module, tokens: int, count: int, device: torch.device, shared: bool = False
) -> list[torch.Tensor]:
    """This rank's share of the step's samples, [1, tokens] each; all ranks have the same ones where they share them."""
    generator = torch.Generator().manual_seed(0 if shared else dist.get_rank())
    vocabulary = model.config.vocab_size
    return [torch.randint(0, vocabulary, (1, tokens), generator=generator).to(device) for _ in range(count)]


def measure(
    record: dict,
    write: Callable[[], None],
    shape: str,
    variant: Variant,
    count: int,
    steps: int,
    warm_up: int,
    cap: float,
    device: torch.device,
    adapters: str,
    warm_layers: int = 0,
    profiled: bool = True,
    prefetch: int = 0,
) -> None:
    """Step time, throughput, memory and communication of one way to run the step; on every rank the same.

    Args:
        record: holds "wrap" and "tokens"; the rest goes into it.
        write: called once the record holds all but the communication, which another step is profiled for.
        count: samples per rank and step.
        cap: seconds of timed steps after which two are enough, or one with `warm_layers`.
        warm_layers: if not 0, a first step runs through that many layers only, and compiles for all.
        profiled: whether another step is profiled, for the share of communication.
        prefetch: under FSDP2, of how many layers a layer asks for the weights before it computes.
    """
    began = time.perf_counter()
    tokens = record["tokens"]
    shared = record["wrap"].startswith("sequence")
    if shared and variant.config is None:
        raise ValueError(f"{variant.name} runs the model as it is, whose sequences no ranks can share")
    sets = 1 if shared else dist.get_world_size()
    model = build(shape, device, adapters)
    samples = make_samples(model, tokens, count, device, shared)
    alone = None
    if not shared:
        prepare(model, variant)
        alone = statistics.fmean(_loss_alone(model, ids) for ids in samples)
    elif tokens <= MOST_ALONE:
        prepare(model, replace(variant, config=replace(variant.config, sequence_parts=dist.get_world_size())))
        alone = statistics.fmean(_loss_alone(model, ids) for ids in samples)
    if shared:
        prepare(model, variant, dist.group.WORLD)
    bare = model
    model = wrapped(model, record["wrap"], device)
    if prefetch and record["wrap"].endswith("fsdp2"):
        prefetch_layers(model, prefetch)
    if variant.compiled:
        # After sharding: a method bound before it would belong to the class without FSDP2.
        compile_layers(model)
    if warm_layers:
        start = time.perf_counter()
        with shallow(bare, warm_layers):
            run_step(bare, samples)
        bare.zero_grad()
        _together(device)
        record["warm_layers"], record["warm_layers_s"] = warm_layers, round(time.perf_counter() - start, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    losses: list[torch.Tensor] = []
    times: list[float] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for step in range(steps + warm_up):
        if device.type == "cuda" and step == min(1, warm_up):
            # The cache stays: what is timed next shall not wait for the driver's memory.
            torch.cuda.reset_peak_memory_stats()
        _together(device)
        start = time.perf_counter()
        losses.append(run_step(model, samples))
        optimizer.step()
        optimizer.zero_grad()
        _together(device)
        times.append((time.perf_counter() - start) * 1e3)
        if len(times) >= warm_up + (1 if warm_layers else 2) and _on_any_rank(sum(times[warm_up:]) > cap * 1e3, device):
            break
    figures = torch.tensor([float(losses[0]), alone or 0.0], device=device)
    dist.all_reduce(figures)
    loss, mean = (figures / dist.get_world_size()).tolist()
    step_ms = statistics.median(times[warm_up:])
    record |= {
        "samples": count * sets,
        "step_ms": round(step_ms, 1),
        "slowest_step_ms": round(max(times[warm_up:]), 1),
        "timed_steps": len(times) - warm_up,
        "tokens_per_s": round(tokens * count * sets / step_ms * 1e3),
        "loss": loss,
        "loss_one_process": None if alone is None else mean,
        "first_step_s": round(times[0] / 1e3, 1),
    }
    if device.type == "cuda":
        held = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        record["peak_allocated_gb"], record["peak_reserved_gb"] = (round(b / 1e9, 2) for b in held.tolist())
    record["seconds"] = round(time.perf_counter() - began, 1)
    del record["failed"]
    write()
    if dist.get_world_size() > 1 and profiled:
        share, hidden = communication(model, samples, device)
        record["communication_share"], record["communication_overlapped"] = round(share, 4), round(hidden, 4)
        record["seconds"] = round(time.perf_counter() - began, 1)


def _on_any_rank(condition: bool, device: torch.device) -> bool:
    found = torch.tensor(float(condition), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def attempt(name: str, record: dict, write: Callable[[], None], work: Callable[[], None]) -> None:
    """Do `work`, which fills `record`, or record what went wrong if that is so on every rank; results are written.

    A failure of some ranks ends this process, and torchrun the others, which may wait for it in a collective. The
    record then says so already.
    """
    record["failed"] = ENDED
    write()
    failure = ""
    try:
        work()
        record.pop("failed", None)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"[:1000]
        traceback.print_exc()
    # Outside the handler: what went wrong holds the tensors of the step.
    if failure:
        if not _all_failed(name):
            print(f"rank {dist.get_rank()} failed alone in {name}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # No clean-up, which would wait for the other ranks.
            os._exit(1)
        record["communication_failed" if "step_ms" in record else "failed"] = failure
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    write()


def _all_failed(name: str, seconds: float = 20) -> bool:
    """Whether all ranks come here. They tell each other through the store: a collective could wait for ever."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"failed/{name}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "")
    try:
        store.wait(keys, datetime.timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def in_order(*options: Sequence) -> list[tuple]:
    """All combinations, those of what is named first before those of what is named last."""
    numbered = [enumerate(option) for option in options]
    combinations = sorted(itertools.product(*numbered), key=lambda one: sum(place for place, _ in one))
    return [tuple(value for _, value in one) for one in combinations]


@torch.no_grad()
def _loss_alone(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The loss before anything is wrapped, layers not compiled."""
    with uncompiled():
        return float(model(input_ids=ids, labels=ids).loss)


def _together(device: torch.device) -> None:
    """All ranks have done what they were told; a step takes as long as its slowest rank."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def communication(model: torch.nn.Module, samples: list[torch.Tensor], device: torch.device) -> tuple[float, float]:
    """(share of one profiled step in which collectives run, share of that time in which other work runs as well).

    On GPUs the time of NCCL's kernels, which includes waiting for the slowest rank; else that of gloo's operations.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    _together(device)
    with torch.profiler.profile(activities=activities) as profiler:
        run_step(model, samples)
        if device.type == "cuda":
            torch.cuda.synchronize()
    model.zero_grad()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if device.type == "cuda":
            # Annotated ranges hold others, and the gaps between them.
            wanted = event.device_type == DeviceType.CUDA and not event.is_user_annotation
            collective = "nccl" in event.name.lower()
        else:
            collective = event.name.startswith("gloo:")
            wanted = collective or event.name.startswith("aten::")
        if wanted:
            spans[collective].append((event.time_range.start, event.time_range.end))
    return overlap(spans[True], spans[False])


def overlap(collectives: list[tuple[float, float]], work: list[tuple[float, float]]) -> tuple[float, float]:
    """(collectives' share of the time from first to last, share of theirs in which work runs too) of [start, end)."""
    if not collectives:
        return 0.0, 0.0
    everything = collectives + work
    span = max(end for _, end in everything) - min(start for start, _ in everything)
    busy = _covered(collectives)
    return busy / span, max(0.0, busy + _covered(work) - _covered(everything)) / busy


def _covered(spans: list[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "llama3-8b",
    tokens: Annotated[str, typer.Option(help="tokens of a sample, comma-separated")] = "32768,8192",
    variants: Annotated[str, typer.Option(help="comma-separated, from tools/bench_model.py")] = ",".join(PICKED),
    wraps: Annotated[
        str, typer.Option(help="ddp, fsdp2, sequence, sequence-fsdp2; one process runs unwrapped")
    ] = "ddp,fsdp2",
    samples: Annotated[int, typer.Option(help="samples of a step over all ranks; 0 for one on each")] = 0,
    adapters: Annotated[str, typer.Option(help="dtype of the adapters: float32 or bfloat16")] = "float32",
    steps: Annotated[int, typer.Option(help="timed steps after the warm-up")] = 3,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/scaling"),
    seconds: Annotated[float, typer.Option(help="start no run that would last longer than this")] = 1e9,
    warm_up: Annotated[int, typer.Option(help="steps before the timed ones; the first one compiles")] = 2,
    cap: Annotated[
        float, typer.Option(help="seconds of timed steps after which two are enough; one with --warm-layers")
    ] = 1e9,
    warm_layers: Annotated[int, typer.Option(help="compile in a step of so many layers, at least 4; 0 for none")] = 0,
    profiled: Annotated[bool, typer.Option(help="profile one more step for the share of communication")] = True,
    prefetch: Annotated[int, typer.Option(help="fsdp2: layers whose weights are asked for ahead; 0 as FSDP2 does")] = 0,
) -> None:
    """Measure every variant, length and wrapper on the processes that torchrun started; rank 0 writes the results."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if samples % world:
        raise typer.BadParameter(f"--samples {samples} cannot be shared out to {world} processes")
    file = out / f"{shape}-{world}.json"
    # torchrun starts all ranks anew after a crash. Read before rank 0 can write again.
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    before = json.loads(file.read_text()) if start and file.exists() else None
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    more: dict = {"device_id": device} if device.type == "cuda" else {}
    lengths = [int(length) for length in tokens.split(",")]
    # Ranks wait for each other while one compiles, and exchanges for the kernels that were launched before them.
    more["timeout"] = datetime.timedelta(seconds=max(120, max(lengths) // 1000))
    # torchrun's store outlives a start, and with it the addresses of ranks that are gone.
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=more["timeout"]))
    store = dist.PrefixStore(f"start {start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, **more)
    # Layers are compiled one by one: there is nothing to split at DDP's buckets, and it cannot split checkpoints.
    torch._dynamo.config.optimize_ddp = False
    torch.compiler.config.recompile_limit = 64
    kinds = wraps.split(",") if world > 1 else ["none"]
    result = before or {
        "environment": {
            **environment(device),
            "command": " ".join(["torchrun", "--nproc-per-node", str(world), *sys.argv]),
            "backend": backend,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None,
            "nccl_nvls_enable": os.environ["NCCL_NVLS_ENABLE"],
            "began": time.time(),
        },
        "shape": shape,
        "adapters": adapters,
        "processes": world,
        "gate": {},
        "runs": [],
    }

    def write() -> None:
        if rank == 0:
            # In one go: the command may be killed at any time.
            whole = file.with_suffix(".part")
            whole.write_text(json.dumps(result, indent=1) + "\n")
            whole.replace(file)

    def report(record: dict) -> None:
        if rank == 0:
            print(f"{time.time() - result['environment']['began']:.0f} s: {json.dumps(record)}", flush=True)

    by_name = {variant.name: variant for variant in plans.each(variants, Variant.named)}
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        # A single process would be compared with itself.
        if world > 1 and kind not in result["gate"]:
            record = result["gate"][kind] = {}
            attempt(f"gate {kind}", record, write, lambda r=record, k=kind: r.update(gate(shape, device, adapters, k)))
            report({"gate": kind, **record})
    done = [tuple(run[key] for key in ("tokens", "wrap", "variant")) for run in result["runs"]]
    for length, kind, name in in_order(lengths, kinds, list(by_name)):
        if (length, kind, name) in done:
            continue
        run = {"wrap": kind, "variant": name, "tokens": length}
        expected = max((other.get("seconds", 0) for other in result["runs"] if other["tokens"] == length), default=0)
        late = _on_any_rank(time.time() - result["environment"]["began"] + expected > seconds, device)
        result["runs"].append(run)
        if "failed" in result["gate"].get(kind, {}):
            run["skipped"] = "the correctness gate failed"
        elif late:
            run["skipped"] = "out of time"
        else:
            count = samples if kind.startswith("sequence") else samples // world
            parts = (shape, by_name[name], max(count, 1), steps, warm_up, cap, device, adapters)
            parts += (warm_layers, profiled, prefetch)
            attempt(f"{kind} {name} {length}", run, write, lambda r=run, p=parts: measure(r, write, *p))
        write()
        report(run)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
