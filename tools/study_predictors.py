"""Train pattern predictors on the small model and measure them: recall, sizes, cost, balance, pictures.

python tools/study_predictors.py profile --corpus corpus --work runs/predictors      # true scores, once (slow part)
python tools/study_predictors.py train --work runs/predictors                        # predictors, tables, pictures
python tools/study_predictors.py balance --work runs/predictors --sequences 8        # loss of the sparse forward
python tools/study_predictors.py limits --work runs/predictors --sequences 8         # recall of parts of the true score
python tools/study_predictors.py thresholds --work runs/predictors --sequences 16    # the same under Algorithm 1
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import json
import lzma
import random
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx
from lemo_fx import Elimination, LemoConfig, Predictors, prediction
from lemo_fx.kernels.select_blocks import reference as selection
from lemo_fx.kernels.select_blocks.reference import balanced
from lemo_fx.predictor_training import Blocks, Recipe, kept, predict, recall, train
from lemo_fx.predictors import identity
from lemo_fx.thresholds import Tuning

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "lemo_fx/demo_assets/model"
LENGTH = 4096
START = 0
"""Token that begins every document in the small model's training."""
KEEP = 0.4


def texts(path: Path, characters: int = -1) -> list[str]:
    with lzma.open(path, "rt") as file:
        return file.read(characters).split("\n\f\n")


def sequences(tokenizer, documents: list[str], count: int, per_document: int, seed: int = 0) -> torch.Tensor:
    """Up to `count` sequences of LENGTH tokens, each within one document and at most `per_document` from each."""
    random.Random(seed).shuffle(documents)
    found: list[list[int]] = []
    for text in documents:
        ids = [START, *tokenizer(text[:80_000], add_special_tokens=False, verbose=False)["input_ids"]]
        starts = list(range(0, len(ids) - LENGTH + 1, LENGTH))[:per_document]
        found += [ids[start : start + LENGTH] for start in starts]
        if len(found) >= count:
            break
    return torch.tensor(found[:count])


def profile(args: argparse.Namespace) -> None:
    from lemo_fx.fit import run_probes

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = {
        "heldout": sequences(tokenizer, texts(args.corpus / "heldout.txt.xz"), args.heldout, 2),
        "train": sequences(tokenizer, texts(args.corpus / "train.txt.xz", args.characters), args.sequences, 1),
    }
    config = LemoConfig(dense_layers=())
    for name, ids in data.items():
        work = args.work / name
        work.mkdir(parents=True)
        torch.save(ids, args.work / f"{name}.pt")
        print(name, tuple(ids.shape), flush=True)
        run_probes(model, list(ids[:, None]), list(range(model.config.num_hidden_layers)), config, work, list)


def read(work: Path, hidden: int, layers: int) -> tuple[dict[tuple[int, str], Blocks], torch.Tensor]:
    """Every site's scored streams, and the sequences; a profile that is still being written is cut to what is whole."""
    names = {(i, kind): work / f"layers.{i}.{kind}" for i in range(layers) for kind in ("attention", "mlp")}
    count = min(Path(f"{path}.stream").stat().st_size for path in names.values()) // 2 // LENGTH // hidden
    block_size = LemoConfig().block_size
    found = {}
    for (i, kind), path in names.items():
        per_sequence = LENGTH // block_size if kind == "attention" else LENGTH
        stream = torch.from_file(f"{path}.stream", size=count * LENGTH * hidden, dtype=torch.float16)
        scores = torch.from_file(f"{path}.scores", size=count * per_sequence, dtype=torch.float32)
        valid = torch.ones(count, LENGTH, dtype=torch.bool)
        found[i, kind] = Blocks(stream.view(count, LENGTH, hidden), scores.view(count, -1), valid, block_size)
    return found, torch.load(work.with_suffix(".pt"))[:count]


