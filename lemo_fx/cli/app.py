"""The command `lemo-fx`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from lemo_fx.errors import InputError, LemoError

if TYPE_CHECKING:
    from lemo_fx.config import LemoConfig

app = typer.Typer(
    help="Long-context fine-tuning with less memory and less time: token sparsity (LeMo) as torch.fx passes.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console(width=None if sys.stdout.isatty() else 140)
WEIGHT_LIMIT = 8 * 2**30
"""Bytes of weights up to which `inspect` builds a model from its config."""

Out = Annotated[Path, typer.Option(help="Folder for the files that are written.")]
Preset = Annotated[str | None, typer.Option(help="A measured plan: careful (the default), balanced or fast.")]
KEEP = typer.Option(help="Share of the token blocks that stay, in (0, 1].")
Keep = Annotated[float | None, KEEP]
Slope = Annotated[
    float | None,
    typer.Option(help="How much more the last layer keeps than the first; 0 beside --keep, the preset's else."),
]
Treatments = Annotated[str | None, typer.Option(help="What happens to eliminated tokens: skip, stand_in or exact.")]
Scores = Annotated[
    str | None,
    typer.Option(help="What ranks the blocks: measured, predicted (train fits first), random, step or auto."),
]


Plan = Annotated[Path | None, typer.Option("--plan", "--config", help="A LemoConfig as JSON.")]


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except LemoError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


@app.callback()
def _quiet() -> None:
    import logging
    import warnings

    # Progress bars and deprecation notes of the libraries below would drown what is printed here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


@app.command()
def demo(
    out: Out = Path("lemo-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 6,
    context: Annotated[int, typer.Option(help="Tokens per window of text; the model reads up to 4096.")] = 4096,
    keep: Annotated[float, KEEP] = 0.5,
    eliminated: Annotated[
        str, typer.Option(help="Eliminated tokens: skip, exact (at half of --keep, random blocks), or both in turn.")
    ] = "both",
    score: Annotated[str, typer.Option(help="What ranks the blocks: predicted, measured or random.")] = "predicted",
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows for perplexity.")] = 4,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the adapters and of the order of the texts.")] = 0,
) -> None:
    """Fine-tune a small real Llama on long documents, plainly and transformed, and compare. No network, no GPU."""
    with _errors_in_one_line():
        _demo(out, dict(locals()))


def _no_bars_of_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _warn_of_other_load() -> None:
    from lemo_fx.cli.demo import other_load

    if other_load() > 0.5:
        console.print("Other programs are running on this machine: the times below will be too long and uneven.")


def _demo(out: Path, given: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lemo_fx import draw
    from lemo_fx.cli import demo as demonstration
    from lemo_fx.files import check_folder

    check_folder(out)
    _no_bars_of_transformers()
    treatments = ("skip", "exact") if given["eliminated"] == "both" else (given["eliminated"],)
    named = {name: value for name, value in given.items() if name != "out"}
    settings = demonstration.Settings(**{**named, "eliminated": treatments})
    _warn_of_other_load()
    console.print(
        f"LoRA fine-tuning of a small Llama at {settings.context} tokens, {settings.steps} steps: plainly, then "
        "transformed"
    )
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:

        def progress(what: str, parts: int) -> Callable[[], None]:
            task = bar.add_task(what, total=parts)
            return lambda: bar.advance(task)

        outcome = demonstration.run_demo(settings, progress)
    plain = outcome.runs[demonstration.PLAIN]
    table = Table("", *outcome.runs, title=f"{settings.steps} steps at {settings.context} tokens")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (title, show) in demonstration.ROWS.items():
        cells = []
        for run in outcome.runs.values():
            value, reference = getattr(run, name), getattr(plain, name)
            words = "" if run is plain else f" ({demonstration.in_words(name, value / reference)})"
            cells.append(show(value) + words)
        table.add_row(title, *cells)
    console.print(table)
    console.print("Perplexity is taken with every token (the original code), on the same held-out windows for all.")
    if outcome.recall:
        found = ", ".join(f"{recall:.0%} ({kind})" for kind, recall in outcome.recall.items())
        console.print(
            f"Predictors, trained in {outcome.fit_seconds:.0f} s, find these shares of the blocks that measuring would "
            f"keep in a held-out window: {found}."
        )
    console.print(f"{outcome.layer} after the transform:\n")
    _print_code(draw.code(outcome.after, outcome.layer_class))
    _print_paths(demonstration.write(outcome, out, " ".join(["lemo-fx", *sys.argv[1:]])))


def _print_code(text: str) -> None:
    highlighted = Syntax("", "python", theme="ansi_light", background_color="default").highlight(text)
    console.print(highlighted, soft_wrap=True)


def _print_paths(paths: list[Path]) -> None:
    console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model, or its config.json (random weights).")],
    config: Plan = None,
    layer: Annotated[int | None, typer.Option(help="Decoder layer to show; the middle one by default.")] = None,
    out: Out = Path("lemo-inspect"),
    dump: Annotated[Path | None, typer.Option(help="Folder for every layer's graph after each pass.")] = None,
    preset: Preset = None,
    keep: Keep = None,
    slope: Slope = None,
    eliminated: Treatments = None,
    score: Scores = None,
) -> None:
    """Show how a model's layers are rewritten: the graph before and after as code and as a picture, and the report."""
    with _errors_in_one_line():
        plan = _plan(config, preset, None, {"keep": keep, "slope": slope, "eliminated": eliminated, "score": score})
        _inspect(model, dataclasses.replace(plan, active="always"), layer, out, dump)


