"""The graphs of every pass as files, for reading."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import fx, nn

from lemo_fx.files import writing
from lemo_fx.graph.capture import readable

Dump = Callable[[str, fx.Graph, Mapping[str, fx.Graph]], None]


def dumper(folder: Path | None, name: str, module: nn.Module) -> Dump:
    """Writes a stage's graph and the functions it calls, as code, to `folder/<name>.<number>_<stage>.py`, if any."""
    counter = itertools.count()

    def dump(stage: str, graph: fx.Graph, functions: Mapping[str, fx.Graph]) -> None:
        if folder is not None:
            text = readable(graph, functions, type(module).__name__)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}.{next(counter)}_{stage}.py").write_text(text)

    return dump
