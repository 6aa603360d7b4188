"""What `lemo_fx.report` returns: a table for people, a dict for programs."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lemo_fx.config import LemoConfig


@dataclass(frozen=True)
class SiteReport:
    """One site of one layer.

    Attributes:
        module: name of the decoder layer; site: "attention" or "mlp".
        eliminated: treatment of the eliminated tokens, or "dense".
        score: what ranks the blocks; budget: keep or threshold in force.
        kept_tokens, total_tokens: of the last forward pass that ran the rewritten graph; None before the first.
        note: what a reader should know.
        recall: of a predicted score, where it was asked for: share of the blocks that the measured score keeps.
    """

    module: str
    site: str
    eliminated: str
    score: str
    budget: str
    kept_tokens: int | None
    total_tokens: int | None
    note: str
    recall: float | None = None

    @property
    def kept_share(self) -> float | None:
        """Share of the tokens that the last step kept."""
        return self.kept_tokens / self.total_tokens if self.kept_tokens and self.total_tokens else None


@dataclass(frozen=True)
class Report:
    """All sites of a transformed model, the plan, and what was refused or left alone, with the reason."""

    config: LemoConfig
    sites: list[SiteReport]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain types throughout, ready for JSON."""
        sites = [{**dataclasses.asdict(site), "kept_share": site.kept_share} for site in self.sites]
        return {"config": dataclasses.asdict(self.config), "sites": sites, "notes": self.notes}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layer", "site", "eliminated tokens", "score", "budget", "kept in last step", "note")
        judged = any(site.recall is not None for site in self.sites)
        if judged:
            table.add_column("recall")
        for site in self.sites:
            share = site.kept_share
            kept = "" if share is None else f"{site.kept_tokens} of {site.total_tokens} ({share:.0%})"
            cells = [site.module, site.site, site.eliminated, site.score, site.budget, kept, site.note]
            if judged:
                cells.append("" if site.recall is None else f"{site.recall:.0%}")
            table.add_row(*cells)
        yield table
        yield from self.notes

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()
