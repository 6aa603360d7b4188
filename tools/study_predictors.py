"""Train pattern predictors on a base model and measure them: recall, sizes, cost, pictures.

python tools/study_predictors.py profile --corpus corpus --work runs/predictors      # true scores, once (slow part)
python tools/study_predictors.py train --work runs/predictors                        # predictors, tables, pictures
python tools/study_predictors.py cost --shape llama3-8b --tokens 32768               # device time of prediction

The base model is the shipped one, or the folder that --model names, to every stage. On a GPU, which one training leaves
mostly idle, several sites are trained side by side:

python tools/study_predictors.py profile --model base --corpus corpus --work work --sequences 192
python tools/study_predictors.py train --model base --work work --out out --docs out --compare "" --workers 8
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import lzma
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from bench_model import SHAPES, between, environment, mark, wait
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx
from lemo_fx import Elimination, LemoConfig, Predictors, measure
from lemo_fx.fitting.training import Blocks, Recipe, kept, predict, recall, train
from lemo_fx.kernels.select_blocks.reference import balanced
from lemo_fx.predictors import fingerprint, hidden_size
from lemo_fx.runtime.kept import take
from lemo_fx.runtime.network import random_weights
from lemo_fx.runtime.scores import ActivationScore, Candidates, PredictedScore

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "lemo_fx/demo_assets/model"
KEEP = 0.4
BLOCK = LemoConfig().block_size
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE).eval()


def surroundings(weights: str) -> dict[str, str]:
    """What a reader needs to repeat the run."""
    found = environment(DEVICE, weights)
    return found if DEVICE.type == "cuda" else {**found, "device": f"{os.cpu_count()}-core CPU"}


def named(model: torch.nn.Module) -> str:
    return f"trained, {type(model).__name__}, {model.num_parameters() / 1e6:.1f}M parameters"


def write(args: argparse.Namespace, result: dict) -> None:
    """Into the JSON of this stage."""
    args.out.mkdir(parents=True, exist_ok=True)
    name = "recall" if args.stage == "train" else args.stage
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def texts(path: Path, characters: int = -1) -> list[str]:
    with lzma.open(path, "rt") as file:
        return file.read(characters).split("\n\f\n")


def sequences(
    tokenizer, documents: list[str], count: int, per_document: int, length: int, seed: int = 0
) -> torch.Tensor:
    """Up to `count` sequences of `length` tokens, each within one document and at most `per_document` from each.

    A document begins with the tokenizer's own first token, or with the one that ends documents where it has none.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    first = [] if start is None else [start]
    random.Random(seed).shuffle(documents)
    found: list[list[int]] = []
    for group in range(0, len(documents), 64):
        # Together: the tokenizer then uses all cores.
        texts = [text[:80_000] for text in documents[group : group + 64]]
        for rest in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids = first + rest
            starts = list(range(0, len(ids) - length + 1, length))[:per_document]
            found += [ids[begin : begin + length] for begin in starts]
        if len(found) >= count:
            break
    if not found:
        sys.exit(f"no document holds {length} tokens")
    return torch.tensor(found[:count])


def profile(args: argparse.Namespace) -> None:
    from lemo_fx.fitting.profile import run_probes

    model = load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    length = args.tokens or min(model.config.max_position_embeddings, 4096)
    if length % (4 * BLOCK):
        sys.exit(f"--tokens {length}: quarters of a sequence must hold whole blocks of {BLOCK} tokens")
    data = {
        "heldout": sequences(tokenizer, texts(args.corpus / "heldout.txt.xz"), args.heldout, 2, length),
        "train": sequences(tokenizer, texts(args.corpus / "train.txt.xz", args.characters), args.sequences, 1, length),
    }
    config = LemoConfig(dense_layers=())
    args.work.mkdir(parents=True, exist_ok=True)
    record = {"environment": surroundings(named(model)), "model": fingerprint(model.config)}
    (args.work / "profile.json").write_text(json.dumps(record))
    for name, ids in data.items():
        work = args.work / name
        work.mkdir()
        torch.save(ids, args.work / f"{name}.pt")
        print(name, tuple(ids.shape), flush=True)
        run_probes(model, list(ids[:, None]), list(range(model.config.num_hidden_layers)), config, work, told)


