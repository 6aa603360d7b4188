"""What the commands print, and with what: one console for all."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

console = Console(width=None if sys.stdout.isatty() else 140)


def in_short(error: BaseException) -> str:
    """What another library raised, as a part of a line."""
    words = str(error).strip() or type(error).__name__
    return textwrap.shorten(f"no {words}" if isinstance(error, KeyError) else words, 180, placeholder=" ...")


def typed() -> str:
    """The command as it was typed."""
    return " ".join(["lemo-fx", *sys.argv[1:]])


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_code(text: str) -> None:
    """Print Python, coloured."""
    from rich.syntax import Syntax

    highlighted = Syntax("", "python", theme="ansi_light", background_color="default").highlight(text)
    console.print(highlighted, soft_wrap=True)


def print_paths(paths: list[Path]) -> None:
    """Say what was written."""
    console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False)


def no_bars_of_transformers() -> None:
    """Its bars would lie over ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def warn_of_other_load() -> None:
    """Times are no good while other programs run."""
    from lemo_fx.cli import machine

    if machine.other_load() > 0.5:
        console.print("Other programs are running on this machine: the times below will be too long and uneven.")


@contextmanager
def bars(transient: bool = False) -> Iterator[tuple[Progress, Callable[[str, int], Callable[[], None]]]]:
    """Progress bars, and a function (what, number of parts) -> what to call after each part.

    Args:
        transient: they are gone when done, and not shown where that cannot be.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = transient and not console.is_terminal
    with Progress(*columns, console=console, transient=transient, disable=hidden) as bar:

        def progress(what: str, parts: int) -> Callable[[], None]:
            task = bar.add_task(what, total=parts)
            return lambda: bar.advance(task)

        yield bar, progress
