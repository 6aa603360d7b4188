"""Offline fitting on the frozen base model: a profiling pass over sequences, then closed-form solutions per site."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from lemo_fx import install as installing
from lemo_fx.capture import ABSENT_IN_TRAINING, capture
from lemo_fx.config import LemoConfig
from lemo_fx.errors import ConfigError, InputError, PredictorError, UnsupportedModelError
from lemo_fx.passes.checker import check
from lemo_fx.passes.insert_probes import insert_probes
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite
from lemo_fx.predictors import FORMAT_VERSION, Predictors, fingerprint
from lemo_fx.sites import find_sites
from lemo_fx.transform import decoder_layers, site_name, suspended


class BranchStatistics(nn.Module):
    """A probe: passes a branch's output through and sums up the second moments of its input and output.

    Memory is that of two [H, H] matrices, whatever the length of the sequences.
    """

    def __init__(self, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.count = 0
        self.sums = [torch.zeros(hidden, dtype=torch.float64, device=device) for _ in range(2)]
        self.products = [torch.zeros(hidden, hidden, dtype=torch.float32, device=device) for _ in range(2)]
        self.square = torch.zeros((), dtype=torch.float64, device=device)

    def forward(self, source: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """source [B, S, H] the branch's normed input, output [B, S, H] what it adds -> output."""
        x, y = source.detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()
        self.count += x.shape[0]
        self.sums[0] += x.sum(0)
        self.sums[1] += y.sum(0)
        self.products[0].addmm_(x.T, x)
        self.products[1].addmm_(x.T, y)
        self.square += y.square().sum()
        return output

    def solve(self, rank: int, ridge: float) -> tuple[dict[str, torch.Tensor], float]:
        """Reduced-rank ridge regression of output on source.

        Args:
            rank: of the map.
            ridge: added to the diagonal, as a share of its mean.

        Returns:
            ({"down" [H, r], "up" [r, H], "bias" [H]}, share of the output's variance that it explains).
        """
        mean_x, mean_y = (s / self.count for s in self.sums)
        xx = self.products[0].double() / self.count - torch.outer(mean_x, mean_x)
        xy = self.products[1].double() / self.count - torch.outer(mean_x, mean_y)
        hidden = xx.shape[0]
        xx_ridged = xx + ridge * xx.diagonal().mean() * torch.eye(hidden, dtype=xx.dtype, device=xx.device)
        full = torch.linalg.solve(xx_ridged, xy)
        # The best map of a given rank projects the fitted values on their leading directions.
        directions = torch.linalg.eigh(full.T @ xx @ full).eigenvectors[:, -min(rank, hidden) :]
        down, up = full @ directions, directions.T
        low = down @ up
        variance = self.square / self.count - mean_y.square().sum()
        missed = variance - 2 * (low * xy).sum() + (low * (xx @ low)).sum()
        explained = 1 - float(missed / variance.clamp_min(1e-30))
        parts = {"down": down, "up": up, "bias": mean_y - mean_x @ low}
        return {name: value.float().contiguous().cpu() for name, value in parts.items()}, explained


def fit(
    model: nn.Module,
    sequences: Any,
    config: LemoConfig | None = None,
    *,
    rank: int | None = None,
    ridge: float = 1e-3,
    progress: bool = True,
) -> Predictors:
    """Learn from one pass of the frozen base model over sequences what `transform` can use.

    At present: the `stand_in` maps of every site that `config` makes sparse, by reduced-rank ridge regression of the
    branch's output on its normed input. Weights are never changed.

    Args:
        model: causal language model, with or without adapters; moved nowhere, its training mode restored.
        sequences: token ids: a list of lists, a [N, S] tensor, or rows with "input_ids" (a datasets Dataset).
        config: which sites are sparse; `LemoConfig()` if None.
        rank: of the maps; an eighth of the hidden size if None.
        ridge: regularisation, as a share of the mean variance of the input.
        progress: show a progress bar.

    Raises:
        InputError: no sequence, or not token ids.
        UnsupportedModelError: as for `transform`.
    """
    config = LemoConfig() if config is None else config
    layers = decoder_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no causal decoder layers to fit to")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    hidden = _hidden_size(model)
    device = next(model.parameters()).device
    batches = list(_batches(sequences))
    if not batches:
        raise InputError("fit needs at least one sequence of token ids")
    was_training = [(module, module.training) for module in model.modules()]
    with suspended(model):
        plans, probes = _probe_plans(model, layers, config, device)
        installing.install(plans)
        try:
            model.eval()
            with torch.no_grad(), Progress(disable=not progress, transient=True) as bar:
                for ids in bar.track(batches, description="profiling the base model"):
                    model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
        finally:
            for plan in plans:
                installing.uninstall(plan.module)
            for module, training in was_training:
                module.training = training
    tensors: dict[str, torch.Tensor] = {}
    explained: dict[str, float] = {}
    for (index, site), probe in probes.items():
        if probe.count == 0:
            raise PredictorError(f"layer {index}, {site} saw no token: are all sequences shorter than one block?")
        parts, share = probe.solve(rank or max(1, hidden // 8), ridge)
        tensors.update({f"layers.{index}.{site}.stand_in.{name}": value for name, value in parts.items()})
        explained[f"layers.{index}.{site}"] = round(share, 4)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    record = {
        "format_version": FORMAT_VERSION,
        "model_class": type(base).__name__,
        "fingerprint": fingerprint(base.config),
        "hidden_size": hidden,
        "layers": len(layers),
        "block_size": config.block_size,
        "tokens": sum(ids.numel() for ids in batches),
        "ridge": ridge,
        "explained_variance": explained,
        "date": datetime.date.today().isoformat(),
    }
    return Predictors(tensors, record)


def _hidden_size(model: nn.Module) -> int:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[1])


def _batches(sequences: Any) -> Iterator[torch.Tensor]:
    """Each sequence as a [1, S] tensor: no padding, whatever the lengths."""
    rows: Iterable[Any] = sequences
    for row in rows:
        ids = row["input_ids"] if isinstance(row, dict) or hasattr(row, "keys") else row
        tensor = torch.as_tensor(ids if isinstance(ids, Sequence | torch.Tensor) else list(ids))
        if tensor.dim() != 1 or tensor.is_floating_point() or tensor.numel() == 0:
            raise InputError("sequences must be token ids: a list of lists, a [N, S] tensor, or rows with 'input_ids'")
        yield tensor.long()[None]


def _probe_plans(
    model: nn.Module, layers: list[tuple[str, nn.Module]], config: LemoConfig, device: torch.device
) -> tuple[list[installing.Plan], dict[tuple[int, str], BranchStatistics]]:
    plans, probes = [], {}
    observing = LemoConfig(block_size=1, active="always")
    for index, (name, layer) in enumerate(layers):
        if config.is_dense(index, len(layers)):
            continue
        graph = capture(layer, ABSENT_IN_TRAINING)
        sites, _ = find_sites(graph)
        planned = [PlannedSite(site_name(s, sites), s, None) for s in sites if config.site(s.kind) is not None]
        rewrite = LayerRewrite(layer, graph, planned)
        for site in planned:
            probes[index, site.name] = BranchStatistics(_hidden_size(model), device)
            rewrite.modules[f"lemo_{site.name}_probe"] = probes[index, site.name]
        insert_probes(rewrite)
        check(rewrite, "insert_probes", finished=True)
        plans.append(installing.layer_plan(name, rewrite, observing, []))
    return plans, probes
