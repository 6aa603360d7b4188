"""What the commands can be told: groups of options as dataclasses, whose fields hold each option's default and help.

Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_fx.config import Elimination, LemoConfig, check_seed
from lemo_fx.errors import ConfigError, InputError

USUAL = "careful"
"""The preset where no plan is given."""


def folder(path: str | Path) -> Path:
    """A folder as an option names it; an empty name, such as that of a variable that is not set, is a mistake."""
    if not str(path):
        raise typer.BadParameter("the name is empty: give a folder")
    return Path(path)


Out = Annotated[Path, typer.Option(help="Folder for the files that are written.", parser=folder, metavar="<path>")]
Lengths = Annotated[str, typer.Option(help="Tokens of a sequence; several lengths with commas.")]
Rank = Annotated[int, typer.Option(help="Of the LoRA adapters.")]
Targets = Annotated[str, typer.Option(help="Modules that get adapters: all-linear, or names with commas.")]
LoadIn = Annotated[str | None, typer.Option(help="Hold the base model in 4bit (NF4, QLoRA) or 8bit, by bitsandbytes.")]
Attention = Annotated[str | None, typer.Option(help="Attention implementation: sdpa, flex_attention, ...")]
Checkpointing = Annotated[bool, typer.Option(help="Activation checkpointing.")]
FittedBefore = Annotated[Path | None, typer.Option(help="Folder that `lemo-fx fit` made.")]
ModelName = Annotated[
    str, typer.Argument(help="Folder of a transformers model, or its name on the Hub: owner/name, owner/name@revision.")
]
Shape = Annotated[
    str, typer.Argument(help="Folder or Hub name of a transformers model, or its config.json (random weights).")
]
DATA_HELP = (
    "A .jsonl, .json, .csv, .tsv, .parquet or text file, a folder of them, or a data set on the Hub "
    "(owner/name, owner/name:config, owner/name@split). Rows: text; messages; conversations (ShareGPT); prompt and "
    "completion; instruction and output (Alpaca); input_ids."
)
DataName = Annotated[str, typer.Argument(help=DATA_HELP)]


@dataclass(frozen=True)
class PlanOptions:
    """A plan: a preset, changed by what is given beside it, or a file."""

    plan: Annotated[Path | None, typer.Option(help="A LemoConfig as JSON.")] = None
    preset: Annotated[
        str | None, typer.Option(help="A measured plan: careful (the default), balanced, fast, or dense.")
    ] = None
    keep: Annotated[float | None, typer.Option(help="Share of the token blocks that stay, in (0, 1].")] = None
    slope: Annotated[
        float | None,
        typer.Option(help="How much more the last layer keeps than the first; 0 beside --keep, the preset's else."),
    ] = None
    eliminated: Annotated[
        str | None, typer.Option(help="What happens to eliminated tokens: skip, stand_in or exact.")
    ] = None
    score: Annotated[
        str | None,
        typer.Option(help="What ranks the blocks: measured, predicted (train fits first), random, step or auto."),
    ] = None
    keys: Annotated[
        str | None,
        typer.Option(help="Which keys the gradient of a kept query knows (exact only): kept, or every for few labels."),
    ] = None
    block_size: Annotated[int | None, typer.Option(help="Tokens per block.")] = None
    offload: Annotated[
        bool | None, typer.Option(help="What checkpointed layers keep for the backward waits in host memory.")
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def config(self) -> LemoConfig:
        """The plan."""
        given = self.given
        changes: dict[str, Any] = {name: given.pop(name) for name in ("block_size", "offload") if name in given}
        if self.plan is not None:
            if len(given) > 1 or "block_size" in changes:
                raise InputError(
                    "the plan is in a file: leave out --preset, --keep, --slope, --eliminated, --score, --keys and "
                    "--block-size"
                )
            return dataclasses.replace(plan_from(self.plan), **changes)
        usual = LemoConfig.preset(given.pop("preset", USUAL))
        if given:
            if not usual.eliminations:
                raise InputError(f"--preset {self.preset} eliminates nothing: leave out --{next(iter(given))}")
            # A preset's slope belongs to its keep, and to `exact`.
            if "keep" in given or given.get("eliminated", "exact") != "exact":
                given.setdefault("slope", 0.0)
            changes["attention"] = dataclasses.replace(usual.attention or Elimination(), **given)
            given.pop("keys", None)
            changes["mlp"] = dataclasses.replace(usual.mlp or Elimination(), **given)
        return dataclasses.replace(usual, **changes)


def plan_from(path: Path) -> LemoConfig:
    """The plan in a file."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    try:
        return LemoConfig.from_dict(given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Job:
    """What a training run reads and leaves."""

    model: ModelName
    data: DataName
    out: Out = Path("lemo-train")
    heldout: Annotated[
        str | None, typer.Option("--eval", help="Data for the held-out loss; by default a part of DATA is held out.")
    ] = None
    predictors: FittedBefore = None
    resume: Annotated[
        bool, typer.Option(help="Go on with the run in --out from its last checkpoint; --steps may be more.")
    ] = False
    preview: Annotated[
        bool, typer.Option(help="Show the first step's windows, and what of them is learnt; no training.")
    ] = False
    report_to: Annotated[str, typer.Option(help="Also log to: wandb, tensorboard, or several with commas.")] = ""
    compare_with: Annotated[
        Path | None, typer.Option(help="Another run's folder, such as one of --preset dense, for the page.")
    ] = None
    merge: Annotated[bool, typer.Option(help="Also write the whole model with the adapter merged in.")] = False
    push: Annotated[str | None, typer.Option(help="Also upload the adapter to this name on the Hub (private).")] = None

    @property
    def reporters(self) -> list[str]:
        """Names for the Trainer's `report_to`."""
        return [name.strip() for name in self.report_to.split(",") if name.strip()]


@dataclass(frozen=True)
class Settings:
    """How a run trains, besides the plan."""

    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window of text, at most; by default as long as the longest document (at least 4096) and "
            "no longer than the model reads."
        ),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; by default as many as --epochs take.")] = None
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0
    batch: Annotated[
        int | None,
        typer.Option(help="Windows of a step, over all devices; one at a time is on a device. One per device."),
    ] = None
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4
    scheduler: Annotated[
        str, typer.Option(help="How the rate falls: cosine, linear, constant_with_warmup, ... (transformers' names).")
    ] = "cosine"
    warmup: Annotated[float, typer.Option(help="Steps over which the rate rises; below 1, a share of all.")] = 0.03
    rank: Rank = 16
    alpha: Annotated[int | None, typer.Option(help="Of the LoRA adapters; twice the rank.")] = None
    dropout: Annotated[float, typer.Option(help="Of the LoRA adapters.")] = 0.0
    targets: Targets = "all-linear"
    load_in: LoadIn = None
    eval_share: Annotated[float, typer.Option(help="Of the tokens, held out where there is no --eval.")] = 0.1
    eval_windows: Annotated[int, typer.Option(help="Held-out windows, at most.")] = 32
    eval_every: Annotated[int | None, typer.Option(help="Steps between held-out losses; a tenth of all.")] = None
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; a tenth of all.")] = None
    pack: Annotated[bool, typer.Option(help="Short documents share a window, none seeing another.")] = True
    assistant_only: Annotated[
        bool, typer.Option(help="Of chats, learn only what the assistant says; of prompts nothing is learnt anyway.")
    ] = False
    checkpointing: Checkpointing = True
    compile: Annotated[
        bool | None, typer.Option(help="Compile every decoder layer (torch.compile); by default on a GPU.")
    ] = None
    attention: Attention = None
    seed: Annotated[int, typer.Option(help="Of the adapters, the order, and what is held out.")] = 0

    def __post_init__(self) -> None:
        counts = ("context", "steps", "batch", "rank", "alpha", "eval_windows", "eval_every", "save_every")
        for name in ("epochs", "rate", *counts):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r} must be a number greater than 0")
        if not 0 < self.eval_share < 1:
            raise ConfigError(f"eval_share={self.eval_share!r} must lie between 0 and 1")
        if not 0 <= self.warmup < math.inf:
            raise ConfigError(f"warmup={self.warmup!r} must be a number of steps, or a share below 1 of all")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} must be at least 0 and below 1")
        check_load_in(self.load_in)
        check_seed(self.seed)


