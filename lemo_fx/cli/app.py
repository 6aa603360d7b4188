"""The command `lemo-fx`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lemo_fx._version import __version__
from lemo_fx.cli import options
from lemo_fx.cli.commands import HELP, OneLineGroup, command, from_file
from lemo_fx.cli.console import (
    bars,
    console,
    no_bars_of_transformers,
    print_code,
    print_paths,
    say,
    typed,
    warn_of_other_load,
)
from lemo_fx.errors import InputError

app = typer.Typer(
    name="lemo-fx",
    cls=OneLineGroup,
    help="Long-context fine-tuning with less memory and less time: token sparsity (LeMo) as torch.fx passes.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=HELP,
)
NOISY = ("transformers", "torchao", "torch.utils._pytree")
"""Loggers that warn of what no user of a command can change: torchao, which PEFT imports where it is installed, of
libraries of its own that do not fit this machine."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lemo-fx {__version__}")
        raise typer.Exit


@app.callback()
def _quiet(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    import logging
    import warnings

    # Progress bars and deprecation notes of the libraries below would drown what is printed here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@command(app)
def demo(
    settings: options.DemoSettings,
    out: options.Out = Path("lemo-demo"),
    graph: Annotated[bool, typer.Option("--graph", help="Print a rewritten layer, too.")] = False,
) -> None:
    """Fine-tune a small real Llama on long documents, plainly and transformed, and compare. No network, no GPU."""
    from lemo_fx import draw
    from lemo_fx.cli import demo as demonstration
    from lemo_fx.files import check_folder

    check_folder(out)
    no_bars_of_transformers()
    warn_of_other_load()
    say(
        f"LoRA fine-tuning of a small Llama at {settings.context:,} tokens, {settings.steps} steps each: plainly, then "
        "under plans. As set by default this takes less than a minute on two idle CPU cores, and two beside other "
        "programs."
    )
    with bars() as (_, progress):
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
    if graph:
        console.print(f"{outcome.layer.name} after the transform:\n")
        print_code(draw.code(outcome.layer.after, outcome.layer.kind))
    say(demonstration.verdict(outcome))
    print_paths(demonstration.write(outcome, out, typed()))
    say(demonstration.NEXT)


@command(app)
def inspect(
    model: options.Shape,
    plan: options.PlanOptions,
    layer: Annotated[int | None, typer.Option(help="Decoder layer to show; the middle one by default.")] = None,
    out: options.Out = Path("lemo-inspect"),
    dump: Annotated[Path | None, typer.Option(help="Folder for every layer's graph after each pass.")] = None,
) -> None:
    """Show how a model's layers are rewritten: the graph before and after as code and as a picture, and the report."""
    from lemo_fx.cli import inspect

    no_bars_of_transformers()
    inspect.inspect(model, dataclasses.replace(plan.config(), active="always"), layer, out, dump)


@command(app)
def fit(
    model: options.ModelName,
    data: options.DataName,
    out: Annotated[Path, typer.Option(help="Folder for the fitted weights.", parser=options.folder, metavar="<path>")],
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens of each text that are read, if the model can.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Number of texts that are read.")] = None,
) -> None:
    """Learn from texts what `transform` can use, and save it."""
    import lemo_fx
    from lemo_fx.cli import load, prepare
    from lemo_fx.cli.rows import read_rows
    from lemo_fx.config import LemoConfig
    from lemo_fx.files import check_folder
    from lemo_fx.graph.anatomy import longest_context

    check_folder(out)
    for option, value in (("--max-length", max_length), ("--limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value} must be at least 1")
    config = LemoConfig(block_size=block_size)
    no_bars_of_transformers()
    rows = read_rows(data, say)[:limit]
    loaded = load.load_model(load.folder_of(model))
    documents = prepare.tokenised(rows, load.folder_of(model), loaded.config)
    most = min(max_length, longest_context(loaded.config) or max_length)
    lemo_fx.fit(loaded, [document.ids[:most].tolist() for document in documents], config).save(out)
    print_paths([out])


@command(app)
def train(
    job: options.Job,
    plan: options.PlanOptions,
    settings: options.Settings,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A run file in YAML, `option: value` a line; what is given beside it wins. Each run leaves its own.",
            callback=from_file,
            is_eager=True,
        ),
    ] = None,
) -> None:
    """Fine-tune a model on your data with LoRA: an adapter, a report page and a summary."""
    from lemo_fx.cli import page, train
    from lemo_fx.cli.run import Run

    no_bars_of_transformers()
    run = Run(job, plan, settings, command=typed())
    if job.preview:
        console.print(train.preview(run, say), soft_wrap=True)
        return
    summary = train.train(run, say)
    if summary is None:
        return
    table = Table(show_header=False)
    for name, value in page.figures_of(summary).items():
        table.add_row(name, value)
    console.print(table)
    print_paths(run.written)


