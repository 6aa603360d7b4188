"""Training one site's pattern predictor from token streams and measured scores (LeMo section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from lemo_fx.config import SiteKind, check_seed, is_count, is_number
from lemo_fx.errors import ConfigError
from lemo_fx.kernels.select_blocks import reference
from lemo_fx.runtime import network

Loss = Literal["log", "kl", "regression"]

WIDER = 1.5
"""How much wider the networks are at the start of training than after elastic size transformation."""

PRUNE_AT = (0.3, 0.4, 0.5, 0.6)
"""Moments, as shares of the training, at which elastic size transformation removes neurons."""

DISTANCE_PACE = 0.1
"""How much slower than the networks the distance bias learns: it starts near its end and enters a score n times."""


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained.

    Attributes:
        width: of an attention's hidden layers and I^(Q), I^(K) after elastic size transformation; None for
            `network.default_width`.
        mlp_width: of an MLP's hidden layers; None for `network.default_width`.
        elastic: start `WIDER` and prune the neurons that are most often zero, until the width is left.
        loss: "log": squared error of the scores' logarithms; "kl": listwise, the divergence between the shares of the
            sequence's total that each block holds; "regression": squared error of raw scores (the paper).
        epochs: passes over the training sequences, but at most `most_steps` steps.
        batch: sequences per step; rate: peak learning rate.
    """

    width: int | None = None
    mlp_width: int | None = None
    elastic: bool = True
    loss: Loss = "kl"
    epochs: int = 30
    most_steps: int = 600
    batch: int = 4
    rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "mlp_width", "epochs", "most_steps", "batch"):
            value = getattr(self, name)
            if not (is_count(value) or (value is None and name.endswith("width"))):
                raise ConfigError(f"{name}={value!r} must be a whole number, at least 1")
        if not (is_number(self.rate) and 0 < self.rate < float("inf")):
            raise ConfigError(f"rate={self.rate!r} must be a positive number")
        if not isinstance(self.elastic, bool):
            raise ConfigError(f"elastic={self.elastic!r} must be True or False")
        if self.loss not in get_args(Loss):
            raise ConfigError(f"loss={self.loss!r} is not one of {', '.join(map(repr, get_args(Loss)))}")
        check_seed(self.seed)

    def width_of(self, kind: SiteKind, hidden: int) -> int:
        """Width for one kind of site of a model of this hidden size."""
        given = self.width if kind == "attention" else self.mlp_width
        return network.default_width(kind, hidden) if given is None else given


@dataclass
class Blocks:
    """A site's training data: sequences padded at the end to the longest.

    Attributes:
        stream: [N, S, H], the residual stream in half precision, each token scaled to unit mean square.
        scores: [N, n] float32 measured, of blocks; or of tokens, [N, S], where that is what a block's score is a
            maximum of (MLP).
        valid: [N, S] bool, False on padding.
        block_size: tokens in a block.
    """

    stream: torch.Tensor
    scores: torch.Tensor
    valid: torch.Tensor
    block_size: int

    def __getitem__(self, rows: Any) -> Blocks:
        return Blocks(self.stream[rows], self.scores[rows], self.valid[rows], self.block_size)

    def __len__(self) -> int:
        return self.scores.shape[0]

    @property
    def of_tokens(self) -> bool:
        """Whether the scores are of tokens."""
        return self.scores.shape == self.valid.shape

    @property
    def block_scores(self) -> torch.Tensor:
        """[N, n] float32."""
        if not self.of_tokens:
            return self.scores
        return network.pool(self.scores[..., None], self.valid, self.block_size, "max")[..., 0]

    @property
    def real(self) -> torch.Tensor:
        """[N, n] bool: blocks that hold a token."""
        return reference.block_any(self.valid, self.block_size)

    def to(self, device: torch.device) -> Blocks:
        """On a device, the stream in float32."""
        parts = self.stream.to(device).float(), self.scores.to(device), self.valid.to(device)
        return Blocks(*parts, self.block_size)


@dataclass
class Trained:
    """One trained predictor: its weights, and plain facts of how the training went."""

    weights: dict[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)


