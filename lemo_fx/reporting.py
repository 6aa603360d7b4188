"""What `lemo_fx.report` returns: a table for people, a dict for programs."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from torch import nn

from lemo_fx.config import LemoConfig
from lemo_fx.install import installed
from lemo_fx.kernels import lowering
from lemo_fx.kernels.float8_linear.op import (
    dtype_of,
    float8_layers,
    has_float8,
    held_layers,
    is_half,
    layers_in_float8,
    layers_in_four_bits,
)
from lemo_fx.kernels.private import is_op
from lemo_fx.measure import device_name
from lemo_fx.planning.plans import SitePlan
from lemo_fx.runtime.loss import segmented_loss
from lemo_fx.runtime.scores import AttentionScore


@dataclass(frozen=True)
class SiteReport:
    """One site of one layer.

    Attributes:
        module: name of the decoder layer; site: "attention" or "mlp".
        eliminated: treatment of the eliminated tokens, or "dense".
        score: what ranks the blocks; budget: keep or threshold in force.
        kept_tokens, total_tokens: of the last step; None before the first, and where it ran the layer's original code
            (dense by `lemo_fx.set_dense`, or shorter than a block). Evaluations and generation count for nothing here.
        recall: share of the tokens that the measured scores would keep and the predictor keeps; None unless asked for.
        note: what a reader should know.
    """

    module: str
    site: str
    eliminated: str
    score: str
    budget: str
    kept_tokens: int | None
    total_tokens: int | None
    recall: float | None
    note: str

    @property
    def kind(self) -> str:
        """Of the site: "attention" or "mlp"."""
        return self.site.split("_")[0]

    @property
    def kept_share(self) -> float | None:
        """Share of the tokens that the last step kept."""
        return self.kept_tokens / self.total_tokens if self.kept_tokens and self.total_tokens else None


@dataclass(frozen=True)
class Report:
    """All sites of a transformed model, the plan, and what was refused or left alone, with the reason.

    Attributes:
        sites: of the layers in which something is eliminated, or that take part in something else the plan asks for
            (`LemoConfig.rewrites_dense_layers`); a layer that is merely dense has a note.
        dense: whether every layer runs its original code for now, see `lemo_fx.set_dense`.
    """

    config: LemoConfig
    sites: list[SiteReport]
    notes: list[str]
    dense: bool = False

    def means(self, name: str) -> dict[str, float]:
        """By kind of site, the mean of what its sites have under `name` ("kept_share", "recall")."""
        found = defaultdict(list)
        for site in self.sites:
            if getattr(site, name) is not None:
                found[site.kind].append(getattr(site, name))
        return {kind: fmean(values) for kind, values in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain types throughout, ready for JSON."""
        sites = [{**dataclasses.asdict(site), "kept_share": site.kept_share} for site in self.sites]
        return {"config": dataclasses.asdict(self.config), "sites": sites, "notes": self.notes, "dense": self.dense}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        asked = any(site.recall is not None for site in self.sites)
        # The end of a layer's name is what tells it from others: broken over lines where there is no room, never cut.
        longest = max((len(site.module) for site in self.sites), default=0)
        table = Table(Column("layer", overflow="fold", no_wrap=3 * longest < options.max_width))
        columns = ["site", "eliminated tokens", "score", "budget", "kept in last step"]
        for name in (*columns, *(["recall"] if asked else []), "note"):
            table.add_column(name, overflow="fold")
        for site in self.sites:
            share = site.kept_share
            kept = "" if share is None else f"{site.kept_tokens} of {site.total_tokens} ({share:.0%})"
            recall = ["" if site.recall is None else f"{site.recall:.0%}"] if asked else []
            table.add_row(site.module, site.site, site.eliminated, site.score, site.budget, kept, *recall, site.note)
        yield table
        if self.dense:
            yield "every layer runs its original code for now (set_dense)"
        yield from self.notes

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()


def in_float8(module: nn.Module, row: SitePlan) -> str:
    """What of a site is in float8 as its layers are now: adapters that came later have frozen some."""
    if not row.float8:
        return ""
    taken = [layer for name in row.called for layer in float8_layers(module.get_submodule(name))]
    if not taken:
        return "no frozen linear layer that float8 takes"
    device = taken[0].weight.device
    if not has_float8(device):
        return f"not in float8, which {device_name(device)} does not multiply"
    others = sorted({str(dtype_of(layer)).removeprefix("torch.") for layer in taken if not is_half(layer)})
    if not others:
        return row.float8
    kinds = " and ".join(others)
    return f"{row.float8}, {kinds} layers only where autocast hands them bfloat16; load the model in bfloat16"


def base_in_float8(model: nn.Module, config: LemoConfig) -> list[str]:
    """How much of the base is in float8: held so (`base="float8"`), come so, or rounded to it from 4 bits."""
    layers, came = held_layers(model), layers_in_float8(model)
    packed = layers_in_four_bits(model) if "float8" in (config.forward, config.backward) else []
    held = sum(layer.weight.numel() for layer in layers) / 1e9
    notes = []
    if layers:
        notes.append(
            f"base: the weights of {len(layers)} frozen linear layers are held in float8 ({held:.2f} GB); evaluation "
            "and generation compute with them de-quantised, and revert gives them back so; merge adapters into the "
            "model as it was loaded"
        )
    if came:
        notes.append(f"base: the weights of {len(came)} linear layers came in float8, and are used as they are")
    if packed:
        notes.append(
            f"base: {len(packed)} frozen linear layers are in 4 bits (bitsandbytes); where a site is in float8, each "
            "product unpacks their weights and rounds them to it"
        )
    if config.base == "float8" and not notes:
        notes.append("base: nothing is held in float8, since no linear layer that a plan covers is frozen (yet)")
    return notes


def lowerings(model: nn.Module, block_size: int) -> list[str]:
    """What the ops of the rewritten graphs run as where their layers are now."""
    ops: dict[str, list[str]] = {}
    for _, module, record in installed(model):
        device = next(module.parameters()).device
        for node in itertools.chain.from_iterable(g.nodes for g in (record.graph, *record.functions.values())):
            if is_op(node.target) and node.target.namespace == "lemo_fx":
                op = node.target.overloadpacket.__name__
            elif node.target is segmented_loss:
                op = "segmented_cross_entropy"
            elif isinstance(module._modules.get(str(node.target)), AttentionScore):
                op = "block_scores"
            else:
                continue
            known = ops.setdefault(lowering.explain(op, device, block_size=block_size), [])
            if op not in known:
                known.append(op)
    return [f"{', '.join(sorted(names))}: {what}" for what, names in ops.items()]
