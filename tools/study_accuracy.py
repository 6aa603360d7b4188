"""What elimination costs in quality: long-context LoRA of a base model under many plans, beside simple rivals.

Every run starts from the same base and sees the same tokens in the same order as every other run of its seed. Results
are appended to a file as runs end, and runs that are in it already are skipped, so the study can be made in pieces:

    python tools/train_small_model.py --corpus corpus --out base --hidden 768 --intermediate 2048 --layers 12 \
        --heads 12 --kv-heads 4 --vocab-size 16384 --context 2048 --batch 64 --rate 1e-3 --minutes 5
    python tools/study_accuracy.py run --base base --corpus corpus --out study --plans lora,exact-0.25 --seeds 0,1,2
    python tools/study_accuracy.py table study/results.jsonl --out benchmarks/accuracy
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import long_tasks
import numpy as np
import plain_exact
import plans
import rivals
import torch
import torch.nn.functional as F
import transformers
import typer
from bench_model import between, environment, mark, wait
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from plain_exact import Exact, Float8
from plot_benchmarks import words
from train_small_model import WindowSampler, encode_documents, learning_rate_share, read_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo_fx
from lemo_fx import Elimination, LemoConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLOURS = {
    "exact": "#2e7d4f",
    "step": "#7a3f9d",
    "skip": "#2f6fb0",
    "lemo": "#2f6fb0",
    "stand_in": "#b8860b",
    "truncated": "#a33",
}
DENSE = LemoConfig(attention=None, mlp=None)
PASSAGE, KEY = 48, 16
PROBES = (0, 1, 4)
"""Retrieval: tokens of a planted passage, how many of them ask for the rest, and how many passages are planted."""
KEYS = tuple(f"keys-{keys}" for keys in PROBES)
BENCH_TOKENS = 32768
"""Length at which `bench_model` says how fast a plan is."""
BLOCK = 64
"""Tokens of a block whose labels count or not."""
SHORT_CONTEXT, SURPRISE = 1024, 2.0
"""Key tokens: those that the base predicts at least so many nats better with the whole window before them than with at
most so many tokens, and with at most so many nats (LongPPL, arXiv 2410.23771)."""


@dataclass(frozen=True)
class Plan:
    """One way to fine-tune.

    Attributes:
        config: what lemo_fx does in training, or a function that says so for a number of layers; None leaves attention
            and MLP dense.
        tokens: share of every training window that is used, from its start (truncation).
        steps: steps of this run as a multiple of the others'.
        finish: share of the steps, at the end, that run dense.
        rival: a context that changes the model while it trains, from `rivals`.
        plain: elimination as `plain_exact` does it, in the place of `config`.
        rate: learning rate as a multiple of the others'.
        windows: windows of a step as a multiple of the others'.
        labels: share of every window's blocks whose labels count, drawn anew in every step; everything is computed.
    """

    config: LemoConfig | Callable[[int], LemoConfig] | None = None
    tokens: float = 1.0
    steps: float = 1.0
    finish: float = 0.0
    rival: Callable[[Any], Any] | None = None
    plain: Exact | None = None
    rate: float = 1.0
    windows: float = 1.0
    labels: float = 1.0


def deeper_half(**settings: Any) -> Callable[[int], LemoConfig]:
    """LeMo as its artifact sets it: attention only, the layers of the upper half, the last one dense."""

    def config(layers: int) -> LemoConfig:
        dense = (*range(layers // 2), layers - 1)
        return LemoConfig(attention=Elimination(keep=0.4, **settings), mlp=None, dense_layers=dense)

    return config


def like(name: str, **settings: Any) -> Plan:
    """A plan of `plans.py`, run otherwise than the others."""
    return Plan(plans.named(name), **settings)


def unequal(attention: float, mlp: float) -> Plan:
    """One choice a step, all in float8, of which attention and MLP keep different shares."""
    config = plans.named(f"step-{attention}-both-float8")
    return Plan(replace(config, mlp=replace(config.attention, keep=mlp)))


KEEPS = (0.0625, 0.125, 0.25, 0.5)
MORE_STEPS = {
    "step-0.375-float8": 1.36,
    "step-0.5-both-float8": 1.28,
    "step-0.375-both-float8": 1.46,
    "step-0.5-slope-0.6-both-float8": 1.36,
    "step-0.5-both-float8-last-two": 1.24,
    "step-0.375-both-float8-last-two": 1.4,
    "step-0.25-both-float8-last-two": 1.58,
}
"""As many as fit into 0.6 of LoRA's time at the speed that was measured or expected then."""
NOTHING = Float8(forward=False, recompute=False, gradient=False, dense=False)
ROUNDED = {
    "bf16": None,
    "float8": Float8(),
    **{f"float8-{part}": replace(NOTHING, **{part: True}) for part in ("forward", "recompute", "gradient", "dense")},
    "float8-weights": Float8(inputs=False),
    "float8-inputs": Float8(weights=False),
    "float8-slow": Float8(fast=False),
    "int8": Float8(weights_to="int8", inputs_to="int8"),
    "int8-weights-float8-inputs": Float8(weights_to="int8"),
    "int8-weights": Float8(weights_to="int8", inputs=False),
    "int8-inputs": Float8(inputs_to="int8", weights=False),
    "int8-but-down": Float8(weights_to="int8", inputs_to="int8", but=("down_proj",)),
    "float8-but-kv": Float8(but=("k_proj", "v_proj")),
    "float8-but-qkv": Float8(but=("q_proj", "k_proj", "v_proj")),
    "float8-attention": Float8(attention=True),
    "float8-mean": Float8(mean=True),
    "float8-once": Float8(mean=True, once=True),
    "float8-centred": Float8(centred=True),
    "float8-redraw": Float8(redraw=True),
    "float8-finish": Float8(until=0.85),
    "float8-redraw-finish": Float8(redraw=True, until=0.9),
}
"""What of "balanced" (keep 0.5, slope 0.6) is rounded, and how."""
PLAIN = {
    **{f"plain-{keep}-{keys}": Exact(keep, keys=keys) for keep in KEEPS for keys in ("kept", "every", "complete")},
    **{f"plain-balanced-{name}": Exact(0.5, 0.6, float8=float8) for name, float8 in ROUNDED.items()},
    **{f"plain-balanced-bf16-block-{block}": Exact(0.5, 0.6, block=block) for block in (16, 256, 1024)},
    "plain-careful": Exact(0.4375, 0.5),
    "plain-fast": Exact(0.375, 0.6, float8=Float8()),
    "plain-fast-float8-mean": Exact(0.375, 0.6, float8=ROUNDED["float8-mean"]),
    "plain-fast-float8-once": Exact(0.375, 0.6, float8=ROUNDED["float8-once"]),
    "plain-fast-float8-centred": Exact(0.375, 0.6, float8=ROUNDED["float8-centred"]),
    "plain-balanced-every-float8-centred": Exact(0.5, 0.6, keys="every", float8=ROUNDED["float8-centred"]),
    **{f"plain-tokentune-{keep}": Exact(keep, block=1, keys="every", dense=()) for keep in (0.25, 0.4375)},
    **{
        f"plain-spaco-{keep}": Exact(keep, block=1024, keys="every", compensated=True, dense=())
        for keep in (0.25, 0.4375)
    },
    "plain-fast-int8": Exact(0.375, 0.6, float8=ROUNDED["int8"]),
}
DENSE_FINISH = {
    "step-0.25": 0.25,
    "step-0.125": 0.25,
    "exact-0.25": 0.25,
    "exact-0.125": 0.3,
    "step-0.375-slope-0.6-both-float8": 0.1,
}
# Of 12 layers the first sparse one keeps 0.25 and the last one 0.5, or the other way round.
RAMP = 0.25 * 11 / 9
PLANS: dict[str, Plan] = {
    "lora": Plan(),
    "lora-0.5-steps": Plan(steps=0.5),
    "lora-0.45-steps": Plan(steps=0.45),
    "lora-0.33-steps": Plan(steps=0.33),
    "lora-half-batch": Plan(windows=0.5),
    "lora-half-labels": Plan(labels=0.5),
    "truncated-0.5": Plan(tokens=0.5),
    "truncated-0.375": Plan(tokens=0.375),
    "truncated-0.25": Plan(tokens=0.25),
    **{name: Plan(plain=plain) for name, plain in PLAIN.items()},
    "longlora": Plan(rival=rivals.shifted_groups),
    "tokentune-0.25": like("step-0.25", rival=rivals.full_keys),
    "lemo": Plan(deeper_half(score="measured")),
    "lemo-random": Plan(deeper_half(score="random")),
    "lemo-artifact": Plan(deeper_half(score="measured"), rival=rivals.sparse_channels),
    "lemo-finish": Plan(deeper_half(score="measured"), finish=0.15),
    "lemo-balanced": Plan(deeper_half(score="measured", balance=True)),
    "lemo-stand_in": Plan(deeper_half(score="measured", eliminated="stand_in")),
    **{f"{name}-more": like(name, steps=steps) for name, steps in MORE_STEPS.items()},
    "exact-0.25-twice": like("exact-0.25", steps=2.0),
    "exact-0.25-half-more": like("exact-0.25", steps=1.5),
    **{f"{name}-finish": like(name, finish=share) for name, share in DENSE_FINISH.items()},
    "step-0.375-both-float8-more-finish": like("step-0.375-both-float8", steps=1.25, finish=0.1),
    # More of the tokens towards the top or the bottom, in attention or the MLP; about the products of keep 0.375.
    "ramp-up-both-float8": like(f"step-0.375-slope-{RAMP}-both-float8"),
    "ramp-down-both-float8": like(f"step-0.375-slope-{-RAMP}-both-float8"),
    "attention-0.5-mlp-0.3125-both-float8": unequal(0.5, 0.3125),
    "attention-0.25-mlp-0.4375-both-float8": unequal(0.25, 0.4375),
    "exact-0.25-full-keys": like("exact-0.25", rival=rivals.full_keys),
    "exact-0.25-dense-top": Plan(replace(plans.named("exact-0.25"), dense_layers=(0, 9, 10, 11))),
    "exact-0.25-dense-bottom": Plan(replace(plans.named("exact-0.25"), dense_layers=(0, 1, 2, 11))),
    "exact-0.25-attention": Plan(replace(plans.named("exact-0.25"), mlp=None)),
    "exact-0.25-mlp": Plan(replace(plans.named("exact-0.25"), attention=None)),
}
"""Plans that `plans.py` has no name for, or that run otherwise than the others."""
PICKED = (
    "lora",
    "lora-0.5-steps",
    "truncated-0.5",
    "longlora",
    "tokentune-0.25",
    "lemo",
    "step-0.4375-slope-0.5",
    "step-0.5-slope-0.6-both-float8",
    "step-0.375-slope-0.6-both-float8",
)
"""LoRA, its simple and published rivals, and the presets."""