@command(app)
def compare(
    job: options.Job,
    settings: options.Settings,
    plans: Annotated[
        str | None,
        typer.Option(
            help="Of careful, balanced, fast, cut (sequences cut to half) and fewer (LoRA for the time of the fastest "
            "plan), with commas; by default all that this machine computes well."
        ),
    ] = None,
    same_time: Annotated[
        bool, typer.Option("--same-time", help="Each plan once more, for as many steps as take LoRA's time.")
    ] = False,
) -> None:
    """Train LoRA, plans and cheaper ways to save time on your data: held-out loss, time and memory, in a page."""
    from lemo_fx.cli import compare as comparison

    no_bars_of_transformers()
    warn_of_other_load()
    called = typed()
    found = comparison.compare(job, settings, comparison.kinds_of(plans), same_time, called, say)
    table = Table(*comparison.HEADINGS)
    for row in comparison.rows(found):
        table.add_row(*row)
    console.print(table)
    for line in comparison.verdict(found):
        say(line)
    print_paths([job.out / comparison.PAGE, job.out / comparison.FIGURES])


@command(app)
def bench(
    model: options.Shape,
    plan: options.PlanOptions,
    settings: options.BenchSettings,
    out: options.Out = Path("lemo-bench"),
    predictors: options.FittedBefore = None,
) -> None:
    """Measure time and memory of LoRA steps of a model on this machine: as they are, and with each plan."""
    from lemo_fx.cli import bench as benchmark
    from lemo_fx.cli import bench_page, load
    from lemo_fx.cli.estimate_page import advice
    from lemo_fx.cli.machine import check_attention, compiles
    from lemo_fx.files import check_folder

    plans = benchmark.PLANS
    if plan.given:
        name = str(plan.preset) if {*plan.given} == {"preset"} else "the plan"
        plans = {**{name: plans[name] for name in (benchmark.UNTOUCHED, benchmark.LORA)}, name: plan.config()}
    check_folder(out)
    no_bars_of_transformers()
    check_attention(settings.attention)
    folder = load.folder_of(model, weights=False)
    command = typed()
    written: list[Path] = []
    warn_of_other_load()
    with bars(transient=True) as (bar, progress):

        def ended(outcome: Any) -> None:
            bar.remove_task(bar.task_ids[-1])
            console.print(bench_page.line(outcome), highlight=False, soft_wrap=True)
            written[:] = bench_page.write(outcome, out, command)

        outcome = benchmark.bench(folder, plans, settings, predictors, progress, ended)
    console.print(bench_page.table(outcome))
    for line in advice(outcome.parameters["all"], max(settings.contexts), running_text=False):
        say(f"note: {line}")
    plainly = "neither compiled nor transformed" if compiles(settings.compile) else "not transformed"
    console.print(
        f'"{benchmark.UNTOUCHED}": {plainly}. '
        f'"{benchmark.LORA}": the loss in segments, nothing eliminated. Token ids are random'
        f"{', weights too' if outcome.random_weights else ''}: the loss only shows whose forward is the original"
        f"{', where the model has no dropout; this one has' if outcome.dropout else ''}.",
        highlight=False,
    )
    print_paths(written)


@command(app)
def estimate(
    model: options.Shape,
    context: options.Lengths = "32768",
    gpu: Annotated[str, typer.Option(help="Memory of the cards to fit, with commas.")] = "24GB,80GB",
    rank: options.Rank = options.Settings.rank,
    offload: Annotated[bool, typer.Option(help="What presets' layers save waits in host memory.")] = False,
    share: Annotated[int, typer.Option(help="GPUs of the size of --gpu that share each sequence.")] = 1,
) -> None:
    """Estimate memory, relative time and the longest context of LoRA and of each plan, from shapes alone. No GPU."""
    from lemo_fx.cli import estimate as estimation
    from lemo_fx.cli import estimate_page, load

    no_bars_of_transformers()
    contexts, cards = options.lengths_of(context), estimate_page.gpus(gpu)
    if rank < 1:
        raise InputError(f"--rank {rank} must be at least 1")
    shape = estimation.shape_of(load.folder_of(model, weights=False))
    if share < 1 or shape.heads % share:
        raise InputError(f"--share {share} must divide the {shape.heads} heads")
    compared = estimation.plans(share, offload)
    for shown in estimate_page.table(shape, contexts, cards, rank, compared):
        console.print(shown)
    console.print(estimate_page.longest_table(shape, cards, rank, compared))
    for note in estimate_page.notes(shape, contexts, compared):
        say(note)
