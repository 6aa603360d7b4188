"""The graphs of every pass as files, for reading."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from torch import fx, nn

from lemo_fx.files import writing
from lemo_fx.graph.capture import readable
from lemo_fx.passes.rewrite import LayerRewrite


def dumper(folder: Path, name: str) -> Callable[[str, LayerRewrite], None]:
    """Writes the graphs of a layer, one file a stage, numbered; for `run_passes`."""
    counter = itertools.count()

    def observe(stage: str, rewrite: LayerRewrite) -> None:
        write_dump(folder, name, f"{next(counter)}_{stage}", rewrite.layer, rewrite.graph, rewrite.functions)

    return observe


def write_dump(
    folder: Path, name: str, stage: str, module: nn.Module, graph: fx.Graph, functions: dict[str, fx.Graph]
) -> None:
    """Write a module's graph and the functions it calls, as code, to `folder/<name>.<stage>.py`."""
    text = readable(graph, functions, type(module).__name__)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{stage}.py").write_text(text)
