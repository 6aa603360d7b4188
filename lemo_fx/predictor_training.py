"""Training one site's pattern predictor from pooled blocks and measured scores (LeMo section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lemo_fx import prediction
from lemo_fx.config import SiteKind

Loss = Literal["log", "kl", "regression"]

WIDER = 1.5
"""How much wider the networks are at the start of training than after elastic size transformation."""

PRUNE_AT = (0.3, 0.4, 0.5, 0.6)
"""Moments, as shares of the training, at which elastic size transformation removes neurons."""


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained.

    Attributes:
        width: of the two hidden layers and of I^(Q), I^(K) after elastic size transformation.
        elastic: start `WIDER` and prune the neurons that are most often zero, until `width` is left.
        loss: "log": squared error of the scores' logarithms; "kl": listwise, the divergence between the shares of the
            sequence's total that each block holds; "regression": squared error of raw scores (the paper).
        epochs: passes over the training sequences, but at most `most_steps` steps.
        batch: sequences per step; rate: peak learning rate.
        noise: standard deviation of the noise on the standardised inputs, which does for the networks what a ridge
            does for a linear map: a few thousand blocks are few against the first matrix.
    """

    width: int
    elastic: bool = True
    loss: Loss = "kl"
    epochs: int = 150
    most_steps: int = 900
    batch: int = 16
    rate: float = 5e-3
    noise: float = 0.8
    seed: int = 0


@dataclass
class Blocks:
    """A site's training data: sequences padded to the longest.

    Attributes:
        representations: [N, n, H] from `prediction.represent`.
        scores: [N, n] float32 measured.
        real: [N, n] bool, False on padding.
    """

    representations: torch.Tensor
    scores: torch.Tensor
    real: torch.Tensor

    def __getitem__(self, rows: Any) -> Blocks:
        return Blocks(self.representations[rows], self.scores[rows], self.real[rows])

    def __len__(self) -> int:
        return self.scores.shape[0]


@dataclass
class Trained:
    """One trained predictor: its weights, and plain facts of how the training went."""

    weights: dict[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)


def train(kind: SiteKind, blocks: Blocks, recipe: Recipe, heldout: Blocks | None = None) -> Trained:
    """Fit one predictor.

    Args:
        kind: "attention" (a Q and a K network) or "mlp" (one network).
        heldout: sequences to report the loss on, at the end of every tenth of the training.

    Returns:
        Weights in bfloat16 whose scores are in the measured scores' units. The record holds "losses" (per step),
        "heldout_losses", "parameters" before and after elastic sizing, and "dead" (share of zero activations).
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    real = blocks.real
    seen = blocks.representations[real].float()
    mean, spread = seen.mean(0), seen.std(0, correction=0) + 1e-3
    unit = float(blocks.scores[real].mean().clamp_min(1e-12))
    start = math.ceil(recipe.width * WIDER) if recipe.elastic else recipe.width
    weights = _initial(kind, seen.shape[-1], start, recipe.width, generator)
    before = sum(w.numel() for w in weights.values())
    if kind == "attention":
        weights["distance"][0] = 1 / blocks.scores.shape[1]
    steps = min(recipe.epochs * math.ceil(len(blocks) / recipe.batch), recipe.most_steps)
    prune_at = {int(share * steps): number for number, share in enumerate(PRUNE_AT)} if recipe.elastic else {}
    optimiser = _Adam(weights)
    zeros = [torch.zeros(weights[n].shape) for n in ("first_bias", "second_bias")]
    counted = 0
    record: dict[str, Any] = {"losses": [], "heldout_losses": [], "dead": []}
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(blocks), generator=generator)
        rows, order = order[: recipe.batch], order[recipe.batch :]
        batch = blocks[rows]
        inputs = (batch.representations.float() - mean) / spread
        with torch.enable_grad():
            leaves = {name: w.requires_grad_() for name, w in weights.items()}
            noisy = inputs + recipe.noise * torch.randn(inputs.shape, generator=generator)
            hidden = prediction.network(leaves, noisy)
            loss = _loss(recipe.loss, _predict(leaves, hidden[-1], batch.real), batch.scores / unit, batch.real)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        weights = optimiser.step(dict(zip(leaves, gradients, strict=True)), _rate(recipe.rate, step / steps))
        record["losses"].append(round(loss.item(), 5))
        counted += int(batch.real.sum())
        for count, activation in zip(zeros, hidden, strict=False):
            count += (activation.detach()[:, batch.real] == 0).sum(1)
        if step in prune_at:
            share = [count / counted for count in zeros]
            record["dead"].append(round(float(torch.cat(share, 1).mean()), 4))
            left = len(PRUNE_AT) - prune_at[step]
            width = start - math.ceil((start - recipe.width) / left)
            weights = _prune(optimiser, share, width)
            start, counted = width, 0
            zeros = [torch.zeros(weights[n].shape) for n in ("first_bias", "second_bias")]
        if heldout is not None and (step + 1) % max(1, steps // 10) == 0:
            predicted = prediction.scores(weights, (heldout.representations.float() - mean) / spread, heldout.real)
            value = _loss(recipe.loss, predicted, heldout.scores / unit, heldout.real)
            record["heldout_losses"].append([step + 1, round(value.item(), 5)])
    weights = _in_original_units(weights, mean, spread, unit)
    if recipe.loss == "kl":
        # Shares of a total leave its size open.
        predicted = prediction.scores(weights, blocks.representations.float(), real)
        weights = _scaled(weights, float(blocks.scores[real].sum() / predicted[real].sum().clamp_min(1e-12)))
    record["parameters"] = [before, sum(w.numel() for w in weights.values())]
    return Trained({name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}, record)


def _predict(weights: dict[str, torch.Tensor], outputs: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    if "distance" in weights:
        return prediction.attention_scores(weights, outputs, real)
    return prediction.mlp_scores(weights, outputs)


def random_weights(kind: SiteKind, hidden: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of a predictor's final size, as training would start from them."""
    weights = _initial(kind, hidden, width, width, generator)
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def _initial(kind: SiteKind, inputs: int, hidden: int, outputs: int, generator: torch.Generator):
    networks, outputs = (2, outputs) if kind == "attention" else (1, 1)

    def matrix(rows: int, columns: int, gain: float = 2.0) -> torch.Tensor:
        return torch.randn(networks, rows, columns, generator=generator) * math.sqrt(gain / rows)

    weights = {
        "first": matrix(inputs, hidden),
        "first_bias": torch.zeros(networks, hidden),
        "second": matrix(hidden, hidden),
        "second_bias": torch.zeros(networks, hidden),
        # Small, so that training starts from the distance bias or the offset alone.
        "third": matrix(hidden, outputs, gain=0.02),
    }
    weights["distance" if kind == "attention" else "offset"] = torch.zeros(
        len(prediction.DECAYS) if kind == "attention" else 1
    )
    return weights


