"""Layer-specific thresholds and budgets from held-out loss (LeMo's Algorithm 1)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lemo_fx.api import revert, suspended, transform
from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.errors import ConfigError
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.graph.capture import modes_kept
from lemo_fx.passes.rewrite import site_and_role
from lemo_fx.predictors import Predictors
from lemo_fx.runtime.select import SelectBlocks

LEAST = 0.05
"""Smallest kept share of a layer."""

Key = tuple[int, SiteKind]
"""A layer and a kind of its sites."""


def _kind(part: str) -> SiteKind:
    return "attention" if site_and_role(part)[0].startswith("attention") else "mlp"


class Tuning:
    """Algorithm 1 on a frozen base model, at a given mean kept share.

    The paper moves each layer's threshold along the finite-difference gradient of accuracy, from the mean block score.
    Accuracy here is minus the loss. As keeping more never hurts it, all thresholds would fall; so a threshold is
    written as the share r of the blocks whose score reaches it, and only moves that leave the mean share of a kind of
    site in place are made: r += rate * (gain - mean gain), where gain = -(loss(r + eps) - loss(r - eps)) / (change of
    the share that was kept).

    Args:
        sequences: [1, S] each; of one length, since LeMo's attention score grows with it.
        config: its `keep` is the mean share of each kind of site.
    """

    def __init__(
        self, model: nn.Module, sequences: list[torch.Tensor], config: LemoConfig, predictors: Predictors | None
    ) -> None:
        self.sequences = sequences
        self.targets: dict[SiteKind, float] = {}
        sites = {}
        for kind in ("attention", "mlp"):
            site = config.site(kind)
            if site is None:
                continue
            if not isinstance(site.keep, int | float):
                raise ConfigError(f"{kind}: thresholds are set for a mean share, so keep must be one number")
            self.targets[kind] = float(site.keep)
            sites[kind] = dataclasses.replace(site, keep=None, threshold=0.0, slope=0.0)
        self.model = model
        plan: dict[str, Any] = {"attention": None, "mlp": None, **sites}
        sparse = dataclasses.replace(config, **plan, active="always", loss_segments=None)
        transform(model, sparse, predictors=predictors)
        self.selects: dict[Key, list[SelectBlocks]] = {}
        for index, (_, layer) in enumerate(decoder_layers(model)):
            for name, part in layer._modules.items():
                if isinstance(part, SelectBlocks):
                    self.selects.setdefault((index, _kind(name)), []).append(part)
        self.scores = self._block_scores()

    def _block_scores(self) -> dict[Key, torch.Tensor]:
        """Every site's scores, ascending, with all blocks kept."""
        seen: dict[Key, list[torch.Tensor]] = {key: [] for key in self.selects}
        hooks = [
            part.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0].flatten().float().cpu()))
            for key, parts in self.selects.items()
            for part in parts
        ]
        try:
            self.loss(dict.fromkeys(self.selects, -1.0))
        finally:
            for hook in hooks:
                hook.remove()
        return {key: torch.cat(scores).sort().values for key, scores in seen.items()}

    def loss(self, thresholds: Mapping[Key, float | None]) -> tuple[float, dict[Key, float]]:
        """(held-out loss, kept share by layer and kind) of the sparse forward under thresholds; None for a budget."""
        for key, parts in self.selects.items():
            for part in parts:
                part.set_threshold(thresholds[key])
        losses: list[float] = []
        shares: dict[Key, list[float]] = {key: [] for key in self.selects}
        with torch.no_grad():
            for ids in self.sequences:
                losses.append(float(self.model(input_ids=ids, labels=ids, use_cache=False).loss))
                for key, parts in self.selects.items():
                    records = [part.record for part in parts]
                    shares[key].append(sum(r.kept_tokens for r in records) / sum(r.total_tokens for r in records))
        return statistics.fmean(losses), {key: statistics.fmean(found) for key, found in shares.items()}

    def threshold(self, key: Key, share: float) -> float:
        """The score that this share of a layer's blocks reaches."""
        scores = self.scores[key]
        return float(scores[min(round((1 - share) * len(scores)), len(scores) - 1)])

    def thresholds(self, shares: dict[Key, float]) -> dict[Key, float]:
        """The threshold of every layer and kind."""
        return {key: self.threshold(key, share) for key, share in shares.items()}

    def start(self) -> dict[Key, float]:
        """Shares under thresholds at one multiple c per kind of each layer's mean score: the mean share asked for."""
        shares: dict[Key, float] = {}
        for kind, target in self.targets.items():
            keys = [key for key in self.selects if key[1] == kind]
            if not keys:
                continue
            ratios = {key: self.scores[key] / self.scores[key].mean().clamp_min(1e-30) for key in keys}
            every = torch.cat([*ratios.values()]).sort(descending=True).values
            least = every[max(0, int(target * len(every)) - 1)]
            shares |= {key: max(float((ratio >= least).float().mean()), LEAST) for key, ratio in ratios.items()}
        return shares

    def run(
        self, iterations: int = 3, epsilon: float = 0.125, rate: float = 0.15, tick: Callable[[], None] | None = None
    ) -> tuple[dict[Key, float], list[float]]:
        """(shares by layer and kind with the lowest loss met on the way, loss before each iteration and at the end)."""
        shares = self.start()
        losses: list[float] = []
        best = (float("inf"), shares)
        for iteration in range(iterations + 1):
            now, _ = self.loss(self.thresholds(shares))
            losses.append(round(now, 5))
            best = min(best, (now, shares), key=lambda pair: pair[0])
            if iteration == iterations:
                break
            gains = {}
            for key in self.selects:
                ends = []
                for moved in (min(shares[key] + epsilon, 1.0), max(shares[key] - epsilon, LEAST)):
                    value, kept = self.loss({**self.thresholds(shares), key: self.threshold(key, moved)})
                    ends.append((value, kept[key]))
                    if tick:
                        tick()
                change = ends[0][1] - ends[1][1]
                gains[key] = (ends[1][0] - ends[0][0]) / change if change > 0 else 0.0
            shares = self._moved(shares, gains, rate)
        return best[1], losses

    def _moved(self, shares: dict[Key, float], gains: dict[Key, float], rate: float) -> dict[Key, float]:
        moved = dict(shares)
        for kind, target in self.targets.items():
            keys = [key for key in shares if key[1] == kind]
            if not keys:
                continue
            mean = statistics.fmean(gains[key] for key in keys)
            largest = max(abs(gains[key] - mean) for key in keys) or 1.0
            wanted = {key: shares[key] + rate * (gains[key] - mean) / largest for key in keys}
            # Clamping moves the mean; a common shift puts it back.
            low, high = -1.0, 1.0
            for _ in range(40):
                shift = (low + high) / 2
                clamped = {key: min(max(share + shift, LEAST), 1.0) for key, share in wanted.items()}
                low, high = (shift, high) if statistics.fmean(clamped.values()) < target else (low, shift)
            moved.update(clamped)
        return moved


def tune(
    model: nn.Module,
    sequences: list[torch.Tensor],
    config: LemoConfig,
    predictors: Predictors,
    tick: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Algorithm 1 with predicted scores: what `fit(thresholds=True)` adds to a record; the model is left as it was.

    Args:
        sequences: held-out, [1, S] each; the longest ones are used.

    Raises:
        ConfigError: `keep` is not one number per kind of site, or a site's choice is balanced.
    """
    longest = max(ids.shape[1] for ids in sequences)
    device = next(model.parameters()).device
    with modes_kept(model), suspended(model):
        try:
            used = [ids.to(device) for ids in sequences if ids.shape[1] == longest]
            model.eval()
            tuning = Tuning(model, used, config, predictors)
            shares, losses = tuning.run(tick=tick)
        finally:
            revert(model)
    thresholds = tuning.thresholds(shares)
    return {
        "sequences": len(used),
        "length": longest,
        "losses": losses,
        "sites": {
            f"layers.{index}.{kind}": {"threshold": thresholds[index, kind], "keep": round(share, 4)}
            for (index, kind), share in shares.items()
        },
    }