def told(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The batches, with a line now and then."""
    began = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        yield batch
        if number % 32 == 0:
            print(f"{number} of {len(batches)} profiled [{time.perf_counter() - began:.0f} s]", flush=True)


Site = tuple[int, str]
"""A layer and "attention" or "mlp"."""


def read(work: Path, layers: int, hidden: int) -> tuple[dict[Site, Blocks], torch.Tensor]:
    """Every site's scored streams, and the sequences; a profile that is still being written is cut to what is whole."""
    ids = torch.load(work.with_suffix(".pt"))
    length = ids.shape[1]
    names = {(i, kind): work / f"layers.{i}.{kind}" for i in range(layers) for kind in ("attention", "mlp")}
    count = min(Path(f"{path}.stream").stat().st_size for path in names.values()) // 2 // length // hidden
    found = {}
    for (i, kind), path in names.items():
        per_sequence = length // BLOCK if kind == "attention" else length
        stream = torch.from_file(f"{path}.stream", size=count * length * hidden, dtype=torch.float16)
        scores = torch.from_file(f"{path}.scores", size=count * per_sequence, dtype=torch.float32)
        valid = torch.ones(count, length, dtype=torch.bool)
        found[i, kind] = Blocks(stream.view(count, length, hidden), scores.view(count, -1), valid, BLOCK)
    return found, ids[:count]


def sizes_of(args: argparse.Namespace, model: torch.nn.Module) -> tuple[int, int]:
    """(layers, hidden size) of the model that was profiled, which this must be."""
    if json.loads((args.work / "profile.json").read_text())["model"] != fingerprint(model.config):
        sys.exit(f"{args.work} holds the profile of another model than {args.model}")
    return model.config.num_hidden_layers, hidden_size(model)


def stream_norms(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per decoder layer [N, n]: mean norm of its input stream's tokens in each block."""
    norms = []
    with torch.no_grad():
        for row in ids:
            row = row[None].to(DEVICE)
            states = model.eval()(row, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
            norms.append([h[0].norm(dim=-1).view(-1, BLOCK).mean(1).cpu() for h in states[:-1]])
    return [torch.stack(rows) for rows in zip(*norms, strict=True)]


def both_recalls(predicted: torch.Tensor, blocks: Blocks) -> list[float]:
    """Recall at KEEP of LeMo's choice, and of the balanced choice."""
    true, real = blocks.block_scores, blocks.real
    return [recall(predicted, true, real, KEEP), recall(balanced(predicted), balanced(true), real, KEEP)]


def per_quarter(scores: torch.Tensor, real: torch.Tensor) -> list[float]:
    """Kept share of each quarter of the sequence."""
    return [round(x, 3) for x in kept(scores, real, KEEP).float().view(len(scores), 4, -1).mean((0, 2)).tolist()]


def mean_spread(values: list[float]) -> list[float]:
    return [round(float(np.mean(values)), 4), round(float(max(values) - min(values)), 4)]


def flop_share(model, ids: torch.Tensor) -> dict[str, float]:
    """Predictors' share of the FLOPs of one checkpointed LoRA step on [1, S] ids that skips at both kinds of site.

    As `measure.flops` counts: the whole model, attention without a discount for causal order.
    """
    with_lora = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    flops = {}
    for score in ("predicted", "random"):
        site = Elimination(keep=KEEP, score=score)
        config = LemoConfig(attention=site, mlp=site)
        lemo_fx.transform(with_lora, config, predictors=Predictors.random(model, config))
        flops[score] = measure.flops(lambda: with_lora(input_ids=ids, labels=ids, use_cache=False).loss.backward())
        lemo_fx.revert(with_lora)
    predictor = flops["predicted"] - flops["random"]
    each = {"predictor_flops_per_token": predictor / ids.numel(), "step_flops_per_token": flops["random"] / ids.numel()}
    return {**each, "share": predictor / flops["predicted"]}


def summary(kind: str, sites: dict, recalls: dict[Site, list[float]]) -> dict:
    """Over all sites of a kind; the spread is over the seeds."""
    chosen = {name: site for name, site in sites.items() if name.endswith(kind)}
    least = min(chosen, key=lambda name: chosen[name]["recall"][0])
    over_layers = np.mean([found for (_, of), found in recalls.items() if of == kind], axis=0)
    rules = next(iter(chosen.values()))["rules"]
    return {
        "recall": mean_spread(list(over_layers)),
        "least_layer": [least, *chosen[least]["recall"]],
        "rules": {rule: round(float(np.mean([s["rules"][rule][0] for s in chosen.values()])), 4) for rule in rules},
        "parameters": [sum(site["parameters"][i] for site in chosen.values()) for i in (0, 1)],
        "bytes": sum(site["bytes"] for site in chosen.values()),
    }


def study(args: argparse.Namespace) -> None:
    model = load(args)
    shape = sizes_of(args, model)
    data, _ = read(args.work / "train", *shape)
    heldout, ids = read(args.work / "heldout", *shape)
    result: dict = {
        "environment": surroundings(named(model)),
        "profile": json.loads((args.work / "profile.json").read_text())["environment"],
        "seeds": list(range(args.seeds)),
        "keep": KEEP,
        "train_sequences": len(data[0, "mlp"]),
        "heldout_sequences": len(ids),
        "tokens_per_sequence": ids.shape[1],
        "recipe": vars(Recipe()),
    }
    sites = [(int(i), kind) for i, kind in (name.split(".") for name in args.compare.split(",") if name)]
    result["losses"] = compared(data, heldout, sites, args.seeds)
    norms = stream_norms(model, ids)
    generator = torch.Generator().manual_seed(0)
    curves, pictures, recalls = {}, {}, {}
    result["sites"] = {}
    began = time.perf_counter()
    for site, runs in all_trained(args, shape, list(heldout)):
        i, kind = site
        truth = heldout[site]
        true = truth.block_scores
        positions = torch.arange(true.shape[1]).float().expand(true.shape)
        rules = {
            "random": torch.rand(true.shape, generator=generator),
            "recent": positions,
            "early": -positions,
            "norm": norms[i],
            "positional prior": data[site].block_scores.mean(0).expand(true.shape),
        }
        predicted, record = runs[0][1], runs[0][2]
        curves[site], pictures[site] = record, predicted
        recalls[site] = [r[0][0] for r in runs]
        result["sites"][f"{i}.{kind}"] = {
            "recall": mean_spread(recalls[site]),
            "balanced_recall": mean_spread([r[0][1] for r in runs]),
            "rules": {n: [round(x, 4) for x in both_recalls(r, truth)] for n, r in rules.items()},
            "quarters": {
                "measured": per_quarter(true, truth.real),
                "predicted": per_quarter(predicted, truth.real),
                "measured, balanced": per_quarter(balanced(true), truth.real),
                "predicted, balanced": per_quarter(balanced(predicted), truth.real),
            },
            "parameters": record["parameters"],
            "bytes": record["bytes"],
            "dead": record["dead"],
        }
        write(args, result)
        print(i, kind, result["sites"][f"{i}.{kind}"]["recall"], f"[{time.perf_counter() - began:.0f} s]", flush=True)
    result["summary"] = {kind: summary(kind, result["sites"], recalls) for kind in ("attention", "mlp")}
    size = sum(site["bytes"] for site in result["sites"].values())
    whole = 2 * model.num_parameters()
    result["bytes"] = {"predictors": size, "model": whole, "share": size / whole}
    write(args, result)
    result["flops"] = flop_share(model, ids[:1].to(DEVICE))
    write(args, result)
    print(json.dumps({name: result[name] for name in ("summary", "bytes", "flops")}, indent=1), flush=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "tables.md").write_text(tables(result))
    draw(curves, pictures, heldout, args.docs)


def device_ms(run: Callable[[], object], calls: int = 20) -> float:
    """Median time of a call on the device, after three to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(calls):
        wait(DEVICE)
        if DEVICE.type == "cuda":
            # Some 10 ms of nothing, in which all kernels are queued: in a real step launching is hidden too.
            torch.cuda._sleep(20_000_000)
        start = mark(DEVICE)
        run()
        end = mark(DEVICE)
        wait(DEVICE)
        times.append(between(start, end))
    return statistics.median(times)


class MlpScore(torch.nn.Module):
    """A layer's nodes for an MLP's predicted score: candidates, their norm, their measured score."""

    def __init__(self, weights: dict[str, torch.Tensor], layer: torch.nn.Module) -> None:
        super().__init__()
        self.candidates = Candidates(weights, BLOCK)
        self.norm = layer.post_attention_layernorm
        self.score = ActivationScore(layer.mlp, self.candidates.count)
        self.bytes = self.candidates.bytes

    @torch.no_grad()
    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, n]."""
        return self.score(self.norm(take(stream, self.candidates(stream))))


def cost(args: argparse.Namespace) -> None:
    """Time of a layer's predictors alone; a step runs each once, checkpointed or not, in all but two layers."""
    config = SHAPES[args.shape]()
    layers, hidden = config.num_hidden_layers - 2, config.hidden_size
    tokens = args.tokens or 32768
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    stream = torch.randn(1, tokens, hidden, generator=generator).to(DEVICE, dtype)
    config.num_hidden_layers, config.vocab_size = 1, 128
    layer = AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).model.layers[0]
    sites: dict[str, dict[str, float]] = {}
    for kind in ("attention", "mlp"):
        weights = random_weights(kind, hidden, Recipe().width_of(kind, hidden), generator)
        part = (PredictedScore(weights, BLOCK) if kind == "attention" else MlpScore(weights, layer)).to(DEVICE)
        found: dict[str, float] = {"bytes": part.bytes, "flops": measure.flops(lambda part=part: part(stream))}
        found["eager_ms"] = device_ms(lambda part=part: part(stream))
        torch.compiler.reset()
        compiled = torch.compile(part, fullgraph=True, backend=args.backend)
        found["compiled_ms"] = device_ms(lambda compiled=compiled: compiled(stream))
        sites[kind] = found
        print(kind, found, flush=True)
    both = {name: sum(found[name] for found in sites.values()) for name in sites["mlp"]}
    result = {
        "environment": surroundings("random"),
        "shape": args.shape,
        "tokens": tokens,
        "dtype": str(dtype),
        "sparse_layers": layers,
        "per_site": sites,
        "per_step": {name: layers * value for name, value in both.items()},
        "per_step_shared_selection": {name: layers * value for name, value in sites["attention"].items()},
    }
    print(json.dumps(result["per_step"]), flush=True)
    write(args, result)


LOSS = Recipe().loss
_done: dict = {}


def trained(data, heldout, site, seed, loss=LOSS):
    """(recalls, predicted scores on the held-out sequences, record) of one training."""
    key = (site, seed, loss)
    if key not in _done:
        # The stream alone is large, and read again and again.
        blocks = dataclasses.replace(data[site], stream=data[site].stream.to(DEVICE))
        done = train(site[1], blocks, Recipe(seed=seed, loss=loss), heldout[site], DEVICE)
        predicted = predict(done.weights, heldout[site], DEVICE)
        size = sum(w.nbytes for w in done.weights.values())
        _done[key] = both_recalls(predicted, heldout[site]), predicted, {**done.record, "bytes": size}
    return _done[key]


def trainings(work: Path, shape: tuple[int, int], seeds: int, site: Site) -> tuple[Site, list]:
    """One site, by seed; scores as an array, which passes between processes without sharing memory."""
    data, heldout = (read(work / name, *shape)[0] for name in ("train", "heldout"))
    runs = (trained(data, heldout, site, seed) for seed in range(seeds))
    return site, [(recalls, predicted.numpy(), record) for recalls, predicted, record in runs]


def all_trained(args: argparse.Namespace, shape: tuple[int, int], sites: list[Site]) -> Iterator[tuple[Site, list]]:
    """`trained` by site and seed, in order, as soon as they are ready."""

    def unpacked(found: Iterable) -> Iterator[tuple[Site, list]]:
        for site, runs in found:
            yield site, [(recalls, torch.from_numpy(scores), record) for recalls, scores, record in runs]

    of_site = functools.partial(trainings, args.work, shape, args.seeds)
    if args.workers == 1:
        yield from unpacked(map(of_site, sites))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (args.threads,)) as pool:
        yield from unpacked(pool.map(of_site, sites))


def compared(data, heldout, sites: list[Site], seeds: int) -> dict[str, dict[str, list[float]]]:
    """Recall by loss, at some sites."""
    losses: dict = {}
    for site in sites:
        name = f"{site[0]}.{site[1]}"
        for loss in ("regression", "log", "kl"):
            recalls = [trained(data, heldout, site, seed, loss)[0][0] for seed in range(seeds)]
            losses.setdefault(name, {})[loss] = mean_spread(recalls)
        print(name, losses[name], flush=True)
    return losses


def tables(result: dict) -> str:
    sites = result["sites"]
    rules = list(next(iter(sites.values()))["rules"])
    lines = ["<!-- written by tools/study_predictors.py -->", ""]
    lines += ["| site | recall (spread) | " + " | ".join(rules) + " | balanced: recall (spread) | positional prior |"]
    lines += ["|---" * (len(rules) + 4) + "|"]

    def row(name, rows):
        def mean(get):
            return float(np.mean([get(r) for r in rows]))

        cells = [f"{mean(lambda r: r['recall'][0]):.3f} ({max(r['recall'][1] for r in rows):.3f})"]
        cells += [f"{mean(lambda r, rule=rule: r['rules'][rule][0]):.3f}" for rule in rules]
        cells += [f"{mean(lambda r: r['balanced_recall'][0]):.3f} ({max(r['balanced_recall'][1] for r in rows):.3f})"]
        cells += [f"{mean(lambda r: r['rules']['positional prior'][1]):.3f}"]
        return f"| {name} | " + " | ".join(cells) + " |"

    for kind in ("attention", "mlp"):
        chosen = {name: site for name, site in sites.items() if name.endswith(kind)}
        lines += [row(f"layer {name.split('.')[0]} {kind}", [site]) for name, site in chosen.items()]
        lines += [row(f"**all {kind}**", list(chosen.values()))]
        lines += [row(f"**least {kind}**", [min(chosen.values(), key=lambda site: site["recall"][0])])]
    lines += ["", "| kept share by quarter | 1st | 2nd | 3rd | 4th |", "|---|---|---|---|---|"]
    for kind in ("attention", "mlp"):
        chosen = [site["quarters"] for name, site in sites.items() if name.endswith(kind)]
        for name in chosen[0]:
            shares = np.mean([c[name] for c in chosen], axis=0)
            lines += [f"| {kind}, {name} | " + " | ".join(f"{x:.2f}" for x in shares) + " |"]
    if result["losses"]:
        lines += ["", "| recall by loss (spread over seeds) | regression | log | kl |", "|---|---|---|---|"]
    for name, found in result["losses"].items():
        lines += [
            f"| layer {name} | " + " | ".join(f"{mean:.3f} ({spread:.3f})" for mean, spread in found.values()) + " |"
        ]
    lines += [
        "",
        "| site | parameters before elastic sizing | after | bytes | share of zero activations when pruning |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, site in sites.items():
        dead = ", ".join(f"{x:.0%}" for x in site["dead"])
        lines += [f"| {name} | {site['parameters'][0]} | {site['parameters'][1]} | {site['bytes']} | {dead} |"]
    size = result["bytes"]
    lines += [
        "",
        f"All predictors: {size['predictors']} bytes, {size['predictors'] / size['model']:.2%} of the model's.",
    ]
    lines += [f"Share of one transformed, checkpointed LoRA step's FLOPs: {result['flops']['share']:.3%}.", ""]
    return "\n".join(lines)


def draw(curves: dict, pictures: dict, heldout: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = len(curves) // 2
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, kind in zip(axes, ("attention", "mlp"), strict=True):
        for (i, name), record in curves.items():
            if name == kind:
                smooth = np.convolve(record["losses"], np.ones(20) / 20, "valid")
                axis.plot(smooth, color=pyplot.cm.viridis(i / layers), label=f"layer {i}")
        axis.set(title=f"{kind} predictors", xlabel="training step", ylabel="loss (mean of 20 steps)", yscale="log")
    axes[0].legend(fontsize=7)
    figure.savefig(folder / "loss_curves.png", dpi=110)
    middle = layers // 2
    shown = [(1, "attention"), (middle, "attention"), (layers - 1, "attention"), (middle, "mlp")]
    figure, grid = pyplot.subplots(len(shown), 2, figsize=(11, 9), layout="constrained")
    for row, site in zip(grid, shown, strict=True):
        truth = heldout[site].block_scores
        low, high = (float(x) for x in torch.quantile(truth, torch.tensor([0.02, 0.98])))
        for axis, values, title in zip(row, (truth, pictures[site]), ("measured", "predicted"), strict=True):
            image = axis.imshow(values, aspect="auto", vmin=low, vmax=high, interpolation="nearest")
            axis.set(title=f"layer {site[0]} {site[1]}: {title}", ylabel="held-out sequence")
        figure.colorbar(image, ax=list(row), label="block score")
    for axis in grid[-1]:
        axis.set_xlabel("token block")
    figure.savefig(folder / "prediction.png", dpi=110)


STAGES = {
    "profile": profile,
    "train": study,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the base model and its tokenizer")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"), help="2 H bytes a token for every site")
    parser.add_argument("--tokens", type=int, help="per sequence; the model's longest, but at most 4096 (cost: 32768)")
    parser.add_argument("--sequences", type=int, default=300)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--characters", type=int, default=-1, help="of the training text to read, from its start")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--compare", default="5.attention,4.mlp", help="sites on which losses are compared")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama3-8b", help="of cost")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, in cost")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/predictors")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/predictors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that train sites side by side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