def _plan(path: Path | None, preset: str | None, block_size: int | None, given: dict[str, Any]) -> LemoConfig:
    from lemo_fx.config import Elimination, LemoConfig

    given = {name: value for name, value in given.items() if value is not None}
    if path is not None:
        if given or preset is not None or block_size is not None:
            raise InputError(
                "the plan is in a file: leave out --preset, --keep, --slope, --eliminated, --score and --block-size"
            )
        return _plan_from(path)
    settings: dict[str, Any] = {} if block_size is None else {"block_size": block_size}
    usual = LemoConfig.preset(preset or "careful")
    if given:
        # A preset's slope belongs to its keep, and to `exact`.
        if "keep" in given or given.get("eliminated", "exact") != "exact":
            given.setdefault("slope", 0.0)
        settings |= {
            "attention": dataclasses.replace(usual.attention or Elimination(), **given),
            "mlp": dataclasses.replace(usual.mlp or Elimination(), **given),
        }
    return dataclasses.replace(usual, **settings)


def _plan_from(path: Path) -> LemoConfig:
    from lemo_fx.config import Elimination, LemoConfig

    given = _read_json(path)
    try:
        sites = {kind: Elimination(**given[kind]) for kind in ("attention", "mlp") if isinstance(given.get(kind), dict)}
        return LemoConfig(**{**given, **sites})
    except TypeError as error:
        raise InputError(
            f"{path}: {error}; it takes the arguments of LemoConfig, and of Elimination per site"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def _inspect(path: Path, plan: LemoConfig, index: int | None, out: Path, dump: Path | None) -> None:
    import lemo_fx
    from lemo_fx import draw
    from lemo_fx.files import check_folder, writing
    from lemo_fx.graph.anatomy import decoder_layers

    for folder in (out, dump):
        if folder is not None:
            check_folder(folder)
    # Frozen, as it is under adapters.
    model = _load_model(path).requires_grad_(False)
    layers = decoder_layers(model)
    if index is not None and not -len(layers) <= index < len(layers):
        raise InputError(f"--layer {index}: the model that was built has {len(layers)} decoder layers")
    shown = layers[len(layers) // 2 if index is None else index] if layers else None
    before = draw.captured(shown[1]) if shown else None
    predictors = None
    if plan.predicts:
        # What they choose means nothing; the graph is that of trained ones.
        predictors = lemo_fx.Predictors.random(model, plan)
        console.print("predictors: untrained, of their real size", highlight=False)
    lemo_fx.transform(model, plan, predictors=predictors, dump=dump)
    assert shown is not None
    assert before is not None
    name, layer = shown
    kind = type(layer).__name__
    after = lemo_fx.graphs(model).get(name)
    console.print(f"\n{name} before:\n")
    _print_code(draw.code(before, kind))
    pictures: dict[str, Any] = {"before": before}
    if after is None:
        console.print(f"{name} is left dense by the plan.")
    else:
        console.print(f"{name} after:\n")
        _print_code(draw.code(after, kind))
        pictures["after"] = after
    console.print(lemo_fx.report(model))
    figure = draw.draw(pictures, kind)
    with writing(out):
        paths = [draw.save(figure, out / f"{name}.{suffix}") for suffix in ("png", "svg")]
    _print_paths([*paths, dump] if dump else paths)


def _load_model(path: Path) -> Any:
    """A model folder with its weights; a config (or a folder without weights) with random ones."""
    import torch
    from transformers import AutoModelForCausalLM

    from lemo_fx.cli.train import read_config

    _no_bars_of_transformers()
    config = read_config(path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        try:
            return AutoModelForCausalLM.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} cannot be loaded as a transformers causal language model: {error}") from error
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and layers > SHOWN_LAYERS:
        config.num_hidden_layers = SHOWN_LAYERS
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:SHOWN_LAYERS]
        console.print(f"built with {SHOWN_LAYERS} of the {layers} decoder layers")
    # The graph does not depend on the vocabulary, and its matrices are the largest of all.
    vocabulary = getattr(config, "vocab_size", 0)
    if vocabulary > 1024:
        config.vocab_size = 1024
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, None)
        console.print(f"built with a vocabulary of 1024 instead of {vocabulary}")
    try:
        with torch.device("meta"):
            size = sum(p.numel() * 2 for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > WEIGHT_LIMIT:
            raise InputError(f"{path}: {SHOWN_LAYERS} layers of this model take {size / 2**30:.0f} GiB of memory")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, LemoError):
            raise
        raise InputError(f"{path} does not describe a causal language model: {error}") from error
    console.print("random weights: built from a config")
    return model


