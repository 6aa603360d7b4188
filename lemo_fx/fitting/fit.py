"""Offline fitting on the frozen base model: a profiling pass over sequences, then a solution per site.

Stand-ins are solved in closed form from second moments; pattern predictors are trained on token streams and true scores
that the profiling pass leaves in a folder, one site at a time. Layers are profiled in groups whose streams fit in
`SCRATCH` bytes of disk.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn

from lemo_fx import distributed
from lemo_fx.config import LemoConfig, SiteKind, as_config, is_count, is_number
from lemo_fx.errors import ConfigError, InputError, PredictorError, UnsupportedModelError
from lemo_fx.files import check_folder, write_tensors, write_text, writing
from lemo_fx.fitting.profile import probe
from lemo_fx.fitting.thresholds import tune
from lemo_fx.fitting.training import Blocks, Recipe, predict, recall, train
from lemo_fx.graph.anatomy import decoder_layers, has_rope, longest_context, require_model
from lemo_fx.predictors import Predictors, hidden_size, identity

SCRATCH = 16 << 30
"""Bytes of token streams that may lie in the folder at a time; those of one layer always may."""


class BranchStatistics(nn.Module):
    """A probe: sums up second moments of a branch's input and output, and writes scored streams to files.

    Memory is that of two [H, H] matrices, whatever the length of the sequences. The files get every token of the stream
    in half precision, scaled to unit mean square, and the true scores; both padded to the longest sequence.

    Args:
        path: of the files, without their endings; written to where the probe is given scores.
        longest: tokens of the longest sequence; per_score: tokens that one score is for.
    """

    def __init__(self, hidden: int, device: torch.device, path: Path, longest: int, per_score: int) -> None:
        super().__init__()
        self.stream_file, self.score_file = _files(path)
        self.longest, self.per_score = longest, per_score
        self.count = 0
        self.sums = [torch.zeros(hidden, dtype=torch.float64, device=device) for _ in range(2)]
        self.products = [torch.zeros(hidden, hidden, dtype=torch.float32, device=device) for _ in range(2)]
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        for file in _files(path):
            file.unlink(missing_ok=True)

    def forward(
        self,
        source: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        mask: Any = None,
    ) -> None:
        """Note one forward pass: source [B, S, H] the branch's normed input, output [B, S, H] what it adds.

        Args:
            stream: [1, S, H] the residual stream that the branch reads; scores: [1, n] true informativeness.
        """
        if stream is not None and scores is not None:
            tokens = stream[0].float()
            tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)
            _append(self.stream_file, tokens.half().cpu(), self.longest)
            _append(self.score_file, scores[0].float().cpu(), -(-self.longest // self.per_score))
        x, y = source.detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()
        self.count += x.shape[0]
        self.sums[0] += x.sum(0)
        self.sums[1] += y.sum(0)
        self.products[0].addmm_(x.T, x)
        self.products[1].addmm_(x.T, y)
        self.square += y.square().sum()

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


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".stream"), path.with_name(path.name + ".scores")


def _append(path: Path, values: torch.Tensor, rows: int) -> None:
    """Write values, followed by zeros up to a number of rows."""
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: len(values)] = values
    # Not ndarray.tofile, which says nothing when the last bytes find no room.
    with writing(path), path.open("ab") as file:
        file.write(padded.numpy().data)


def fit(
    model: nn.Module,
    sequences: Any,
    config: LemoConfig | str | None = None,
    *,
    rank: int | None = None,
    ridge: float = 1e-3,
    recipe: Recipe | None = None,
    thresholds: bool = False,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Predictors:
    """Learn from one pass of the frozen base model over sequences what `transform` can use. Weights are never changed.

    For every site that `config` makes sparse: a `stand_in` map, by reduced-rank ridge regression of the branch's
    output on its normed input; and, where its score is "auto" or "predicted", a pattern predictor trained on the true
    block scores, causal and with position embedding. The last tenth of the sequences (none if there are under ten) is
    kept from training, and the predictors' recall is measured on it.

    Args:
        model: causal language model, with or without adapters; moved nowhere, its training mode restored.
        sequences: token ids: a list of lists, a [N, S] tensor, or rows with "input_ids" (a datasets Dataset). Where
            rows have an "attention_mask", tokens under a 0 are padding and left out.
        config: which sites are sparse; `LemoConfig()` if None.
        rank: of the stand-in maps; an eighth of the hidden size if None.
        ridge: regularisation of the maps, as a share of the mean variance of the input.
        recipe: how predictors are trained; `Recipe()` if None.
        thresholds: also run LeMo's Algorithm 1 on the sequences that are kept from training: a threshold and a budget
            for every layer, for `Predictors.thresholds` and `.budgets`, at the mean share that the config's `keep`
            gives. Costs six sparse forward passes of these sequences per sparse site.
        folder: keep intermediate results here: a killed run that is started again with the same arguments goes on after
            its last finished layer. The result is saved here too. Without one, a temporary folder is used. It needs up
            to `SCRATCH` bytes, or 4 H bytes a token if that is more.
        progress: show a progress bar.

    Raises:
        InputError: no sequence, not token ids, more of them than the model reads, or a mask that does not fit them.
        UnsupportedModelError: as for `transform`; or the model is already wrapped by DDP or FSDP.
        ConfigError: a rank other than 0 was given a folder.
        StorageError: the disk is full; with a folder, a run with the same arguments goes on from what was finished.
    """
    config = as_config(config)
    recipe = Recipe() if recipe is None else recipe
    require_model(model, "fit")
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe must be a Recipe, not {type(recipe).__name__}")
    distributed.refuse_wrapped(model)
    distributed.refuse_collective(model, "lemo_fx.fit")
    distributed.refuse_process(model)
    distributed.refuse_cut_weights(model)
    if folder is not None and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        raise ConfigError(
            f"folder={str(folder)!r} on rank {torch.distributed.get_rank()}: several ranks must not write one folder; "
            "call lemo_fx.fit on rank 0, then torch.distributed.barrier(), then Predictors.load(folder) on all ranks"
        )
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise ConfigError(f"folder={folder!r} must be a folder, or None")
    layers = decoder_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no causal decoder layers to fit to")
    if rank is not None and not is_count(rank):
        raise ConfigError(f"rank={rank!r} must be a whole number, at least 1")
    if not (is_number(ridge) and 0 < ridge < float("inf")):
        raise ConfigError(f"ridge={ridge!r} must be a positive number")
    batches = list(_batches(sequences))
    if not batches:
        raise InputError("fit needs at least one sequence of token ids")
    if max(ids.shape[1] for ids in batches) < 2:
        raise InputError("every sequence is a single token: there is nothing to choose from")
    most = longest_context(getattr(model, "config", None))
    words = getattr(model.get_input_embeddings(), "num_embeddings", torch.inf)  # type: ignore[operator]
    for number, ids in enumerate(batches):
        if most is not None and ids.shape[1] > most:
            more = ", or set rope scaling in the model's config" if has_rope(model.config) else ""
            raise InputError(
                f"sequence {number} has {ids.shape[1]} tokens; {type(model).__name__} reads up to {most}: cut it{more}"
            )
        if ids.min() < 0 or ids.max() >= words:
            raise InputError(
                f"sequence {number} holds token ids from {ids.min()} to {ids.max()}; the model has {words} tokens: was "
                "the text encoded by its own tokenizer?"
            )
    _check_blocks(config.block_size, most, max(ids.shape[1] for ids in batches))
    hidden = hidden_size(model)
    with contextlib.ExitStack() as stack, Progress(disable=not progress, transient=True) as bar:
        scratch = Path(folder) if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = scratch / "unfinished"
        _prepare(work, _key(model, batches, config, rank, ridge, recipe))
        sparse = [i for i in range(len(layers)) if not config.is_dense(i, len(layers))]
        longest = max(ids.shape[1] for ids in batches)
        at_a_time = max(1, SCRATCH // (4 * hidden * longest * len(batches)))
        groups = [sparse[start : start + at_a_time] for start in range(0, len(sparse), at_a_time)]
        tensors: dict[str, torch.Tensor] = {}
        training: dict[str, Any] = {}
        explained: dict[str, float] = {}
        for number, group in enumerate(groups):
            profile = Profile.read(work, group[0])
            if profile is None:
                what = f"profiling the base model, part {number + 1} of {len(groups)}"
                track = functools.partial(bar.track, description=what)
                probes = run_probes(model, batches, group, config, work, track)
                profile = _solve(probes, work, group[0], rank or max(1, hidden // 8), ridge)
            tensors.update(load_file(work / f"stand_ins.{group[0]}.safetensors"))
            explained.update(profile.explained)
            names = [site for site, kind in profile.kinds.items() if kind]
            for site in bar.track(names, description=f"training predictors, part {number + 1} of {len(groups)}"):
                weights, facts = _trained(work, site, profile, config.block_size, recipe, model)
                tensors.update({f"{site}.predictor.{name}": value for name, value in weights.items()})
                training[site] = facts
        record = {
            **identity(model, len(layers), config.block_size),
            "tokens": sum(ids.numel() for ids in batches),
            "ridge": ridge,
            "explained_variance": explained,
            "recipe": vars(recipe),
            "training": training,
            "date": datetime.date.today().isoformat(),
        }
        predictors = Predictors(tensors, record)
        if thresholds:
            # Any one sequence where none was kept from training.
            heldout = batches[len(batches) - max(1, len(batches) // 10) :]
            done = bar.add_task("setting thresholds", total=None)
            tuned = tune(model, heldout, config, predictors, lambda: bar.advance(done))
            predictors = Predictors(tensors, {**record, "tuning": tuned})
        if folder:
            predictors.save(folder)
            _discard(work)
    return predictors


def _check_blocks(size: int, most: int | None, longest: int) -> None:
    """Raise ConfigError where no sequence fills a block of tokens."""
    if most is not None and size > most:
        raise ConfigError(f"block_size={size}: the model reads up to {most} tokens, less than one block: lower it")
    if size > longest:
        raise ConfigError(
            f"block_size={size}: the longest sequence has {longest} tokens, less than one block: give longer ones, or "
            "lower it"
        )


def _prepare(work: Path, key: str) -> None:
    """An empty folder, or the one that a killed run with the same key left."""
    note = work / "key"
    if note.exists() and note.read_text() == key:
        return
    check_folder(work)
    _discard(work)
    with writing(work):
        work.mkdir(parents=True)
    write_text(note, key)


def _discard(work: Path) -> None:
    """Remove a folder of intermediate results; what a kill leaves of it nobody takes for results."""
    (work / "key").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


@dataclass
class Profile:
    """What a finished profiling pass over a group of layers left in its folder.

    Attributes:
        lengths: tokens of each sequence.
        kinds: by site ("layers.<index>.<site>"): its kind where a predictor is to be trained, else None.
        explained: share of each branch's variance that its stand-in explains.
    """

    lengths: list[int]
    kinds: dict[str, SiteKind | None]
    explained: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, work: Path, first: int) -> Profile | None:
        """The profile of the group that begins with this layer; None where it was not finished."""
        try:
            return cls(**json.loads((work / f"profile.{first}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def blocks(self, work: Path, site: str, block_size: int) -> Blocks:
        """A site's scored streams, mapped from their files."""
        stream, scores = (
            torch.from_file(str(file), shared=False, size=file.stat().st_size // dtype.itemsize, dtype=dtype)
            for file, dtype in zip(_files(work / site), (torch.float16, torch.float32), strict=True)
        )
        count, longest = len(self.lengths), max(self.lengths)
        valid = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        return Blocks(stream.view(count, longest, -1), scores.view(count, -1), valid, block_size)


def _key(model: nn.Module, batches: list[torch.Tensor], config: LemoConfig, *settings: Any) -> str:
    """Hash of what a profile depends on: sequences, settings, and a sample of every weight."""
    digest = hashlib.sha256(repr((config, settings)).encode())
    for ids in batches:
        digest.update(ids.cpu().numpy().tobytes())
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


Track = Callable[[list[torch.Tensor]], Iterable[torch.Tensor]]


def run_probes(
    model: nn.Module, batches: list[torch.Tensor], layers: list[int], config: LemoConfig, work: Path, track: Track
) -> dict[str, tuple[BranchStatistics, SiteKind | None, list[int]]]:
    """Profile some of the base model's layers.

    Returns:
        By site: its probe, its kind where a predictor is to be trained (else None), and the sequences' lengths.
    """
    device = next(model.parameters()).device
    hidden, lengths = hidden_size(model), [ids.shape[1] for ids in batches]
    probes: dict[str, tuple[BranchStatistics, SiteKind | None, list[int]]] = {}

    def choose(index: int, name: str, kind: SiteKind) -> tuple[nn.Module, int | None] | None:
        elimination = config.site(kind)
        if elimination is None:
            return None
        scored = elimination.score in ("auto", "predicted")
        # An MLP's score is a maximum over tokens, whose own scores teach a predictor more.
        per_score = config.block_size if kind == "attention" else 1
        site = f"layers.{index}.{name}"
        statistics = BranchStatistics(hidden, device, work / site, max(lengths), per_score)
        probes[site] = (statistics, kind if scored else None, lengths)
        return statistics, per_score if scored else None

    probe(model, ({"input_ids": ids.to(device)} for ids in track(batches)), layers, choose)
    return probes


def _solve(
    probes: dict[str, tuple[BranchStatistics, SiteKind | None, list[int]]],
    work: Path,
    first: int,
    rank: int,
    ridge: float,
) -> Profile:
    """Solve the stand-ins and mark the profile as finished."""
    tensors: dict[str, torch.Tensor] = {}
    profile = Profile([], {})
    for site, (statistics, kind, lengths) in probes.items():
        if statistics.count == 0:
            raise PredictorError(f"{site} saw no token: did the model run another path than its decoder layers?")
        parts, share = statistics.solve(rank, ridge)
        tensors.update({f"{site}.stand_in.{name}": value for name, value in parts.items()})
        profile.explained[site] = round(share, 4)
        profile.kinds[site] = kind
        profile.lengths = lengths
    write_tensors(work / f"stand_ins.{first}.safetensors", tensors)
    write_text(work / f"profile.{first}.json", json.dumps(vars(profile)))
    return profile


def _trained(
    work: Path, site: str, profile: Profile, block_size: int, recipe: Recipe, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A site's predictor: read back where an earlier run finished it, else trained and written."""
    kind = profile.kinds[site]
    assert kind is not None
    weights_file, record_file = work / f"{site}.safetensors", work / f"{site}.json"
    if record_file.exists():
        return load_file(weights_file), json.loads(record_file.read_text())
    blocks = profile.blocks(work, site, block_size)
    count = len(blocks) // 10
    heldout = blocks[len(blocks) - count :] if count else None
    device = next(model.parameters()).device
    trained = train(kind, blocks[: len(blocks) - count], recipe, heldout, device)
    facts = trained.record
    if heldout is not None:
        predicted = predict(trained.weights, heldout, device)
        facts["recall"] = round(recall(predicted, heldout.block_scores, heldout.real, 0.4), 4)
    write_tensors(weights_file, trained.weights)
    write_text(record_file, json.dumps(facts))
    for file in _files(work / site):
        file.unlink()
    return trained.weights, facts


def _batches(sequences: Any) -> Iterator[torch.Tensor]:
    """Each sequence as a [1, S] tensor: no padding, whatever the lengths, and none of what a mask takes for padding."""
    if isinstance(sequences, str) or not isinstance(sequences, Iterable):
        raise InputError(f"{_TOKEN_IDS}, not {type(sequences).__name__}")
    for number, row in enumerate(sequences):
        try:
            fields = dict(row) if hasattr(row, "keys") else {"input_ids": row}
            ids = _tensor(fields["input_ids"])
            mask = fields.get("attention_mask")
            mask = None if mask is None else _tensor(mask)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"{_TOKEN_IDS}: {error}") from error
        if ids.dim() != 1 or ids.is_floating_point() or ids.numel() == 0:
            raise InputError(_TOKEN_IDS)
        if mask is not None:
            if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
                raise InputError(
                    f"sequence {number}: its attention_mask {list(mask.shape)} must hold a 1 or a 0 for each of its "
                    f"{len(ids)} token ids"
                )
            # Its real tokens alone give what they give beside padding, on whichever side that is.
            ids = ids[mask.bool().to(ids.device)]
            if not len(ids):
                raise InputError(f"sequence {number}: its attention_mask leaves no token")
        yield ids.long()[None]


def _tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(values if isinstance(values, Sequence | torch.Tensor) else list(values))


_TOKEN_IDS = "sequences must be token ids: a list of lists, a [N, S] tensor, or rows with 'input_ids'"
