"""The command `lemo-fx`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

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
Keep = Annotated[float, typer.Option(help="Share of the token blocks that stay, in (0, 1].")]
Treatments = Annotated[str, typer.Option(help="What happens to eliminated tokens: skip or exact.")]
Scores = Annotated[str, typer.Option(help="What ranks the blocks: measured or random.")]


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
    keep: Keep = 0.5,
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


def _demo(out: Path, given: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.utils import logging

    from lemo_fx import demo as demonstration
    from lemo_fx import draw

    logging.disable_progress_bar()
    treatments = ("skip", "exact") if given["eliminated"] == "both" else (given["eliminated"],)
    named = {name: value for name, value in given.items() if name != "out"}
    if demonstration.other_load() > 0.5:
        console.print("Other programs are running on this machine: the times below will be too long and uneven.")
    settings = demonstration.Settings(**{**named, "eliminated": treatments})
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
    config: Annotated[Path | None, typer.Option(help="A LemoConfig as JSON.")] = None,
    layer: Annotated[int | None, typer.Option(help="Decoder layer to show; the middle one by default.")] = None,
    out: Out = Path("lemo-inspect"),
    dump: Annotated[Path | None, typer.Option(help="Folder for every layer's graph after each pass.")] = None,
    keep: Keep = 0.5,
    eliminated: Treatments = "skip",
    score: Scores = "measured",
) -> None:
    """Show how a model's layers are rewritten: the graph before and after as code and as a picture, and the report."""
    with _errors_in_one_line():
        _inspect(model, _plan(config, keep, eliminated, score), layer, out, dump)


def _plan(path: Path | None, keep: float, eliminated: str, score: str) -> LemoConfig:
    from lemo_fx.config import Elimination, LemoConfig

    if path is None:
        site = Elimination(keep=keep, eliminated=eliminated, score=score)  # type: ignore[arg-type]
        return LemoConfig(attention=site, mlp=site, active="always")
    given = _read_json(path)
    try:
        sites = {kind: Elimination(**given[kind]) for kind in ("attention", "mlp") if isinstance(given.get(kind), dict)}
        return LemoConfig(**{**given, **sites, "active": "always"})
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
    from lemo_fx.sites import decoder_layers

    model = _load_model(path)
    layers = decoder_layers(model)
    if index is not None and not -len(layers) <= index < len(layers):
        raise InputError(f"--layer {index}: the model that was built has {len(layers)} decoder layers")
    shown = layers[len(layers) // 2 if index is None else index] if layers else None
    before = draw.captured(shown[1]) if shown else None
    lemo_fx.transform(model, plan, dump=dump)
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
    paths = [draw.save(figure, out / f"{name}.{suffix}") for suffix in ("png", "svg")]
    _print_paths([*paths, dump] if dump else paths)


def _load_model(path: Path) -> Any:
    """A model folder with its weights; a config (or a folder without weights) with random ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not path.exists():
        raise InputError(f"{path} does not exist: give a local model folder or a config.json")
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    try:
        if has_weights:
            return AutoModelForCausalLM.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a transformers causal language model: {error}") from error
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


@app.command()
def fit(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model.")],
    data: Annotated[Path, typer.Argument(help="A .jsonl (field `text`) or .txt file, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the fitted weights.")],
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens that are read of each text.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Number of texts that are read.")] = None,
) -> None:
    """Learn from texts what `transform` can use, and save it."""
    with _errors_in_one_line():
        import lemo_fx
        from lemo_fx.config import LemoConfig

        if not hasattr(lemo_fx, "fit"):
            raise InputError("this version of lemo_fx has no fit")
        texts = _texts(data, limit)
        loaded, tokenizer = _model_and_tokenizer(model)
        sequences = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
        predictors = lemo_fx.fit(loaded, sequences, LemoConfig(block_size=block_size))
        predictors.save(out)
        _print_paths([out])


def _model_and_tokenizer(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give a local model folder")
    try:
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a transformers causal language model with its tokenizer: {error}") from error


def _texts(path: Path, limit: int | None) -> list[str]:
    """Texts of a file or of every .jsonl and .txt file of a folder, sorted by name."""
    files = sorted([*path.glob("*.jsonl"), *path.glob("*.txt")]) if path.is_dir() else [path]
    texts: list[str] = []
    try:
        for file in files:
            content = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                texts += [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
            else:
                texts.append(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as texts (a .jsonl line needs a field `text`): {error!r}") from error
    if not texts:
        raise InputError(f"{path} holds no text: give a .jsonl or .txt file, or a folder of them")
    return texts[:limit]