SHOWN_LAYERS = 4
"""Decoder layers of a model that `inspect` builds from a config."""


Model = Annotated[Path, typer.Argument(help="Local folder of a transformers model: safetensors and tokenizer.")]
Data = Annotated[
    Path,
    typer.Argument(help="A .jsonl file (`text`, `messages` or `input_ids`), a text file, or a folder of them."),
]


@app.command()
def fit(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the fitted weights.")],
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens of each text that are read, if the model can.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Number of texts that are read.")] = None,
) -> None:
    """Learn from texts what `transform` can use, and save it."""
    with _errors_in_one_line():
        import lemo_fx
        from lemo_fx.cli import train
        from lemo_fx.config import LemoConfig
        from lemo_fx.files import check_folder
        from lemo_fx.graph.anatomy import longest_context

        check_folder(out)
        for option, value in (("--max-length", max_length), ("--limit", limit)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value} must be at least 1")
        config = LemoConfig(block_size=block_size)
        _no_bars_of_transformers()
        rows = train.data.read_rows(data)[:limit]
        loaded = train.load_model(model)
        documents = train.tokenised(rows, model, loaded)
        most = min(max_length, longest_context(loaded.config) or max_length)
        lemo_fx.fit(loaded, [document.ids[:most].tolist() for document in documents], config).save(out)
        _print_paths([out])


Rank = Annotated[int, typer.Option(help="Of the LoRA adapters.")]
Targets = Annotated[str, typer.Option(help="Modules that get adapters: all-linear, or names with commas.")]
Attention = Annotated[str | None, typer.Option(help="Attention implementation: sdpa, flex_attention, ...")]
Checkpointing = Annotated[bool, typer.Option(help="Activation checkpointing.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per block.")]
FittedBefore = Annotated[Path | None, typer.Option(help="Folder that `lemo-fx fit` made.")]