def stream_norms(model, ids: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """Per decoder layer [N, n]: mean norm of its input stream's tokens in each block."""
    norms = []
    with torch.no_grad():
        for row in ids:
            states = model.eval()(row[None], output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
            norms.append([h[0].norm(dim=-1).view(-1, block_size).mean(1) for h in states[:-1]])
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


def flop_share(config, widths: dict[str, int], keep: float) -> dict[str, float]:
    """Predictors' share of one checkpointed LoRA step (forward, recompute, input gradients), per decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (2 * hidden + 2 * kv) * keep + 2 * LENGTH * hidden * keep**2
    mlp = 2 * 3 * hidden * inner * keep
    step = 4 * (attention + mlp)
    w, v = widths["attention"], widths["mlp"]
    a_token = 2 * 2 * (hidden * w + w * w) + (2 * 2 * w * w + LENGTH // 64 * (2 * w + 4)) / 64
    predictor = 2 * 2 * hidden + a_token + 2 * (hidden * v + v * v + v)
    return {"predictor_flops_per_token": round(predictor, 1), "step_flops_per_token": step, "share": predictor / step}


def study(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = model.config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    data, _ = read(args.work / "train", hidden, layers)
    heldout, ids = read(args.work / "heldout", hidden, layers)
    count = len(data[0, "mlp"])
    result: dict = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "hardware": "2-core CPU",
        "torch": torch.__version__,
        "seeds": list(range(SEEDS)),
        "keep": KEEP,
        "train_sequences": count,
        "heldout_sequences": len(heldout[0, "mlp"]),
        "tokens_per_sequence": LENGTH,
        "recipe": vars(Recipe()),
    }

    result["losses"], result["pooling"] = compared(data, heldout)
    norms = stream_norms(model, ids, 64)
    generator = torch.Generator().manual_seed(0)
    curves, pictures = {}, {}
    result["sites"] = {}
    for (i, kind), truth in heldout.items():
        runs = [trained(data, heldout, (i, kind), seed) for seed in range(SEEDS)]
        true = truth.block_scores
        shape = true.shape
        position = torch.arange(shape[1]).float().expand(shape)
        rules = {
            "random": torch.rand(shape, generator=generator),
            "recent": position,
            "early": -position,
            "norm": norms[i],
            "positional prior": data[i, kind].block_scores.mean(0).expand(shape),
        }
        predicted, record = runs[0][1], runs[0][2]
        curves[i, kind], pictures[i, kind] = record, predicted
        result["sites"][f"{i}.{kind}"] = {
            "recall": mean_spread([r[0][0] for r in runs]),
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
        print(i, kind, result["sites"][f"{i}.{kind}"]["recall"], flush=True)
    sizes = sum(site["bytes"] for site in result["sites"].values())
    result["bytes"] = {"predictors": sizes, "model": sum(p.numel() for p in model.parameters()) * 2}
    result["flops"] = flop_share(config, {k: Recipe().width_of(k, hidden) for k in ("attention", "mlp")}, KEEP)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recall.json").write_text(json.dumps(result, indent=1) + "\n")
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "tables.md").write_text(tables(result))
    draw(curves, pictures, heldout, args.docs)


def balance(args: argparse.Namespace) -> None:
    """Held-out loss of the sparse forward, per quarter of the sequence, by what chooses attention's blocks."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.load(args.work / "heldout.pt")[: args.sequences]
    plans = {
        "dense": None,
        "LeMo's score": Elimination(keep=KEEP, score="measured"),
        "LeMo's score, balanced": Elimination(keep=KEEP, score="measured", balance=True),
        "random": Elimination(keep=KEEP, score="random"),
        "random, balanced": Elimination(keep=KEEP, score="random", balance=True),
    }
    losses = {}
    for name, elimination in plans.items():
        if elimination is not None:
            lemo_fx.transform(model, LemoConfig(attention=elimination, mlp=None, active="always", loss_segments=None))
        rows = []
        with torch.no_grad():
            for row in ids:
                logits = model(row[None], use_cache=False).logits[0, :-1]
                rows.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
        lemo_fx.revert(model)
        each = torch.stack(rows)
        losses[name] = {
            "all": round(each.mean().item(), 4),
            "quarters": [round(part.mean().item(), 4) for part in each.chunk(4, dim=1)],
        }
        print(name, losses[name], flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "hardware": "2-core CPU",
        "keep": KEEP,
        "sparse": "attention, all layers but the first and the last",
        "heldout_sequences": len(ids),
        "tokens_per_sequence": LENGTH,
        "heldout_loss_nats_per_token": losses,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "balance.json").write_text(json.dumps(result, indent=1) + "\n")


def limits(args: argparse.Namespace) -> None:
    """Recall of the true attention score itself, disturbed or computed from a part of what it is made of."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.load(args.work / "heldout.pt")[: args.sequences]
    found: dict[int, dict[str, list[torch.Tensor]]] = {}

    def observe(layer, attention, _, kwargs):
        rows = kwargs["hidden_states"]
        heads = (*rows.shape[:2], -1, attention.head_dim)
        query, key = (p(rows).view(heads).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        parts: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
        for start in range(0, LENGTH, 64):
            scores = (query[0, :, start : start + 64] @ key[0].transpose(1, 2)).relu()
            causal = torch.arange(LENGTH) <= torch.arange(start, start + 64)[:, None]
            all_heads, half = (torch.where(causal, s.mean(0), 0.0).view(64, -1, 64) for s in (scores, scores[::2]))
            parts["exact"].append(all_heads.amax((0, 2)))
            parts["every 2nd query"].append(all_heads[1::2].amax((0, 2)))
            parts["every 8th query"].append(all_heads[3::8].amax((0, 2)))
            parts["half of the heads"].append(half.amax((0, 2)))
            parts["mean over keys"].append(all_heads.amax(0).mean(1))
        for name, rows in parts.items():
            found.setdefault(layer, {}).setdefault(name, []).append(torch.stack(rows).sum(0))

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(functools.partial(observe, i), with_kwargs=True)
    with torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False, logits_to_keep=1)
    generator = torch.Generator().manual_seed(0)
    result: dict = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "hardware": "2-core CPU",
        "keep": KEEP,
        "heldout_sequences": len(ids),
        "recall": {},
    }
    for i, parts in found.items():
        scores = {name: torch.stack(rows) for name, rows in parts.items()}
        true = scores.pop("exact")
        for noise in (0.02, 0.03, 0.05):
            disturbed = 1 + noise * torch.randn(true.shape, generator=generator)
            scores[f"{noise:.0%} of noise"] = true * disturbed
        real = torch.ones_like(true, dtype=torch.bool)
        result["recall"][i] = {name: round(recall(s, true, real, KEEP), 3) for name, s in scores.items()}
        print(i, result["recall"][i], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "limits.json").write_text(json.dumps(result, indent=1) + "\n")


def fitted(model, data, folder: Path) -> Predictors:
    """Predictors of the default recipe, trained once."""
    if not folder.exists():
        tensors = {}
        for (i, kind), blocks in data.items():
            for name, value in train(kind, blocks, Recipe()).weights.items():
                tensors[f"layers.{i}.{kind}.predictor.{name}"] = value
        Predictors(tensors, identity(model, model.config.num_hidden_layers, LemoConfig().block_size)).save(folder)
    return Predictors.load(folder)


def thresholds(args: argparse.Namespace) -> None:
    """Held-out loss of the sparse forward under Algorithm 1's thresholds and budgets and under simpler rules."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    data, ids = read(args.work / "train", hidden, layers)
    heldout = list(read(args.work / "heldout", hidden, layers)[1][: args.sequences, None])
    predictors = fitted(model, data, args.work / "fitted")
    # Without rounding counts up to buckets, so that kept shares can be equal.
    selection.THRESHOLD_BUCKETS = LENGTH // LemoConfig().block_size
    keep = Elimination(keep=0.5, score="predicted")
    config = LemoConfig(attention=keep, mlp=keep)
    found: dict[str, list] = {}
    for seed in range(SEEDS):
        chosen = random.Random(seed).sample(range(len(ids)), 3)
        lemo_fx.revert(model)
        tuning = Tuning(model, [ids[i][None] for i in chosen], config, predictors)
        shares, losses = tuning.run(iterations=args.iterations)
        tuning.sequences = heldout
        rules = {
            "one threshold for all layers": tuning.thresholds(tuning.single()),
            "multiple of the mean block score": tuning.thresholds(tuning.start()),
            "Algorithm 1, thresholds": tuning.thresholds(shares),
        }
        for name, values in rules.items():
            loss, kept_share = tuning.loss(values)
            found.setdefault(name, []).append([loss, float(np.mean(list(kept_share.values())))])
        budgets = {"uniform keep": dict.fromkeys(shares, 0.5), "Algorithm 1, budgets": shares}
        for name, values in budgets.items():
            for key, parts in tuning.selects.items():
                for part in parts:
                    part.set_keep(values[key])
            loss, kept_share = tuning.loss(dict.fromkeys(shares, None))
            found.setdefault(name, []).append([loss, float(np.mean(list(kept_share.values())))])
        print(seed, losses, {name: rows[-1] for name, rows in found.items()}, flush=True)
    lemo_fx.revert(model)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "hardware": "2-core CPU",
        "sparse": "attention and MLP, skip, predicted scores, all layers but the first and the last",
        "tuning_sequences": 3,
        "heldout_sequences": len(heldout),
        "tokens_per_sequence": LENGTH,
        "loss_and_kept_share": {
            name: {"loss": mean_spread([r[0] for r in rows]), "kept": mean_spread([r[1] for r in rows])}
            for name, rows in found.items()
        },
        "budgets_of_last_seed": {f"{i}.{kind}": round(share, 3) for (i, kind), share in shares.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "thresholds.json").write_text(json.dumps(result, indent=1) + "\n")


SEEDS = 3
LOSS = Recipe().loss
COMPARED = ((5, "attention"), (4, "mlp"))
"""Sites on which losses and poolings are compared."""


_done: dict = {}


def trained(data, heldout, site, seed, loss=LOSS):
    """(recalls, predicted scores on the held-out sequences, record) of one training."""
    key = (site, seed, loss, prediction.POOLING[site[1]])
    if key not in _done:
        done = train(site[1], data[site], Recipe(seed=seed, loss=loss), heldout[site])
        predicted = predict(done.weights, heldout[site])
        size = sum(w.nbytes for w in done.weights.values())
        _done[key] = both_recalls(predicted, heldout[site]), predicted, {**done.record, "bytes": size}
    return _done[key]


def compared(data, heldout) -> tuple[dict, dict]:
    """Recall by loss (SEEDS seeds) and by pooling of the tokens' outputs (one seed)."""
    losses: dict = {}
    pooling: dict = {}
    for site in COMPARED:
        name = f"{site[0]}.{site[1]}"
        for loss in ("regression", "log", "kl"):
            recalls = [trained(data, heldout, site, seed, loss)[0][0] for seed in range(SEEDS)]
            losses.setdefault(name, {})[loss] = mean_spread(recalls)
        print(name, losses[name], flush=True)
        usual = prediction.POOLING[site[1]]
        for how in ("mean", "max", "min"):
            prediction.POOLING[site[1]] = how
            pooling.setdefault(name, {})[how] = round(trained(data, heldout, site, 0)[0][0], 4)
        prediction.POOLING[site[1]] = usual
        print(name, pooling[name], flush=True)
    return losses, pooling


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
    lines += ["", "| kept share by quarter | 1st | 2nd | 3rd | 4th |", "|---|---|---|---|---|"]
    for kind in ("attention", "mlp"):
        chosen = [site["quarters"] for name, site in sites.items() if name.endswith(kind)]
        for name in chosen[0]:
            shares = np.mean([c[name] for c in chosen], axis=0)
            lines += [f"| {kind}, {name} | " + " | ".join(f"{x:.2f}" for x in shares) + " |"]
    lines += ["", "| recall by loss (spread over seeds) | regression | log | kl |", "|---|---|---|---|"]
    for name, found in result["losses"].items():
        lines += [
            f"| layer {name} | " + " | ".join(f"{mean:.3f} ({spread:.3f})" for mean, spread in found.values()) + " |"
        ]
    lines += ["", "| recall by pooling | mean | max | min |", "|---|---|---|---|"]
    for name, found in result["pooling"].items():
        lines += [f"| layer {name} | " + " | ".join(f"{recall:.3f}" for recall in found.values()) + " |"]
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

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, kind in zip(axes, ("attention", "mlp"), strict=True):
        for (i, name), record in curves.items():
            if name == kind:
                smooth = np.convolve(record["losses"], np.ones(20) / 20, "valid")
                axis.plot(smooth, color=pyplot.cm.viridis(i / 8), label=f"layer {i}")
        axis.set(title=f"{kind} predictors", xlabel="training step", ylabel="loss (mean of 20 steps)", yscale="log")
    axes[0].legend(fontsize=7)
    figure.savefig(folder / "loss_curves.png", dpi=110)
    shown = [(1, "attention"), (4, "attention"), (7, "attention"), (4, "mlp")]
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


STAGES = {"profile": profile, "train": study, "balance": balance, "thresholds": thresholds, "limits": limits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--work", type=Path, default=Path("runs/predictors"))
    parser.add_argument("--sequences", type=int, default=300)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--characters", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/predictors")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/predictors")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