def train(
    kind: SiteKind, blocks: Blocks, recipe: Recipe, heldout: Blocks | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """Fit one predictor.

    Args:
        kind: "attention" (a Q and a K network) or "mlp" (one network).
        heldout: sequences to report the loss on, at the end of every tenth of the training.

    Returns:
        Weights on the CPU, in int8 and bfloat16; an attention's scores are in the measured scores' units. The record
        holds "losses" (per step), "heldout_losses", "parameters" before and after elastic sizing, and "dead" (share of
        zero activations).
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(recipe.seed)
    hidden = blocks.stream.shape[-1]
    seen = blocks[: 2 * recipe.batch].to(device)
    tokens = seen.stream[seen.valid]
    mean, spread = tokens.mean(0), tokens.std(0, correction=0) + 1e-3
    unit = float(blocks.scores[blocks.valid if blocks.of_tokens else blocks.real].mean().clamp_min(1e-12))
    last = recipe.width_of(kind, hidden)
    width = math.ceil(last * WIDER) if recipe.elastic else last
    weights = network.initial_weights(kind, hidden, width, last, generator)
    before = sum(w.numel() for w in weights.values())
    if kind == "attention":
        weights["distance"] = _distance_profile(blocks, unit) / DISTANCE_PACE
    weights = {name: weight.to(device).requires_grad_() for name, weight in weights.items()}
    steps = min(recipe.epochs * math.ceil(len(blocks) / recipe.batch), recipe.most_steps)
    prune_at = {int(share * steps): number for number, share in enumerate(PRUNE_AT)} if recipe.elastic else {}
    optimiser = torch.optim.AdamW(weights.values(), betas=(0.9, 0.99), weight_decay=1e-3)
    zeros, counted = _zero_counts(weights), 0
    record: dict[str, Any] = {"losses": [], "heldout_losses": [], "dead": []}
    order = torch.empty(0, dtype=torch.int64)
    start = width
    for step in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(blocks), generator=generator)
        rows, order = order[: recipe.batch], order[recipe.batch :]
        batch = blocks[rows].to(device)
        with torch.enable_grad():
            usable = _in_original_units(weights, mean, spread, unit)
            activations = network.network(usable, batch.stream)
            loss = _loss(recipe.loss, usable, activations[1], batch, unit)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimiser.param_groups[0]["lr"] = _rate(recipe.rate, step / steps)
        optimiser.step()
        optimiser.zero_grad()
        record["losses"].append(round(loss.item(), 5))
        counted += int(batch.valid.sum())
        for count, activation in zip(zeros, activations, strict=True):
            count += (activation.detach()[:, batch.valid] == 0).sum(1)
        if step in prune_at:
            share = [count / counted for count in zeros]
            record["dead"].append(round(float(torch.cat(share, 1).mean()), 4))
            left = len(PRUNE_AT) - prune_at[step]
            width = start - math.ceil((start - last) / left)
            _prune(weights, optimiser, share, width)
            start = width
            zeros, counted = _zero_counts(weights), 0
        if heldout is not None and (step + 1) % max(1, steps // 10) == 0:
            judged = heldout[: 2 * recipe.batch].to(device)
            with torch.no_grad():
                usable = _in_original_units(weights, mean, spread, unit)
                value = _loss(recipe.loss, usable, network.network(usable, judged.stream)[1], judged, unit)
            record["heldout_losses"].append([step + 1, round(value.item(), 5)])
    weights = {name: w.detach() for name, w in _in_original_units(weights, mean, spread, unit).items()}
    if recipe.loss == "kl" and kind == "attention":
        # Shares of a total leave its size open.
        some = blocks[: 4 * recipe.batch]
        predicted = predict(weights, some, device)
        weights = _scaled(weights, float(some.block_scores[some.real].sum() / predicted[some.real].sum()))
    record["parameters"] = [before, sum(w.numel() for w in weights.values())]
    return Trained({name: w.cpu().contiguous() for name, w in network.compressed(weights).items()}, record)


def predict(weights: dict[str, torch.Tensor], blocks: Blocks, device: torch.device | str = "cpu") -> torch.Tensor:
    """What a layer ranks blocks by, [N, n] on the CPU, a few sequences at a time.

    Of an attention its predicted scores; of an MLP the true scores of the candidates that its predictor names.
    """
    weights = {name: weight.to(device) for name, weight in weights.items()}
    parts = []
    with torch.no_grad():
        for start in range(0, len(blocks), 4):
            part = blocks[start : start + 4].to(torch.device(device))
            if "distance" in weights:
                second = network.network(weights, part.stream)[1]
                parts.append(network.block_scores(weights, second, part.valid, part.block_size).cpu())
                continue
            tokens = network.candidates(weights, part.stream, part.block_size, part.valid)
            count = network.candidate_count(part.block_size)
            parts.append(part.scores.gather(1, tokens).unflatten(1, (-1, count)).amax(2).cpu())
    return torch.cat(parts)


def _distance_profile(blocks: Blocks, unit: float) -> torch.Tensor:
    """The distance bias with which empty networks predict the mean score of every position, [len(DECAYS)]."""
    lengths = blocks.real.sum(1)
    count = int(lengths.max())
    mean = blocks.scores[lengths == count, :count].mean(0) / unit
    # A key block at position n is seen from the distances 0 ... count - 1 - n.
    seen = torch.exp(-torch.tensor(network.DECAYS) * torch.arange(count)[:, None]).cumsum(0).flip(0)
    weight = 1 / mean.clamp_min(1e-3)[:, None]
    # A ridge keeps exponentials that these lengths cannot tell apart small.
    gram = (seen * weight).T @ (seen * weight)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, (seen * weight).T @ (mean[:, None] * weight))[:, 0]


def _zero_counts(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(weights[name]) for name in ("first_bias", "second_bias")]


def _loss(
    kind: Loss, weights: dict[str, torch.Tensor], second: torch.Tensor, batch: Blocks, unit: float
) -> torch.Tensor:
    """Loss of the block scores; for an MLP also of its tokens' scores.

    Through a maximum only the winning tokens would learn, so an MLP's network fits every token's score as well.
    """
    predicted = network.block_scores(weights, second, batch.valid, batch.block_size) / unit
    loss = _block_loss(kind, predicted, batch.block_scores / unit, batch.real)
    if batch.of_tokens:
        logs = batch.scores.clamp_min(1e-4 * unit).log()
        error = (network.token_scores(weights, second) - logs)[batch.valid]
        loss = loss + error.square().mean() / logs[batch.valid].var().clamp_min(1e-6)
    return loss


def _block_loss(kind: Loss, predicted: torch.Tensor, true: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    if kind == "regression":
        return (predicted - true)[real].square().mean()
    floor = 1e-4
    predicted, true = predicted.clamp_min(floor), true.clamp_min(floor)
    if kind == "log":
        return 50 * (predicted.log() - true.log())[real].square().mean()
    shares = torch.where(real, true, 0.0)
    shares = shares / shares.sum(1, keepdim=True)
    logs = predicted.log() - torch.where(real, predicted, 0.0).sum(1, keepdim=True).log()
    return 50 * torch.where(real, shares * (shares.clamp_min(1e-12).log() - logs), 0.0).sum(1).mean()


def _rate(peak: float, progress: float) -> float:
    warm = min(1.0, progress / 0.1)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


def _prune(
    weights: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer, dead: list[torch.Tensor], width: int
) -> None:
    """Elastic size transformation: keep the `width` neurons of each hidden layer that are least often zero.

    Args:
        dead: per hidden layer [T, w], share of zero activations of each neuron.
    """
    layers = (("first", "first_bias", "second"), ("second", "second_bias", "third"))
    for (matrix, bias, following), share in zip(layers, dead, strict=True):
        kept = share.argsort(dim=1)[:, :width].sort(1).values
        for name, index, axis in ((matrix, kept[:, None, :], 2), (bias, kept, 1), (following, kept[:, :, None], 1)):
            state = optimiser.state.pop(weights[name])
            weights[name] = weights[name].detach().take_along_dim(index, axis).requires_grad_()
            moments = {key: x.take_along_dim(index, axis) if x.dim() else x for key, x in state.items()}
            optimiser.state[weights[name]] = moments
    optimiser.param_groups[0]["params"] = list(weights.values())


def _in_original_units(weights: dict[str, torch.Tensor], mean: torch.Tensor, spread: torch.Tensor, unit: float):
    """Fold the standardisation of the tokens and the unit of the scores into the weights."""
    first = weights["first"] / spread[:, None]
    bias = weights["first_bias"] - mean @ first
    usable = {**weights, "first": first, "first_bias": bias}
    if "distance" in weights:
        usable["distance"] = weights["distance"] * DISTANCE_PACE
    return _scaled(usable, unit)


def _scaled(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Multiply the predicted scores by a factor."""
    if "distance" in weights:
        third = weights["third"] * math.sqrt(factor)
        return {**weights, "third": third, "distance": weights["distance"] * factor}
    return {**weights, "offset": weights["offset"] + math.log(factor)}


def kept(scores: torch.Tensor, real: torch.Tensor, keep: float) -> torch.Tensor:
    """[N, n] -> [N, n] bool: the blocks that a budget keeps, with the first and last block pinned as in selection."""
    lengths = real.sum(1, keepdim=True)
    # Each block as a token of its own.
    ranked = reference.rank(scores, real, None, scores.shape[1], 1, 0)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < (lengths * keep).ceil().clamp_min(2)) & real


def recall(predicted: torch.Tensor, true: torch.Tensor, real: torch.Tensor, keep: float) -> float:
    """Share of the blocks kept by their true scores that their predicted scores keep too."""
    wanted = kept(true, real, keep)
    return float((kept(predicted, real, keep) & wanted).sum() / wanted.sum())