def _settings(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that are fields of its settings."""
    named = {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}
    if named["targets"] != "all-linear":
        named["targets"] = tuple(filter(None, named["targets"].split(",")))
    return named


@app.command()
def train(
    model: Model,
    data: Data,
    out: Out = Path("lemo-train"),
    context: Annotated[int, typer.Option(help="Tokens of a window of text, at most.")] = 4096,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; by default as many as --epochs take.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Windows of a step; one at a time is on the device.")] = 1,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    plan: Plan = None,
    preset: Preset = None,
    keep: Keep = None,
    slope: Slope = None,
    eliminated: Treatments = None,
    score: Scores = None,
    block_size: BlockSize = None,
    predictors: FittedBefore = None,
    heldout: Annotated[
        Path | None, typer.Option("--eval", help="Data for the held-out loss; by default a part of DATA is held out.")
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows, at most.")] = 32,
    eval_every: Annotated[int | None, typer.Option(help="Steps between held-out losses; a tenth of all.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; a tenth of all.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out from its last checkpoint.")] = False,
    pack: Annotated[bool, typer.Option(help="Short documents share a window, none seeing another.")] = True,
    assistant_only: Annotated[bool, typer.Option(help="Of chats, learn only what the assistant says.")] = False,
    checkpointing: Checkpointing = True,
    compile: Annotated[
        bool | None, typer.Option(help="Compile every decoder layer (torch.compile); by default on a GPU.")
    ] = None,
    attention: Attention = None,
    seed: Annotated[int, typer.Option(help="Of the adapters, the order, and what is held out.")] = 0,
) -> None:
    """Fine-tune a local model on local data with LoRA: an adapter, a report page and a summary."""
    given = dict(locals())
    with _errors_in_one_line():
        from lemo_fx.cli import page, train

        _no_bars_of_transformers()
        summary = train.train(
            model,
            data,
            out,
            _plan(plan, preset, block_size, {"keep": keep, "slope": slope, "eliminated": eliminated, "score": score}),
            train.Settings(**_settings(train.Settings, given)),
            heldout_path=heldout,
            predictors_path=predictors,
            resume=resume,
            command=" ".join(["lemo-fx", *sys.argv[1:]]),
            say=lambda line: console.print(line, soft_wrap=True, highlight=False),
        )
        table = Table(show_header=False)
        for name, value in page.figures_of(summary).items():
            table.add_row(name, value)
        console.print(table)
        _print_paths([out / "adapter", out / train.PAGE, out / train.SUMMARY])


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model, or its config.json (random weights).")],
    context: Annotated[str, typer.Option(help="Tokens of a sequence; several lengths with commas.")] = "4096",
    out: Out = Path("lemo-bench"),
    steps: Annotated[int, typer.Option(help="Timed steps of each plan; one more comes first, which compiles.")] = 3,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    plan: Plan = None,
    preset: Annotated[str | None, typer.Option(help="A measured plan; without any plan, all of them.")] = None,
    keep: Keep = None,
    slope: Slope = None,
    eliminated: Treatments = None,
    score: Scores = None,
    block_size: BlockSize = None,
    predictors: FittedBefore = None,
    checkpointing: Checkpointing = True,
    compile: Annotated[
        bool | None, typer.Option(help="Compile every decoder layer, but for the plain script; by default on a GPU.")
    ] = None,
    attention: Attention = None,
) -> None:
    """Measure time and memory of LoRA steps of a model on this machine: as they are, and with each plan."""
    options = dict(locals())
    with _errors_in_one_line():
        site = {"keep": keep, "slope": slope, "eliminated": eliminated, "score": score}
        given = {**site, "plan": plan, "preset": preset, "block_size": block_size}
        named = {name for name, value in given.items() if value is not None}
        plans = (
            {preset if named == {"preset"} else "the plan": _plan(plan, preset, block_size, site)} if named else None
        )
        _bench(model, out, plans, predictors, context, options)


def _bench(model: Path, out: Path, plans: Any, predictors: Path | None, context: str, options: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lemo_fx.cli import bench as benchmark
    from lemo_fx.cli.train import compiles
    from lemo_fx.files import check_folder

    check_folder(out)
    _no_bars_of_transformers()
    try:
        contexts = tuple(dict.fromkeys(int(length) for length in context.split(",")))
    except ValueError as error:
        raise InputError(f"--context {context!r} must be a number of tokens, or several with commas") from error
    if plans is None:
        plans = benchmark.PLANS
    else:
        plans = {**{name: benchmark.PLANS[name] for name in (benchmark.UNTOUCHED, benchmark.LORA)}, **plans}
    command = " ".join(["lemo-fx", *sys.argv[1:]])
    written: list[Path] = []
    _warn_of_other_load()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        def progress(what: str, parts: int) -> Callable[[], None]:
            task = bar.add_task(what, total=parts)
            return lambda: bar.advance(task)

        def ended(outcome: Any) -> None:
            bar.remove_task(bar.task_ids[-1])
            console.print(benchmark.line(outcome), highlight=False, soft_wrap=True)
            written[:] = benchmark.write(outcome, out, command)

        settings = benchmark.Settings(contexts, **_settings(benchmark.Settings, options))
        outcome = benchmark.bench(model, plans, settings, predictors, progress, ended)
    console.print(benchmark.table(outcome))
    plainly = "neither compiled nor transformed" if compiles(settings.compile) else "not transformed"
    console.print(
        f'"{benchmark.UNTOUCHED}": {plainly}. '
        f'"{benchmark.LORA}": the loss in segments, nothing eliminated. Token ids are random'
        f"{', weights too' if outcome.random_weights else ''}: the loss only shows whose forward is the original"
        f"{', where the model has no dropout; this one has' if outcome.dropout else ''}.",
        highlight=False,
    )
    _print_paths(written)