RATES = {"-half-rate": 0.5, "-double-rate": 2.0, "-fourfold-rate": 4.0, "-eightfold-rate": 8.0}
"""Ends of names of plans that train at so many times the learning rate."""


def plan_named(name: str) -> Plan:
    """A plan of `PLANS` or of `plans.py`, at another learning rate if its name ends so.

    Raises:
        ValueError: there is no such plan.
    """
    for end, rate in RATES.items():
        if name.endswith(end):
            return replace(plan_named(name.removesuffix(end)), rate=rate)
    return PLANS[name] if name in PLANS else Plan(plans.named(name))


@dataclass
class Texts:
    """Running text: training windows by seed, held-out windows and retrieval probes of one context."""

    train: list[np.ndarray]
    heldout: torch.Tensor
    probes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    separator: int
    key: torch.Tensor | None = None
    """[N, S - 1] bool: which of the held-out tokens a long context is needed for."""

    def sampler(self, context: int, seed: int, device: torch.device) -> Callable[[int], tuple[Any, Any]]:
        """rows -> (ids, labels), [rows, context] each."""
        windows = WindowSampler(self.train, context, self.separator, device, seed)
        return lambda rows: (windows.batch(rows)[0],) * 2

    @staticmethod
    def cut(x: torch.Tensor, length: int) -> torch.Tensor:
        """What is left of windows that are cut."""
        return x[:, :length]

    def look_at(self, model: torch.nn.Module, batch: int) -> None:
        """Find the key tokens, by what the base predicts."""
        long = token_losses(model.eval(), self.heldout, batch)
        short = torch.full_like(long, -torch.inf)
        stride = SHORT_CONTEXT // 2
        for start in range(0, self.heldout.shape[1] - SHORT_CONTEXT + 1, stride):
            part = token_losses(model, self.heldout[:, start : start + SHORT_CONTEXT], 8 * batch)
            # What the window before this one has predicted from less stays; the rest has at least a stride before it.
            first = stride if start else 0
            short[:, start + first : start + SHORT_CONTEXT - 1] = part[:, first:]
        self.key = (short - long > SURPRISE) & (long < SURPRISE)

    def quick(self, model: torch.nn.Module, batch: int) -> float:
        """Perplexity of a quarter of the held-out windows."""
        return math.exp(token_losses(model, self.heldout[: max(1, len(self.heldout) // 4)], batch).mean().item())

    def figures(self, model: torch.nn.Module, batch: int) -> dict[str, Any]:
        """Held-out figures of a model in eval()."""
        losses = token_losses(model, self.heldout, batch)
        result: dict[str, Any] = {
            "perplexity": math.exp(losses.mean().item()),
            "perplexity_last_quarter": math.exp(losses[:, -(losses.shape[1] // 4) :].mean().item()),
            "window_nats": [round(x, 5) for x in losses.mean(1).tolist()],
        }
        if self.key is not None and self.key.any():
            result["perplexity_key"] = math.exp(losses[self.key].mean().item())
            result["key_share"] = round(self.key.float().mean().item(), 5)
        for name, (ids, answer) in self.probes.items():
            result[name] = retrieval(model, ids, answer, batch)
        return result


@dataclass
class Questions:
    """A task of `long_tasks`: training sequences by seed, and held-out ones."""

    task: long_tasks.Task
    """What is trained on; of "quotes" other documents than what is held out."""
    heldout: torch.Tensor
    owners: torch.Tensor
    everything: bool = False
    """Whether the loss counts all tokens, not those of answers alone."""

    def sampler(self, context: int, seed: int, device: torch.device) -> Callable[[int], tuple[Any, Any]]:
        """rows -> (ids, labels), [rows, context] each."""
        random = np.random.default_rng((1, seed))

        def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            ids, owners = (x.to(device) for x in self.task.batch(random, rows))
            return ids, ids if self.everything else ids.masked_fill(owners == 0, -100)

        return draw

    @staticmethod
    def cut(x: torch.Tensor, length: int) -> torch.Tensor:
        """What is left of sequences that are cut: their end, where the questions are."""
        return x[:, -length:]

    def look_at(self, model: torch.nn.Module, batch: int) -> None:
        """Nothing is to be known of the base."""

    def quick(self, model: torch.nn.Module, batch: int) -> tuple[float, float]:
        """Exact match and nats of a quarter of the held-out questions."""
        return self._answers(model, batch, max(1, len(self.heldout) // 4))

    def figures(self, model: torch.nn.Module, batch: int) -> dict[str, Any]:
        """Held-out figures of a model in eval()."""
        match, nats = self._answers(model, batch, len(self.heldout))
        return {"match": match, "nats": nats}

    def _answers(self, model: torch.nn.Module, batch: int, count: int) -> tuple[float, float]:
        first = int((self.owners > 0).any(0).nonzero()[0])
        nats, right = [], []
        for ids, owners in zip(self.heldout[:count].split(batch), self.owners[:count].split(batch), strict=True):
            with half_precision(ids.device), torch.no_grad():
                logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - first + 1).logits
            loss, match = long_tasks.exact_match(logits, ids[:, first - 1 :], owners[:, first - 1 :])
            nats.append(loss)
            right.append(match.float())
        return torch.cat(right).mean().item(), torch.cat(nats).mean().item()


Data = Texts | Questions


def load_questions(
    base: Path, name: str, corpus: Path | None, context: int, windows: int, device: torch.device
) -> Questions:
    """A task, and held-out sequences of it that no training draws."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    parts = [read_documents(corpus / f"{part}.txt.xz") if corpus else None for part in ("train", "heldout")]
    task, other = (long_tasks.make(name, tokenizer, context, documents) for documents in parts)
    ids, owners = (x.to(device) for x in other.batch(np.random.default_rng((0, 0)), windows))
    return Questions(task, ids, owners)


def load_texts(base: Path, corpus: Path, context: int, windows: int, device: torch.device) -> Texts:
    """The corpus as tokens of the base, and `windows` held-out windows."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    separator = tokenizer.eos_token_id
    train = encode_documents(tokenizer, read_documents(corpus / "train.txt.xz"))
    held = [
        ids for ids in encode_documents(tokenizer, read_documents(corpus / "heldout.txt.xz")) if len(ids) >= context
    ]
    cut = [ids[i : i + context] for ids in held for i in range(0, len(ids) - context + 1, context)]
    order = np.random.default_rng(0).permutation(len(cut))
    chosen = torch.from_numpy(np.stack([cut[i] for i in order[:windows]]).astype(np.int64)).to(device)
    filler = [cut[i] for i in order[windows:]] or cut
    # Passages come from the ends of documents, which no window holds.
    tails = [ids[-PASSAGE:].astype(np.int64) for ids in held if len(ids) % context >= PASSAGE]
    probes = {f"keys-{keys}": make_probes(filler, tails, context, keys, 16, device) for keys in PROBES}
    return Texts(train, chosen, probes, separator)


def make_probes(
    filler: list[np.ndarray], passages: list[np.ndarray], context: int, keys: int, count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` sequences of real text with `keys` planted passages of other documents: (ids, is answer), [count, S].

    A sequence ends with the first tokens of one passage (the key); what followed them there is the answer. The passage
    that is asked for lies in the first half, the others anywhere; `keys=0` plants none, to show what recall is worth.
    """
    random = np.random.default_rng(keys)
    sequences = []
    for probe in range(count):
        chosen = [passages[(probe * 4 + i) % len(passages)] for i in range(max(keys, 1))]
        planted = chosen[:keys]
        body = filler[probe % len(filler)][: context - PASSAGE * (keys + 1)].astype(np.int64)
        places = [random.uniform(0.05, 0.5), *random.uniform(0.05, 0.95, max(keys - 1, 0))]
        parts, last = [], 0
        for place, passage in sorted(zip(places, planted, strict=False), key=lambda pair: pair[0]):
            at = int(place * len(body))
            parts += [body[last:at], passage]
            last = at
        sequences.append(np.concatenate([*parts, body[last:], chosen[0]]))
    ids = torch.from_numpy(np.stack(sequences)).to(device)
    return ids, (torch.arange(context, device=device) >= context - PASSAGE + KEY).expand(ids.shape)


def load_model(base: Path, context: int, stretch: float, seed: int, rank: int, device: torch.device) -> torch.nn.Module:
    """The base with a longer RoPE base and fresh LoRA adapters."""
    config = transformers.AutoConfig.from_pretrained(base)
    trained = config.max_position_embeddings
    theta = config.rope_parameters["rope_theta"] * (context / trained) ** stretch
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    config.max_position_embeddings = context
    config.use_cache = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype).to(device)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    # Adapters in float32 whose products autocast makes in half precision; PEFT alone would cast their inputs up.
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


@torch.no_grad()
def token_losses(model: torch.nn.Module, ids: torch.Tensor, batch: int) -> torch.Tensor:
    """[N, S] ids -> [N, S - 1] nats of each token but the first."""
    losses = []
    for part in ids.split(batch):
        with half_precision(ids.device):
            logits = model(input_ids=part).logits
        losses += [
            F.cross_entropy(row[:-1].float(), target[1:], reduction="none")
            for row, target in zip(logits, part, strict=True)
        ]
    return torch.stack(losses)


@torch.no_grad()
def retrieval(model: torch.nn.Module, ids: torch.Tensor, answer: torch.Tensor, batch: int) -> dict[str, float]:
    """Nats per answer token, and the share of answer tokens that are the most likely ones."""
    nats, right = [], []
    for part, mask in zip(ids.split(batch), answer.split(batch), strict=True):
        with half_precision(ids.device):
            logits = model(input_ids=part, logits_to_keep=PASSAGE + 1).logits[:, :-1].float()
        target, counted = part[:, -PASSAGE:], mask[:, -PASSAGE:]
        loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        nats += loss[counted].tolist()
        right += (logits.argmax(-1) == target)[counted].float().tolist()
    return {"nats": statistics.fmean(nats), "right": statistics.fmean(right)}


def evaluate(
    model: torch.nn.Module, data: Data, batch: int, config: LemoConfig | None, predictors: lemo_fx.Predictors | None
) -> dict[str, Any]:
    """Held-out figures of the dense model with the trained adapter, and of the sparse forward of `config`."""
    model.eval()
    result = data.figures(model, batch)
    sparse = config is not None and any(site.eliminated != "exact" for site in config.eliminations)
    if sparse and isinstance(data, Texts):
        with half_precision(data.heldout.device):
            lemo_fx.transform(model, replace(config, active="always"), predictors=predictors)
        result["sparse_perplexity"] = math.exp(token_losses(model, data.heldout, batch).mean().item())
    model.train()
    return result


def train(
    name: str,
    base: Path,
    texts: Data,
    seed: int,
    args: Arguments,
    device: torch.device,
    fitted: dict[str, lemo_fx.Predictors],
) -> dict[str, Any]:
    """One run of a plan, and its figures."""
    plan = plan_named(name)
    model = load_model(base, args.context, args.stretch, seed, args.rank, device).train()
    config = plan.config(model.config.num_hidden_layers) if callable(plan.config) else plan.config
    if "stand_in" in repr(config) and name not in fitted:
        fitted[name] = fit_stand_ins(model, texts, config, args)
    predictors = fitted.get(name)
    # Within autocast, since transform tries the model's modules and adapters are in float32 here.
    with half_precision(device):
        lemo_fx.transform(model, config or DENSE, predictors=predictors)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.0, fused=device.type == "cuda")
    draw = texts.sampler(args.context, seed, device)
    steps = round(args.steps * plan.steps)
    length = round(args.context * plan.tokens)
    rows = round(args.batch * plan.windows)
    random = torch.Generator().manual_seed(seed)
    losses, durations, curve = [], [], []
    changed = plan.rival(model) if plan.rival else nullcontext()
    if plan.plain:
        changed = plain_exact.exact(model, plan.plain, seed, steps)
    with changed:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(steps):
            if plan.finish and step == round(steps * (1 - plan.finish)):
                lemo_fx.set_dense(model)
            for group in optimizer.param_groups:
                group["lr"] = args.rate * plan.rate * learning_rate_share((step + 1) / (steps + 1), 0.1)
            batches = [[texts.cut(x, length) for x in draw(rows)] for _ in range(args.accumulate)]
            if plan.labels < 1:
                batches = [[ids, some_labels(labels, plan.labels, random)] for ids, labels in batches]
            start, loss = mark(device), torch.zeros((), device=device)
            for ids, labels in batches:
                with half_precision(device):
                    part = model(input_ids=ids, labels=labels).loss / args.accumulate
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            durations.append((start, mark(device)))
            if args.curve and (step + 1) % args.curve == 0 and step + 1 < steps:
                model.eval()
                curve.append((step + 1, texts.quick(model, args.batch)))
                model.train()
    wait(device)
    values = torch.stack(losses).tolist()
    if not all(map(math.isfinite, values)):
        raise ArithmeticError(f"{name}: the training loss is not finite")
    times = [between(*pair) for pair in durations]
    result = {
        "plan": name,
        "context": args.context,
        "seed": seed,
        "steps": steps,
        "tokens_per_step": rows * length * args.accumulate,
        "rate": args.rate * plan.rate,
        "first_loss": round(statistics.fmean(values[:5]), 4),
        "last_loss": round(statistics.fmean(values[-5:]), 4),
        "step_ms": round(statistics.median(times), 2) if args.timing else None,
        "curve": curve,
        "config": repr(plan.plain or config),
    }
    if device.type == "cuda":
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    kept = [row.kept_share for row in lemo_fx.report(model).sites if row.kept_share is not None] if config else []
    result["kept_share"] = round(statistics.fmean(kept), 4) if kept and not plan.finish else None
    # The dense model with the adapter: in eval() a transformed model runs its original code.
    result.update(evaluate(model, texts, args.batch, config, predictors))
    if plan.plain and plan.plain.float8 and isinstance(texts, Texts):
        with plain_exact.in_float8(model.eval(), Float8()):
            result["perplexity_in_float8"] = math.exp(token_losses(model, texts.heldout, args.batch).mean().item())
        # As after merging into the rounded base.
        with plain_exact.in_float8(model, Float8(inputs=False)):
            result["perplexity_rounded_base"] = math.exp(token_losses(model, texts.heldout, args.batch).mean().item())
    return result


def some_labels(labels: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """Labels [B, S], of which those of so many blocks in each row are left, drawn by chance; the others are -100."""
    blocks = -(-labels.shape[1] // BLOCK)
    order = torch.rand(labels.shape[0], blocks, generator=random).argsort(1)
    counts = (order < round(share * blocks)).repeat_interleave(BLOCK, 1)[:, : labels.shape[1]]
    return labels.masked_fill(~counts.to(labels.device), -100)


def fit_stand_ins(model: torch.nn.Module, texts: Data, config: LemoConfig, args: Arguments) -> lemo_fx.Predictors:
    sequences = texts.sampler(args.context, 1000, torch.device("cpu"))(8)[0]
    lemo_fx.revert(model)
    return lemo_fx.fit(model, sequences, config, rank=args.stand_in_rank, progress=False)


def half_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@dataclass(frozen=True)
class Arguments:
    """What all runs of one call share."""

    context: int
    stretch: float
    steps: int
    batch: int
    accumulate: int
    rank: int
    rate: float
    curve: int
    stand_in_rank: int | None
    timing: bool


def read_results(path: Path) -> list[dict[str, Any]]:
    """One dict a run; the part of a line that a killed run left is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    base: Annotated[Path, typer.Option(help="folder of the base model, from real_base.py or train_small_model.py")],
    out: Annotated[Path, typer.Option(help="folder for results.jsonl")],
    chosen: Annotated[
        str, typer.Option("--plans", help=f"comma-separated: {plans.HELP}; or one of {', '.join(PLANS)}")
    ] = ",".join(PICKED),
    corpus: Annotated[Path | None, typer.Option(help="folder with train.txt.xz and heldout.txt.xz")] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"instead of running text, one of {', '.join(long_tasks.TASKS)}; or quotes (of a corpus)"),
    ] = None,
    everything: Annotated[bool, typer.Option(help="of a task: the loss counts all tokens, not answers alone")] = False,
    seeds: Annotated[str, typer.Option()] = "0",
    context: Annotated[int, typer.Option(help="tokens of a training window")] = 8192,
    stretch: Annotated[
        float,
        typer.Option(
            help="RoPE's base grows by (context / trained length) to this power: 2 is about what Llama's long versions "
            "do (10,000 to 500,000 for eight times the context); with 1, new positions must be learned"
        ),
    ] = 2.0,
    steps: Annotated[int, typer.Option()] = 120,
    batch: Annotated[int, typer.Option(help="windows of a forward")] = 4,
    accumulate: Annotated[int, typer.Option(help="forwards whose gradients a step adds up")] = 1,
    rank: Annotated[int, typer.Option(help="of the adapters")] = 16,
    rate: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    windows: Annotated[int, typer.Option(help="held-out windows, or sequences of a task")] = 32,
    curve: Annotated[int, typer.Option(help="evaluate on a quarter of the held-out windows every so many steps")] = 0,
    stand_in_rank: Annotated[int | None, typer.Option(help="of stand_in maps; None is the default of fit")] = None,
    timing: Annotated[bool, typer.Option(help="note step times: not where runs share a GPU")] = True,
    minutes: Annotated[float, typer.Option(help="start no further run after this long")] = 1e9,
) -> None:
    """Make the runs that are not in the results yet, every plan of a seed before the next seed.

    A run whose loss is not finite is named and leaves no result.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plans.each(chosen, plan_named)
    if corpus is None and task is None:
        raise typer.BadParameter("give a corpus, or a task")
    if (task == "quotes") != (corpus is not None and task is not None):
        raise typer.BadParameter("quotes is the task that takes a corpus, and needs one")
    out.mkdir(parents=True, exist_ok=True)
    args = Arguments(context, stretch, steps, batch, accumulate, rank, rate, curve, stand_in_rank, timing)
    results = out / "results.jsonl"
    kind = f"{task}{'-everything' if everything else ''}" if task else "text"
    done = {(row["plan"], row["context"], row["seed"], row.get("task", "text")) for row in read_results(results)}
    if task is None:
        data: Data = load_texts(base, corpus, context, windows, device)
    else:
        data = replace(load_questions(base, task, corpus, context, windows, device), everything=everything)
    # Figures of the base itself, with the longer RoPE base and an adapter that does nothing yet.
    model = load_model(base, context, stretch, 0, rank, device)
    data.look_at(model, batch)
    print(f"{kind} ready [{time.perf_counter() - began:.0f} s]", flush=True)
    if ("none", context, 0, kind) not in done:
        figures = evaluate(model, data, batch, None, None)
        write(results, {"plan": "none", "context": context, "seed": 0, "task": kind, **figures}, device)
    del model
    todo = [(plan, int(seed)) for seed in seeds.split(",") for plan in chosen.split(",")]
    fitted: dict[str, lemo_fx.Predictors] = {}
    for number, (plan, seed) in enumerate(todo):
        if (plan, context, seed, kind) in done:
            continue
        if time.perf_counter() - began > minutes * 60:
            print(f"out of time: {len(todo) - number} runs are left", flush=True)
            break
        start = time.perf_counter()
        try:
            row = train(plan, base, data, seed, args, device, fitted)
        except ArithmeticError as error:
            print(f"seed {seed}: {error}", flush=True)
            continue
        row.update(task=kind, arguments=asdict(args), seconds=round(time.perf_counter() - start, 1))
        write(results, row, device)


@app.command()
def rounding(
    base: Annotated[Path, typer.Option(help="as of `run`")],
    corpus: Annotated[Path, typer.Option(help="as of `run`")],
    out: Annotated[Path, typer.Option(help="folder for rounding.jsonl")],
    context: Annotated[int, typer.Option()] = 8192,
    stretch: Annotated[float, typer.Option()] = 2.0,
    windows: Annotated[int, typer.Option()] = 16,
    chosen: Annotated[str, typer.Option("--cases", help="separated by semicolons; all of them unless given")] = "",
) -> None:
    """Perplexity of the base itself where products are rounded to float8: which ones cost what, without training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    texts = load_texts(base, corpus, context, windows, device)
    model = load_model(base, context, stretch, 0, 8, device).eval()
    linears = tuple(TARGETS)
    cases: dict[str, Float8 | None] = {
        "none": None,
        "all": Float8(),
        "all, long sums": Float8(fast=False),
        "weights": Float8(inputs=False),
        "inputs": Float8(weights=False),
        "all, mean corrected": Float8(mean=True),
        "weights, mean corrected": Float8(mean=True, inputs=False),
        "all, mean once": Float8(mean=True, once=True),
        "weights, mean once": Float8(mean=True, once=True, inputs=False),
        "all, centred": Float8(centred=True),
        "weights, centred": Float8(centred=True, inputs=False),
        "inputs, centred": Float8(centred=True, weights=False),
        **{name: ROUNDED[name] for name in ROUNDED if name.startswith("int8")},
        **{f"only {name}": Float8(but=tuple(x for x in linears if x != name)) for name in linears},
        **{f"all but {name}": Float8(but=(name,)) for name in linears},
        **{f"all but the first {first} layers": Float8(first=first) for first in (1, 2, 4, 8, 15)},
    }
    if chosen:
        wanted = chosen.split(";")
        if unknown := [name for name in wanted if name not in cases]:
            raise typer.BadParameter(f"{unknown[0]!r} is none of: {'; '.join(cases)}")
        cases = {name: cases[name] for name in wanted}
    for name, how in cases.items():
        with plain_exact.in_float8(model, how) if how else nullcontext():
            losses = token_losses(model, texts.heldout, 2)
        row = {"case": name, "context": context, "perplexity": math.exp(losses.mean().item())}
        with (out / "rounding.jsonl").open("a") as file:
            file.write(json.dumps({**row, "environment": environment(device, "trained")}) + "\n")
        print(f"{name:32s} {row['perplexity']:.4f}", flush=True)


def write(path: Path, row: dict[str, Any], device: torch.device) -> None:
    """Append one line, and say its figures."""
    with path.open("a") as file:
        file.write(json.dumps({**row, "environment": environment(device, "trained")}) + "\n")
    shown = (
        "plan",
        "context",
        "seed",
        "perplexity",
        "perplexity_last_quarter",
        "perplexity_key",
        "perplexity_in_float8",
        "perplexity_rounded_base",
        "sparse_perplexity",
        "match",
        "nats",
        "curve",
        "step_ms",
        "peak_gb",
    )
    keys = [f"{name} {row[name]['nats']:.2f}/{row[name]['right']:.2f}" for name in KEYS if name in row]
    print(
        *(f"{row[name]:.3f}" if isinstance(row[name], float) else row[name] for name in shown if name in row),
        *keys,
        f"{row.get('seconds', 0)} s",
        flush=True,
    )


@dataclass(frozen=True)
class Summary:
    """One plan at one context over its seeds; gaps are to plain LoRA of the same seed, in percent of perplexity.

    Attributes:
        gaps, last_gaps, key_gaps: over all tokens, the last quarter of every window and key tokens (none where a study
            did not look for them); one figure a seed.
        sparse_gap: of the sparse forward, to plain LoRA's dense one.
        keys: nats per answer token and share of right answers, by probe.
        step, memory: shares of plain LoRA's in the same study (eager, not checkpointed).
        curve: perplexity by step, mean over the seeds.
    """

    plan: str
    context: int
    gaps: list[float]
    last_gaps: list[float]
    key_gaps: list[float]
    sparse_gap: float | None
    keys: dict[str, tuple[float, float]]
    step: float | None
    memory: float | None
    curve: list[tuple[int, float]]

    @property
    def gap(self) -> float:
        return statistics.fmean(self.gaps)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.gaps) if len(self.gaps) > 1 else None


def summarise(rows: list[dict[str, Any]]) -> list[Summary]:
    """Every plan and context for which plain LoRA ran with the same seeds."""
    rows = [row for row in rows if row.get("task", "text") == "text"]
    found = {(row["plan"], row["context"], row["seed"]): row for row in rows}
    summaries = []
    for plan, context in dict.fromkeys((row["plan"], row["context"]) for row in rows):
        mine = [row for row in rows if (row["plan"], row["context"]) == (plan, context)]
        pairs = [(row, found["lora", context, row["seed"]]) for row in mine if ("lora", context, row["seed"]) in found]
        if not pairs:
            continue

        def gaps(name: str, pairs: list = pairs) -> list[float]:
            return [100 * (row[name] / lora["perplexity" if "sparse" in name else name] - 1) for row, lora in pairs]

        def mean(name: str, pairs: list = pairs) -> float | None:
            return statistics.fmean(row[name] / lora[name] for row, lora in pairs) if pairs[0][0].get(name) else None

        keys = {
            name: tuple(statistics.fmean(row[name][part] for row, _ in pairs) for part in ("nats", "right"))
            for name in KEYS
            if all(name in row for row, _ in pairs)
        }
        steps = [step for step, _ in pairs[0][0].get("curve", [])]
        curve = [(s, statistics.fmean(row["curve"][i][1] for row, _ in pairs)) for i, s in enumerate(steps)]
        sparse = statistics.fmean(gaps("sparse_perplexity")) if "sparse_perplexity" in pairs[0][0] else None
        summaries.append(
            Summary(
                plan,
                context,
                gaps("perplexity"),
                gaps("perplexity_last_quarter"),
                gaps("perplexity_key") if "perplexity_key" in pairs[0][0] else [],
                sparse,
                keys,
                mean("step_ms"),
                mean("peak_gb"),
                curve,
            )
        )
    return sorted(summaries, key=lambda s: (s.context, s.gap))


def speeds(benches: list[Path], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """(times faster, share of the memory) of plans against checkpointed, compiled LoRA, from bench_model's JSON files.

    Of the whole training: a plan of half the steps or half the windows is twice as fast. What ends dense needs what
    dense steps need. Files are read in order, each against its own LoRA; of several the first counts.
    """
    measured: dict[tuple[str, float], tuple[float, float]] = {("lora", 1.0): (1.0, 1.0)}
    for bench in benches:
        runs = [run for run in json.loads(bench.read_text())["runs"] if "step_ms" in run]
        lora = next(run for run in runs if run["variant"] == "lora-checkpointed" and run["tokens"] == BENCH_TOKENS)
        for run in runs:
            key = run["variant"].removesuffix("-checkpointed"), run["tokens"] / BENCH_TOKENS
            memory = run["peak_allocated_gb"] / lora["peak_allocated_gb"]
            measured.setdefault(key, (lora["step_ms"] / run["step_ms"], memory))
    result = {}
    for name in names:
        try:
            plan = plan_named(name)
        except ValueError:
            # What did not pay is gone from the code and stays in the results.
            continue
        if plan.plain:
            # Written without regard to time.
            continue
        if "measured" in repr(plan.config):
            # The benchmark's `skip` goes by predictors.
            continue
        base = "lora" if plan.config is None and plan.rival is None else name
        variant = base.removesuffix("-finish").removesuffix("-more")
        # One choice a site or one a step: the cost is the same.
        twin = variant.replace("exact-", "step-")
        found = measured.get((variant, plan.tokens)) or measured.get((twin, plan.tokens))
        if found is not None:
            share = (1 - plan.finish) / found[0] + plan.finish
            memory = max(found[1], 1.0 if plan.finish else 0.0)
            result[name] = (1 / (plan.steps * plan.windows * share), memory)
    return result


@app.command()
def table(
    results: Annotated[Path, typer.Argument(help="results.jsonl of `run`")],
    out: Annotated[Path, typer.Option(help="folder for the table (markdown) and the pictures")],
    bench: Annotated[str, typer.Option(help="JSON files of bench_model at 32K, for speed and memory; commas")] = "",
) -> None:
    """The gaps to plain LoRA as a table, and gap against speed as a picture."""
    summaries = summarise(read_results(results))
    benches = [Path(name) for name in bench.split(",") if name]
    fast = speeds(benches, {s.plan for s in summaries} - {"none"}) if benches else {}
    keyed = any(s.key_gaps for s in summaries)
    head = ["context", "plan", "seeds", "gap", "last quarter", *(["key tokens"] if keyed else [])]
    head += ["sparse forward", "no key", "1 key", "4 keys"]
    head += ["step", "memory"]
    head += ["32K, 8B: times faster", "memory"] if fast else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for s in summaries:
        spread = "" if s.spread is None else f" ± {s.spread:.2f}"
        cells = [
            f"{s.context:,}", s.plan, len(s.gaps), f"{s.gap:+.2f}{spread} %", f"{statistics.fmean(s.last_gaps):+.2f} %",
            *([f"{statistics.fmean(s.key_gaps):+.2f} %" if s.key_gaps else ""] if keyed else []),
            "" if s.sparse_gap is None else f"{s.sparse_gap:+.1f} %",
            *(f"{s.keys[k][0]:.2f} nats, {s.keys[k][1]:.0%}" if k in s.keys else "" for k in KEYS),
            *("" if share is None else f"{share:.2f}" for share in (s.step, s.memory)),
        ]  # fmt: skip
        if fast:
            cells += [f"{x:.2f}" for x in fast[s.plan]] if s.plan in fast else ["", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{results.stem}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if fast:
        plot(summaries, fast, out / f"{results.stem}.png")


@app.command()
def answers(
    results: Annotated[Path, typer.Argument(help="results.jsonl of `run` with tasks")],
    out: Annotated[Path, typer.Option(help="folder for the table (markdown)")],
) -> None:
    """Exact match and nats of tasks as a table, means and standard deviations over seeds, with the curve."""
    rows = [row for row in read_results(results) if row.get("task", "text") != "text"]
    lines = []
    for task, context in dict.fromkeys((row["task"], row["context"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["context"]) == (task, context)]
        steps = sorted({step for row in mine for step, _ in row.get("curve", [])})
        head = ["task", "tokens", "plan", "seeds", "exact match", "nats", *(f"at {step}" for step in steps)]
        lines += ["" if lines else None, "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for plan in dict.fromkeys(row["plan"] for row in mine):
            found = [row for row in mine if row["plan"] == plan]
            curve = [[pair[0] for row in found for at, pair in row.get("curve", []) if at == step] for step in steps]
            cells = [task, f"{context:,}", plan, len(found)]
            cells += [spread([row["match"] for row in found], 3), spread([row["nats"] for row in found], 3)]
            cells += [f"{statistics.fmean(x):.2f}" if x else "" for x in curve]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "\n".join(line for line in lines if line is not None) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{results.stem}.md").write_text(text)
    print(text, end="")


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def plot(summaries: list[Summary], fast: dict[str, tuple[float, float]], path: Path) -> None:
    """Perplexity gap against speed; bars are the seeds' standard deviation, the disc's area the memory."""
    contexts = sorted({s.context for s in summaries})
    figure = Figure(figsize=(6 * len(contexts), 4.6), layout="constrained")
    for axes, context in zip(np.atleast_1d(figure.subplots(1, len(contexts))), contexts, strict=True):
        for s in summaries:
            if s.context != context or s.plan not in fast:
                continue
            faster, memory = fast[s.plan]
            colour = next((c for prefix, c in COLOURS.items() if s.plan.startswith(prefix)), "#6b7178")
            axes.errorbar(faster, s.gap, yerr=s.spread or 0, color=colour, capsize=2, lw=1)
            axes.scatter(faster, s.gap, s=120 * memory**2, color=colour, alpha=0.8)
            axes.annotate(words(s.plan), (faster, s.gap), xytext=(5, 4), textcoords="offset points", fontsize=7)
        axes.axhline(1, color="#999", lw=0.8, ls=":")
        axes.set(
            title=f"{context:,} tokens", xlabel="times faster than compiled, checkpointed LoRA (8B, 32K)",
            ylabel="held-out perplexity, % over LoRA",
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app()
