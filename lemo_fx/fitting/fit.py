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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn

from lemo_fx import distributed
from lemo_fx.config import LemoConfig, SiteKind, as_config, is_count, is_number
from lemo_fx.errors import ConfigError, PredictorError, UnsupportedModelError
from lemo_fx.files import check_folder, write_json, write_tensors, write_text, writing
from lemo_fx.fitting.profile import run_probes
from lemo_fx.fitting.sequences import read_sequences
from lemo_fx.fitting.statistics import BranchStatistics, stream_files
from lemo_fx.fitting.thresholds import tune
from lemo_fx.fitting.training import Blocks, Recipe, predict, recall, train
from lemo_fx.graph.anatomy import decoder_layers, require_model
from lemo_fx.predictors import Predictors, hidden_size, identity

SCRATCH = 16 << 30
"""Bytes of token streams that may lie in the folder at a time; those of one layer always may."""


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
    for name, value in (("thresholds", thresholds), ("progress", progress)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} must be True or False")
    batches = read_sequences(model, sequences, config.block_size)
    hidden = hidden_size(model)
    with contextlib.ExitStack() as stack, Progress(disable=not progress, transient=True) as bar:
        scratch = Path(folder) if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = scratch / "unfinished"
        _prepare(work, _key(model, batches, config, rank, ridge, recipe))
        sparse = [i for i in range(len(layers)) if not config.is_dense(i, len(layers))]
        lengths = [ids.shape[1] for ids in batches]
        at_a_time = max(1, SCRATCH // (4 * hidden * max(lengths) * len(batches)))
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
                profile = _solve(probes, lengths, work, group[0], rank or max(1, hidden // 8), ridge)
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
            for file, dtype in zip(stream_files(work / site), (torch.float16, torch.float32), strict=True)
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


def _solve(
    probes: dict[str, BranchStatistics], lengths: list[int], work: Path, first: int, rank: int, ridge: float
) -> Profile:
    """Solve the stand-ins and mark the profile as finished."""
    tensors: dict[str, torch.Tensor] = {}
    profile = Profile(lengths, {})
    for site, statistics in probes.items():
        if statistics.count == 0:
            raise PredictorError(f"{site} saw no token: did the model run another path than its decoder layers?")
        parts, share = statistics.solve(rank, ridge)
        tensors.update({f"{site}.stand_in.{name}": value for name, value in parts.items()})
        profile.explained[site] = round(share, 4)
        profile.kinds[site] = statistics.kind
    write_tensors(work / f"stand_ins.{first}.safetensors", tensors)
    write_json(work / f"profile.{first}.json", vars(profile))
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
    write_json(record_file, facts)
    for file in stream_files(work / site):
        file.unlink()
    return trained.weights, facts