def _loss(kind: Loss, predicted: torch.Tensor, true: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    if kind == "regression":
        return (predicted - true)[real].square().mean()
    floor = 1e-4
    predicted, true = predicted.clamp_min(floor), true.clamp_min(floor)
    if kind == "log":
        return (predicted.log() - true.log())[real].square().mean()
    shares = torch.where(real, true, 0.0)
    shares = shares / shares.sum(1, keepdim=True)
    logs = predicted.log() - torch.where(real, predicted, 0.0).sum(1, keepdim=True).log()
    return torch.where(real, shares * (shares.clamp_min(1e-12).log() - logs), 0.0).sum(1).mean()


def _rate(peak: float, progress: float) -> float:
    warm = min(1.0, progress / 0.1)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


class _Adam:
    """Adam whose state can lose neurons together with the weights."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = {name: w.detach() for name, w in weights.items()}
        self.moments = [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2)]
        self.steps = 0

    def step(self, gradients: dict[str, torch.Tensor], rate: float, decay: float = 1e-3) -> dict[str, torch.Tensor]:
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        shrink = (1.0 / (norm + 1e-12)).clamp_max(1.0)
        self.steps += 1
        for name, gradient in gradients.items():
            gradient = gradient * shrink
            first, second = (moments[name] for moments in self.moments)
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.01)
            size = (second / (1 - 0.99**self.steps)).sqrt() + 1e-8
            weight = self.weights[name].detach() * (1 - rate * decay)
            self.weights[name] = weight - rate / (1 - 0.9**self.steps) * first / size
        return dict(self.weights)


def _prune(optimiser: _Adam, dead: list[torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Elastic size transformation: keep the `width` neurons of each hidden layer that are least often zero.

    Args:
        dead: per hidden layer [T, w], share of zero activations of each neuron.
    """
    kept = [share.argsort(dim=1)[:, :width].sort(1).values for share in dead]
    for tensors in (optimiser.weights, *optimiser.moments):
        for layer, (matrix, bias, following) in enumerate(
            (("first", "first_bias", "second"), ("second", "second_bias", "third"))
        ):
            index = kept[layer]
            tensors[matrix] = tensors[matrix].take_along_dim(index[:, None, :], 2)
            tensors[bias] = tensors[bias].take_along_dim(index, 1)
            tensors[following] = tensors[following].take_along_dim(index[:, :, None], 1)
    return dict(optimiser.weights)


def _in_original_units(weights: dict[str, torch.Tensor], mean: torch.Tensor, spread: torch.Tensor, unit: float):
    """Fold the standardisation of the inputs and the unit of the scores into the weights."""
    first = weights["first"] / spread[:, None]
    bias = weights["first_bias"] - mean @ first
    return _scaled({**weights, "first": first, "first_bias": bias}, unit)


def _scaled(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Multiply the predicted scores by a factor."""
    if "distance" in weights:
        third = weights["third"] * math.sqrt(factor)
        return {**weights, "third": third, "distance": weights["distance"] * factor}
    return {**weights, "offset": weights["offset"] + math.log(factor)}


def kept(scores: torch.Tensor, real: torch.Tensor, keep: float) -> torch.Tensor:
    """[N, n] -> [N, n] bool: the blocks that a budget keeps, with the first and last block pinned as in selection."""
    lengths = real.sum(1, keepdim=True)
    position = torch.arange(scores.shape[1])
    ranked = scores.float().masked_fill(~real, -torch.inf)
    ranked = ranked.masked_fill((position == 0) | (position == lengths - 1), torch.inf)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < (lengths * keep).ceil().clamp_min(2)) & real


def recall(predicted: torch.Tensor, true: torch.Tensor, real: torch.Tensor, keep: float) -> float:
    """Share of the blocks kept by their true scores that their predicted scores keep too."""
    wanted = kept(true, real, keep)
    return float((kept(predicted, real, keep) & wanted).sum() / wanted.sum())
