"""`lemo-fx inspect`: a decoder layer before and after, as code and as a picture, and the report of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lemo_fx
from lemo_fx import draw
from lemo_fx.api import suspended
from lemo_fx.cli import load
from lemo_fx.cli.console import console, print_code, print_paths, say
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError
from lemo_fx.files import check_folder, writing
from lemo_fx.graph.anatomy import decoder_layers


def inspect(name: str, plan: LemoConfig, index: int | None, out: Path, dump: Path | None) -> None:
    """Print and draw decoder layer `index`, the middle one by default, of the model in a folder or on the Hub."""
    for folder in (out, dump):
        if folder is not None:
            check_folder(folder)
    # Frozen, as it is under adapters.
    model = load.shown(name, say).requires_grad_(False)
    layers = decoder_layers(model)
    if index is not None and not -len(layers) <= index < len(layers):
        raise InputError(f"--layer {index}: the model that was built has {len(layers)} decoder layers")
    predictors = None
    if plan.predicts:
        # What they choose means nothing; the graph is that of trained ones.
        predictors = lemo_fx.Predictors.random(model, plan)
        console.print("predictors: untrained, of their real size", highlight=False)
    lemo_fx.transform(model, plan, predictors=predictors, dump=dump)
    at, layer = layers[len(layers) // 2 if index is None else index]
    kind = type(layer).__name__
    with suspended(model):
        before = draw.captured(layer)
    after = lemo_fx.graphs(model).get(at)
    console.print(f"\n{at} before:\n")
    print_code(draw.code(before, kind))
    pictures: dict[str, Any] = {"before": before}
    if after is None:
        console.print(f"{at} is left dense by the plan.")
    else:
        console.print(f"{at} after:\n")
        print_code(draw.code(after, kind))
        pictures["after"] = after
    console.print(lemo_fx.report(model))
    figure = draw.draw(pictures, kind)
    with writing(out):
        paths = [draw.save(figure, out / f"{at}.{suffix}") for suffix in ("png", "svg")]
    print_paths([*paths, dump] if dump else paths)