def check_load_in(load_in: str | None) -> None:
    """Raise ConfigError where bitsandbytes has no such format."""
    if load_in not in (None, "4bit", "8bit"):
        raise ConfigError(f"load_in={load_in!r} is not one of '4bit', '8bit'")


def modules_of(targets: str) -> str | tuple[str, ...]:
    """PEFT's `target_modules` of an option: "all-linear", or names."""
    return targets if targets == "all-linear" else tuple(name.strip() for name in targets.split(",") if name.strip())


def lengths_of(text: str) -> tuple[int, ...]:
    """Numbers of tokens, each once."""
    try:
        lengths = tuple(dict.fromkeys(int(length) for length in text.split(",")))
    except ValueError as error:
        raise InputError(f"--context {text!r} must be a number of tokens, or several with commas") from error
    if min(lengths) < 1:
        raise InputError(f"--context {text!r}: a sequence has at least one token")
    return lengths


@dataclass(frozen=True)
class BenchSettings:
    """How the steps of a benchmark are made."""

    context: Lengths = "4096"
    steps: Annotated[int, typer.Option(help="Timed steps of each plan; one more comes first, which compiles.")] = 3
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 1
    rank: Rank = 16
    targets: Targets = "all-linear"
    load_in: LoadIn = None
    checkpointing: Checkpointing = True
    compile: Annotated[
        bool | None, typer.Option(help="Compile every decoder layer, but for the plain script; by default on a GPU.")
    ] = None
    attention: Attention = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be greater than 0")
        check_load_in(self.load_in)
        lengths_of(self.context)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens of a sequence, one length after the other."""
        return lengths_of(self.context)


LEMO = "lemo"
DEMO_PLANS = {
    "careful": "careful, the default",
    "balanced": "balanced, without float8",
    "fast": "fast, without float8",
    LEMO: "LeMo's own rule",
}
"""What the demonstration's runs beside plain LoRA are called."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration does."""

    steps: Annotated[
        int, typer.Option(min=2, help="Training steps of each run, a window of text each; the first is not timed.")
    ] = 4
    context: Annotated[int, typer.Option(help="Tokens per window of text; the model reads up to 4096.")] = 2048
    plans: Annotated[str, typer.Option(help="Of careful, balanced, fast and lemo, with commas.")] = "careful,fast,lemo"
    predicted: Annotated[
        bool, typer.Option("--predicted", help="Train predictors first, which name LeMo's blocks; else measured.")
    ] = False
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows for perplexity.")] = 2
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3
    seed: Annotated[int, typer.Option(help="Of the adapters and of the order of the texts.")] = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate={self.rate!r} must be a number greater than 0")
        check_seed(self.seed)
        for name in self.plans.split(","):
            if name not in DEMO_PLANS:
                raise ConfigError(f"plan {name!r} is not one of {', '.join(DEMO_PLANS)}")
